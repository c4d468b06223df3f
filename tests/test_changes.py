"""Changes of the whole image: what each kind does, that it stays within its strength, and that it climbs."""

import itertools
import math

import pytest
import torch
from torch import nn

from untrojan.data import CleanSet
from untrojan.scanners.changes import Perturbations, Reached, Recolorings, Warps, compare, of_each_kind

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
        made.climb(Shine(), torch.rand(16, *SHAPE), 1)
        assert (size(made) <= strengths * (1 + 1e-5)).all()
    if kind is not Warps:  # which hardly change how bright an image is
        assert torch.allclose(size(made), strengths)


@pytest.mark.parametrize("kind", [Perturbations, Recolorings])
def test_climbing_sends_images_to_the_label(kind):
    images = 0.5 * torch.rand(64, *SHAPE) + 0.25
    made = kind(SHAPE, torch.full((2,), {"perturbation": 3.0, "recoloring": 0.25}[kind.name]), generator())
    before = made.share(Shine(), images, 1)
    for _ in range(10):
        made.climb(Shine(), images, 1)
    assert before < 0.5
    assert made.share(Shine(), images, 1) == 1
    assert made.reach > 0.7


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
        made.climb(net, torch.rand(8, *SHAPE), 1)
    assert net.training
    assert all(torch.equal(one, other) for one, other in zip(weights, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_label_that_stands_out_is_told_from_others():
    images = 0.5 * torch.rand(60, *SHAPE)
    clean = CleanSet(images, torch.arange(60) % 3)
    bright = {each.kind: each for each in compare(Shine(), clean, 1, 6.0, generator())}
    assert bright["perturbation"].further == 0  # darker images are of class 0 anyway
    assert bright["perturbation"].share == 1
    dull = {each.kind: each for each in compare(Shine(), clean, 2, 6.0, generator())}
    assert dull["perturbation"].share == 0
    assert dull["perturbation"].further == -1


def test_there_may_be_no_other_label():
    clean = CleanSet(0.5 * torch.rand(10, *SHAPE), torch.zeros(10, dtype=torch.int64))
    assert all(each.elsewhere == 0 and math.isfinite(each.share) for each in compare(Shine(), clean, 1, 1, generator()))
    assert Reached("warp", 0.5, 0.2).further == pytest.approx(0.3)
