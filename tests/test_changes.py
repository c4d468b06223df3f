"""Changes of the whole image: what each kind does, that it stays within its strength, and that it climbs."""

import itertools

import pytest
import torch
from torch import nn

from untrojan.data import CleanSet
from untrojan.record import Comparison
from untrojan.scanners.aim import Aim
from untrojan.scanners.changes import Perturbations, Recolorings, Warps, compare, of_each_kind, with_others

KINDS = [Perturbations, Warps, Recolorings]
SHAPE = (3, 8, 8)
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)


def generator():
    return torch.Generator().manual_seed(0)


class Shine(nn.Module):
    """Says 1 where an image is bright."""

    def forward(self, images):
        bright = 20 * (images.mean((1, 2, 3)) - 0.6)
        return torch.stack([-bright, bright, torch.full_like(bright, -9)], 1)


def test_a_perturbation_is_added_and_clipped():
    images, values = torch.rand(2, *SHAPE), 0.5 * torch.randn(2, *SHAPE)
    changed = Perturbations(SHAPE, torch.ones(1), generator()).changed(images, values)
    for place in itertools.product(*map(range, changed.shape)):
        expected = min(1.0, max(0.0, float(images[place]) + float(values[place])))
        assert float(changed[place]) == pytest.approx(expected)


@pytest.mark.parametrize(("down", "right"), [(1, 0), (0, 2), (-1, 1)])
def test_a_warp_by_whole_pixels_moves_the_image(down, right):
    images = torch.rand(1, *SHAPE)
    field = torch.empty(1, 2, 4, 4)
    field[:, 0], field[:, 1] = right, down
    changed = Warps(SHAPE, torch.ones(1), generator()).changed(images, field)
    inner = slice(2, 6)
    moved = images[:, :, 2 + down : 6 + down, 2 + right : 6 + right]
    torch.testing.assert_close(changed[:, :, inner, inner], moved, atol=1e-4, rtol=0)


def test_a_recoloring_is_a_linear_map_of_the_channels():
    image, values = torch.rand(1, *SHAPE), 0.1 * torch.randn(1, 3, 4)
    changed = Recolorings(SHAPE, torch.ones(1), generator()).changed(image, values)
    for row in range(8):
        pixel = image[0, :, row, row]
        for channel in range(3):
            by = sum(float(values[0, channel, other] * pixel[other]) for other in range(3)) + float(
                values[0, channel, 3]
            )
            expected = min(1.0, max(0.0, float(pixel[channel]) + by))
            assert float(changed[0, channel, row, row]) == pytest.approx(expected, abs=1e-6)


@kinds
@pytest.mark.parametrize("channels", [1, 3])
def test_nothing_changes_by_zero(kind, channels):
    images = torch.rand(2, channels, 8, 6)
    made = kind((channels, 8, 6), torch.ones(2), generator())
    torch.testing.assert_close(made.changed(images, torch.zeros_like(made.values)), images, atol=1e-5, rtol=0)


def size(made):
    flat = made.values.flatten(1)
    return flat.norm(dim=1) if made.name == "perturbation" else flat.abs().amax(1)


@kinds
def test_strength_is_never_exceeded_and_reached_by_climbing(kind):
    strengths = torch.tensor([0.05, 0.2])
    made = kind(SHAPE, strengths, generator())
    assert torch.allclose(size(made), 0.5 * strengths)
    for _ in range(8):
        made.climb(Shine(), torch.rand(16, *SHAPE), torch.zeros(16, dtype=torch.int64), Aim(1))
        assert (size(made) <= strengths * (1 + 1e-5)).all()
    if kind is not Warps:  # which hardly change how bright an image is
        assert torch.allclose(size(made), strengths)


class Rough(Shine):
    """Says the same, but has no slope by the first image."""

    def forward(self, images):
        out = super().forward(images)
        return torch.cat([out[:1] + (0 * images[:1]).sum().sqrt(), out[1:]])


@kinds
def test_where_there_is_no_slope_a_change_stays_and_the_others_climb(kind):
    made, smooth = (kind(SHAPE, torch.full((2,), 0.2), generator()) for _ in range(2))
    before, images = made.values.clone(), torch.rand(16, *SHAPE)
    for each, model in ((made, Rough()), (smooth, Shine())):
        each.climb(model, images, torch.zeros(16, dtype=torch.int64), Aim(1))
    assert torch.equal(made.values[0], before[0])
    assert torch.equal(made.values[1], smooth.values[1])
    assert not torch.equal(made.values[1], before[1])


@pytest.mark.parametrize("kind", [Perturbations, Recolorings])
def test_climbing_sends_images_to_the_label(kind):
    images = 0.5 * torch.rand(64, *SHAPE) + 0.25
    shown = CleanSet(images, torch.zeros(64, dtype=torch.int64))
    made = kind(SHAPE, torch.full((2,), {"perturbation": 3.0, "recoloring": 0.25}[kind.name]), generator())
    _, before = made.best(Shine(), shown, Aim(1))
    for _ in range(10):
        made.climb(Shine(), images, shown.labels, Aim(1))
    assert before < 0.5
    best, share = made.best(Shine(), shown, Aim(1))
    assert share == 1
    assert (Shine()(made.changed(images, best.expand(64, *best.shape[1:]))).argmax(1) == 1).all()


@kinds
def test_only_those_asked_for_begin_anew(kind):
    made = kind(SHAPE, torch.ones(4), generator())
    before = made.values.clone()
    made.begin(torch.tensor([True, False, True, False]))
    same = [torch.equal(one, other) for one, other in zip(before, made.values, strict=True)]
    assert same == [False, True, False, True]


@kinds
def test_putting_on_scales_each_change(kind):
    images = torch.full((5, *SHAPE), 0.5)
    made = kind(SHAPE, torch.full((2,), 0.1), generator())
    assert torch.allclose(made.put_on(images, 0, 0), images, atol=1e-5)
    assert made.put_on(images).shape == images.shape


def test_climbing_leaves_the_model_alone():
    net = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(192, 3))
    weights = [parameter.clone() for parameter in net.parameters()]
    for made in of_each_kind(SHAPE, 0.5, generator()):
        made.climb(net, torch.rand(8, *SHAPE), torch.zeros(8, dtype=torch.int64), Aim(1))
    assert net.training
    assert all(torch.equal(one, other) for one, other in zip(weights, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def compared(clean, label):
    labels = with_others([label], clean, generator())
    changes = compare(Shine(), clean, clean, labels, 6.0, generator())
    return {each.comparison.kind: each for each in changes if each.comparison.label == label}


def test_a_label_that_stands_out_is_told_from_others():
    images = 0.5 * torch.rand(60, *SHAPE)
    clean = CleanSet(images, torch.arange(60) % 3)
    bright = compared(clean, 1)["perturbation"]
    assert bright.comparison.further == 0  # darker images are of class 0 anyway
    assert bright.comparison.share == 1
    assert (Shine()(bright.add(images)).argmax(1) == 1).all()
    dull = compared(clean, 2)["perturbation"].comparison
    assert dull.share == 0
    assert dull.further == -1


def test_images_to_judge_by_are_not_those_to_search_on():
    images = CleanSet(0.5 * torch.rand(30, *SHAPE), torch.arange(30) % 3)
    black = CleanSet(torch.zeros(30, *SHAPE), torch.arange(30) % 3)
    [perturbation, *_] = compare(Shine(), images, black, [1], 1.0, generator())
    assert perturbation.comparison.share == 0


def test_there_may_be_no_other_label():
    clean = CleanSet(0.5 * torch.rand(10, *SHAPE), torch.zeros(10, dtype=torch.int64))
    assert with_others([1], clean, generator()) == [1]
    assert all(each.comparison.elsewhere == 0 for each in compared(clean, 1).values())
    assert Comparison(label=1, kind="warp", share=0.5, elsewhere=0.2).further == pytest.approx(0.3)


def test_labels_asked_for_come_first_and_once():
    clean = CleanSet(torch.rand(40, *SHAPE), torch.arange(40) % 20)
    labels = with_others([3, 7, 3], clean, generator())
    assert labels[:2] == [3, 7]
    assert len(labels) == len(set(labels)) == 6
    assert with_others(range(8), clean, generator()) == list(range(8))


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (Perturbations, "a perturbation of all pixels with an l2 norm of 0.05"),
        (Warps, "a warp by up to 0.05 pixels"),
        (Recolorings, "a recoloring that shifts and mixes channels by up to 0.05"),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
@pytest.mark.parametrize("channels", [1, 3])
def test_told_and_pictured(kind, text, channels):
    made = kind((channels, 8, 6), torch.tensor([0.1]), generator())
    assert made.told(made.values) == text
    picture = made.picture(made.values)
    assert picture.shape == (channels, 8, 6)
    assert 0 <= picture.min() < picture.max() <= 1


def test_nothing_recolored_is_pictured_as_ramps():
    made = Recolorings((3, 8, 8), torch.tensor([0.1]), generator())
    picture = made.picture(torch.zeros_like(made.values))
    assert torch.equal(picture[:, :, -1].T, torch.eye(4, 3).index_fill(0, torch.tensor([3]), 1).repeat_interleave(2, 0))
    assert not picture[:, :, 0].any()
