"""A network that takes less time gives what it gave before."""

import copy

import pytest
import torch
from tiny import Returns, Snapshot, build, make_clean
from torch import nn

from untrojan import speed
from untrojan.data import CleanSet
from untrojan.model import Normalize, evaluating
from untrojan.sources import load
from untrojan.sources.files import save_state
from untrojan.speed import faster, folded, lay_out, layout_of


@pytest.fixture
def bfloat16(monkeypatch):
    monkeypatch.setattr(speed, "multiplies_bfloat16", lambda _: True)


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(speed, "multiplies_bfloat16", lambda _: False)


@pytest.mark.usefixtures("bfloat16")
def test_a_faster_network_gives_nearly_the_same_and_shares_the_weights(net):
    clean = make_clean()
    quick = faster(net, clean)
    with evaluating(net), torch.no_grad():
        assert torch.allclose(quick(clean.floats()).softmax(1), net(clean.floats()).softmax(1), atol=0.1)
    assert [id(each) for each in quick.parameters()] == [id(each) for each in net.parameters()]
    assert faster(quick, clean) is quick


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(3, 2, 3), Returns(lambda out: out.view(len(out), -1))),
        Returns(lambda images: 1e4 * (images.flatten(1)[:, :1] @ torch.tensor([[1, 1.002]]))),
    ],
    ids=["views a convolution", "rounds to something else"],
)
def test_a_network_that_cannot_run_faster_is_given_back(net):
    assert faster(net, CleanSet(torch.full((4, 3, 4, 4), 0.3), torch.tensor([0, 1, 0, 1]))) is net


@pytest.mark.usefixtures("float32")
def test_without_bfloat16_in_the_processor_a_faster_network_has_the_channels_last_and_rounds_nothing():
    net, clean, seen = build("batchnorm").eval(), make_clean(), []
    quick = faster(net, clean)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.allclose(quick(clean.floats()), net(clean.floats()), atol=1e-6)
    assert [images.is_contiguous(memory_format=torch.channels_last) for images in seen] == [True, False]
    assert {images.dtype for images in seen} == {torch.float32}


def test_gradients_are_the_same_however_a_network_is_laid_out(net):
    # each alone, because torch's GroupNorm crashes with the channels last where it is not asked for all of its own
    images = make_clean().floats()
    laid = copy.deepcopy(net)
    lay_out(laid, layout_of(faster(laid, make_clean(), rounding=False)))
    for of in (None, *range(len(list(net.parameters())))):
        slopes = []
        for each in (net, laid):
            each.requires_grad_(False)
            shown = images.clone()
            asked = shown if of is None else list(each.parameters())[of]
            asked.requires_grad_()
            slopes.append(torch.autograd.grad(each(shown).square().sum(), asked)[0])
        assert torch.allclose(*slopes, rtol=1e-3, atol=1e-4)


class ViewsWeights(nn.Conv2d):
    """Standardizes its weights, which it views in another shape: it cannot where these have the channels last."""

    def forward(self, images):
        rows = self.weight.view(len(self.weight), -1)
        weights = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
        return nn.functional.conv2d(images, weights.view_as(self.weight), self.bias)


@pytest.mark.parametrize(
    ("conv", "layout"),
    [
        (nn.Conv2d, torch.channels_last),
        (ViewsWeights, torch.contiguous_format),
        (lambda *sizes: nn.utils.spectral_norm(nn.Conv2d(*sizes)), torch.contiguous_format),
    ],
    ids=["convolution", "views its weights", "computes its weights"],
)
def test_weights_are_laid_out_only_where_the_network_can_run_so(conv, layout):
    net = nn.Sequential(conv(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    net[3].requires_grad_(False)
    net.order = nn.Parameter(torch.tensor([1, 0]), requires_grad=False)
    before = Snapshot(net)
    quick = faster(net, make_clean(), rounding=False)
    assert quick is not net
    assert layout_of(quick) == layout
    before.assert_same()


@pytest.mark.usefixtures("float32")
def test_networks_with_group_norm_keep_their_layout():
    net, clean, seen = build("groupnorm"), make_clean(), []
    quick = faster(net, clean)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    quick(clean.floats())
    assert seen[0].is_contiguous()


def settled(*layers):
    """A network whose BatchNorm has seen images, in evaluation mode."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for _ in range(9):
        net(make_clean().floats())
    return net.eval()


def norms(net):
    return sum(isinstance(each, nn.BatchNorm2d) for each in net.modules())


@pytest.mark.usefixtures("float32")
def test_a_folded_network_gives_the_same_and_the_network_is_left_alone(net):
    clean = make_clean()
    before = Snapshot(net)
    quick = folded(net, clean)
    before.assert_same()
    with evaluating(net), torch.no_grad():
        assert torch.allclose(quick(clean.floats()), net(clean.floats()), atol=1e-4)


@pytest.mark.usefixtures("float32")
def test_normalization_becomes_part_of_the_convolution_before_it():
    net = settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False))
    quick = folded(net, make_clean())
    assert norms(net) == 2
    assert norms(quick) == 0
    assert torch.allclose(quick(make_clean().floats()), net(make_clean().floats()), atol=1e-5)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("place", ["a hook", "a layer"])
def test_a_network_that_normalizes_its_images_is_folded_too(tmp_path, place):
    net = settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    if place == "a hook":
        save_state(tmp_path / "net.safetensors", net.state_dict())
        net = load(tmp_path / "net.safetensors", net, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    else:
        net = nn.Sequential(Normalize((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), *net).eval()
    before = Snapshot(net)
    quick = folded(net, make_clean())
    before.assert_same()
    assert norms(quick) == 0
    assert torch.allclose(quick(make_clean().floats()), net(make_clean().floats()), atol=1e-5)


class Twice(nn.Module):
    """Needs the output of a convolution before normalization too, and calls another convolution twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, images):
        plain = self.first(images)
        out = plain + self.norms[0](plain)
        return self.norms[2](self.again(self.norms[1](self.again(out))))


@pytest.mark.usefixtures("float32")
def test_what_is_used_twice_is_not_folded():
    net = settled(Twice())
    quick = folded(net, make_clean())
    assert norms(quick) == 3
    assert torch.allclose(quick(make_clean().floats()), net(make_clean().floats()), atol=1e-5)


@pytest.mark.usefixtures("float32")
def test_a_network_that_cannot_be_traced_is_run_as_it_is():
    net = settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Returns(lambda out: out if out.sum() > 0 else -out))
    assert folded(net, make_clean()).model is net


@pytest.mark.usefixtures("bfloat16")
def test_a_folded_network_is_faster_too_and_is_not_folded_again():
    net = settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    quick = folded(faster(net, make_clean()), make_clean())
    assert norms(quick) == 0
    assert faster(quick, make_clean()) is folded(quick, make_clean()) is quick
