"""Where a trigger sends images: what counts as there, how sure that is, and which share gets there."""

import math

import pytest
import torch
from torch import nn

from untrojan.data import CleanSet
from untrojan.scanners.aim import Aim

OUT = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 5.0]])
LABELS = torch.tensor([0, 0, 1])


class SaysBright(nn.Module):
    """Says 1 where the image is bright; in training mode, always."""

    def forward(self, images):
        bright = images.mean((1, 2, 3)) if not self.training else torch.ones(len(images))
        return torch.stack([torch.full_like(bright, 0.5), bright], 1)


@pytest.mark.parametrize(("label", "share"), [(1, 0.5), (0, 0.0), (2, 0.0)])
def test_the_share_sent_is_of_images_of_other_classes(label, share):
    """Of two images of class 0 one becomes bright enough; those of class 1 do not count."""
    images = torch.tensor([0.1, 0.4, 0.6, 0.9]).view(4, 1, 1, 1).expand(-1, -1, 2, 2)
    clean = CleanSet(images, torch.tensor([0, 0, 1, 1]))
    net = SaysBright().train()
    assert Aim(label).share(net, clean, lambda batch: (batch + 0.2).clamp(0, 1)) == share
    assert net.training


def test_no_share_is_sent_where_all_are_of_the_label():
    clean = CleanSet(torch.rand(3, 1, 2, 2), torch.ones(3, dtype=torch.int64))
    assert Aim(1).share(SaysBright(), clean, torch.ones_like) == 0


def test_the_share_sent_away_is_of_all_images():
    images = torch.tensor([0.1, 0.4, 0.6, 0.9]).view(4, 1, 1, 1).expand(-1, -1, 2, 2)
    clean = CleanSet(images, torch.tensor([0, 0, 1, 1]))
    assert Aim(None).share(SaysBright(), clean, lambda batch: batch) == 0
    assert Aim(None).share(SaysBright(), clean, lambda batch: 1 - batch) == 1
    assert Aim(None).share(SaysBright(), clean, lambda batch: batch + 0.2) == 0.25


def test_to_a_label():
    probability = OUT.softmax(1)[:, 2]
    assert Aim(2).sent(OUT, LABELS).tolist() == [False, False, True]
    assert torch.allclose(Aim(2).probability(OUT, LABELS), probability)
    assert torch.allclose(Aim(2).loss(OUT, LABELS), -probability.log().mean())
    assert Aim(2).margin(OUT, LABELS).tolist() == [-2, -2, 4]
    assert Aim(2).others(CleanSet(torch.rand(3, 1, 2, 2), torch.tensor([0, 2, 1]))).labels.tolist() == [0, 1]
    assert str(Aim(2)) == "label 2"


def test_away_from_its_own():
    own = OUT.softmax(1).gather(1, LABELS[:, None])[:, 0]
    assert Aim(None).sent(OUT, LABELS).tolist() == [False, True, True]
    assert torch.allclose(Aim(None).probability(OUT, LABELS), 1 - own)
    assert torch.allclose(Aim(None).loss(OUT, LABELS), -(1 - own).log().mean())
    assert Aim(None).margin(OUT, LABELS).tolist() == [-1, 3, 5]
    clean = CleanSet(torch.rand(3, 1, 2, 2), torch.tensor([0, 2, 1]))
    assert Aim(None).others(clean) is clean


def test_to_a_target_for_each_class():
    """Class 0 is to go to 1; of class 1 there is no target, and 2 goes to 0."""
    aim, one = Aim(None, (1, 1, 0)), OUT.softmax(1)[:, 1]
    assert aim.sent(OUT, LABELS).tolist() == [False, True, False]
    assert torch.allclose(aim.probability(OUT, LABELS), one)
    assert torch.allclose(aim.loss(OUT, LABELS), -one.log().mean())
    assert aim.margin(OUT, LABELS).tolist() == [-1, 2, -5]
    assert aim.others(CleanSet(torch.rand(3, 1, 2, 2), torch.tensor([0, 2, 1]))).labels.tolist() == [0, 2]
    assert aim.share(SaysBright(), CleanSet(torch.rand(2, 1, 2, 2), torch.tensor([1, 1])), torch.ones_like) == 0
    assert str(aim) == "the target of their class"


@pytest.mark.parametrize("aim", [Aim(2), Aim(None), Aim(None, (2, 0, 1))])
def test_of_many_at_once_as_of_each(aim):
    several = torch.stack([OUT, OUT.flip(0)])
    for what in (aim.sent, aim.probability, aim.margin):
        assert torch.equal(what(several, LABELS), torch.stack([what(each, LABELS) for each in several]))


@pytest.mark.parametrize("aim", [Aim(0), Aim(None), Aim(None, (2, 0, 1))])
def test_an_image_of_which_the_logits_tell_nothing_is_nowhere(aim):
    out, labels = torch.full((1, 3), math.nan), torch.tensor([1])
    assert not aim.sent(out, labels).any()
    assert not aim.sent(torch.tensor([[math.inf, 0.0, 0.0]]), labels).any()
    assert aim.probability(out, labels).tolist() == [0]
    assert aim.margin(out, labels).tolist() == [-math.inf]


@pytest.mark.parametrize("aim", [Aim(1), Aim(None)])
def test_the_loss_leads_there_also_from_far_away(aim):
    out = torch.tensor([[90.0, 0.0]]).requires_grad_()
    loss = aim.loss(out, torch.tensor([0]))
    (slope,) = torch.autograd.grad(loss, out)
    assert torch.isfinite(loss)
    assert slope[0, 0] > 0.9
    assert float(loss.detach()) == pytest.approx(90)
