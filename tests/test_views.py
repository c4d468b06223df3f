"""Views of few clean images are many, and still images."""

import pytest
import torch

from untrojan.defenses.views import _pasted, _recolored, _zoomed, mixed, varied


def test_mixing_keeps_half_of_the_images_and_most_of_the_others():
    images = torch.eye(64)[:, :, None, None]
    made = mixed(images, torch.Generator().manual_seed(0))[:, :, 0, 0]
    own = made.diagonal()
    assert (own >= 0.5 - 1e-6).all()
    assert (own == 1).double().mean() == pytest.approx(0.5, abs=0.2)
    assert torch.allclose(made.sum(1), torch.ones(64))


class TestVaried:
    """How few clean images become many."""

    def test_every_kind_keeps_shape_and_range_and_changes_something(self):
        images = torch.rand(40, 3, 12, 16)
        for change in (_zoomed, _recolored, _pasted, varied):
            changed = change(images, torch.Generator().manual_seed(0))
            assert changed.shape == images.shape
            assert 0 <= changed.min() <= changed.max() <= 1
            assert not torch.equal(changed, images)
            assert torch.equal(changed, change(images, torch.Generator().manual_seed(0)))

    def test_a_zoomed_ramp_is_a_part_of_the_ramp(self):
        ramp = torch.linspace(0, 1, 16).expand(30, 1, 8, 16)
        zoomed = _zoomed(ramp, torch.Generator().manual_seed(0))
        steps = zoomed[:, 0, :, 2:-2].diff(dim=2) * 15
        assert steps.min() > 0.4
        assert steps.max() < 1.1

    def test_what_is_pasted_is_a_window_at_the_same_place(self):
        images = (torch.arange(20.0)[:, None, None, None] / 20).expand(20, 1, 8, 8)
        pasted = _pasted(images, torch.Generator().manual_seed(0))
        for own, made in zip(images[:, 0, 0, 0], pasted[:, 0], strict=True):
            other = made != own
            assert len(made[other].unique()) <= 1
            rows, columns = other.any(1), other.any(0)
            assert torch.equal(other, rows[:, None] & columns)
            assert other.float().mean() <= 0.77

    def test_half_of_the_images_are_left_by_each(self):
        images = torch.rand(400, 1, 8, 8)
        same = (varied(images, torch.Generator().manual_seed(0)) == images).flatten(1).all(1)
        assert 20 <= same.sum() <= 80
