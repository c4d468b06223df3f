"""A universal perturbation finds the backdoor, and loses its effect where the backdoor is gone."""

import math

import pytest
import torch
from tiny import NETS, UNLIKE, Snapshot, build, make_clean
from torch import nn

from untrojan.data import CleanSet
from untrojan.scanners.aim import Aim
from untrojan.scanners.inversion import _onto_l1_ball, universal


class Backdoored(nn.Module):
    """Says 1 where the last pixel is bright, else whether the first one is."""

    def __init__(self, backdoor):
        super().__init__()
        self.backdoor = nn.Parameter(torch.tensor(backdoor))

    def forward(self, images):
        first, last = images[:, 0, 0, 0], images[:, 0, -1, -1]
        return torch.stack([first + 1, 1 - first + self.backdoor * last], dim=1)


@pytest.fixture
def images():
    pixels = torch.rand(60, 1, 6, 6) * 0.2
    labels = torch.arange(60) % 2
    pixels[:, 0, 0, 0] = 1.0 - labels
    return CleanSet(pixels, labels)


def test_it_finds_the_backdoor_and_little_else(images):
    model, clean_model = Backdoored(9.0), Backdoored(0.0)
    found = universal(model, images, Aim(1), seed=0)
    assert found.success(model, images, Aim(1)) >= 0.9
    assert found.values[0, -1, -1] > 0.1
    assert found.values.abs().sum() <= found.norm + 1e-4
    assert found.success(clean_model, images, Aim(1)) <= 0.1


@pytest.mark.parametrize(
    "name", [name if name in UNLIKE else pytest.param(name, marks=pytest.mark.slow) for name in NETS]
)
def test_the_model_is_left_alone(name):
    net = build(name)
    before = Snapshot(net)
    universal(net, make_clean(24), Aim(0), seed=0)
    before.assert_same()


def test_same_seed_same_perturbation(images):
    first, second = (universal(Backdoored(3.0), images, Aim(1), seed=5).values for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("norm", [0.5, 2.0, 100.0])
def test_projection_is_the_nearest_point_of_the_ball(norm):
    values = torch.randn(3, 4, 4)
    projected = _onto_l1_ball(values, norm)
    assert projected.abs().sum() <= norm + 1e-4
    if values.abs().sum() <= norm:
        assert torch.equal(projected, values)
    for _ in range(50):
        other = torch.randn(3, 4, 4)
        other = other * norm / other.abs().sum()
        assert (values - projected).norm() <= (values - other).norm() + 1e-5


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_projection_leaves_what_is_not_finite_to_be_found(odd):
    values = torch.tensor([[[1.0, odd]]])
    assert torch.equal(_onto_l1_ball(values, 0.5).isfinite(), values.isfinite())
