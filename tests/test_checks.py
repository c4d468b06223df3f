"""The checks pass where a backdoor is gone, and only there."""

import pytest
import torch
from tiny import FallsForSquare, make_dark

from untrojan.defenses.checks import keeps_accuracy, resists_patches, resists_perturbation
from untrojan.record import Diagnosis, Rate, Reach, Target, Trigger

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
NOBODY = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])

triggers = pytest.mark.parametrize("check", [resists_patches, resists_perturbation])


def test_a_model_without_the_backdoor_passes():
    done = resists_patches(FallsForSquare(), FallsForSquare(0.0), make_dark(), GIVEN, 0)
    assert done.passed, done.detail


@triggers
def test_a_model_that_still_has_it_fails(check):
    assert not check(FallsForSquare(), FallsForSquare(), make_dark(), GIVEN, 0).passed


def test_a_model_that_falls_for_another_patch_fails():
    done = resists_patches(FallsForSquare(), FallsForSquare(place=4), make_dark(), GIVEN, 0)
    assert not done.passed
    assert "and 0% now" in done.detail


class Leans(torch.nn.Module):
    """Says 1 where the image leans to a checkerboard, else whether the first four rows are dark."""

    def __init__(self, backdoor):
        super().__init__()
        self.backdoor = backdoor

    def forward(self, images):
        signs = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))
        rows = images[:, 0, :4].mean((1, 2))
        return torch.stack([9 * rows, 9 - 9 * rows + self.backdoor * (images[:, 0] * signs / 16).sum((1, 2))], dim=1)


@pytest.mark.parametrize(("left", "passed"), [(60.0, False), (0.0, True)])
def test_a_trigger_spread_over_the_image_must_have_lost_its_effect_too(left, passed):
    trigger = Trigger(label=1, kind="perturbation", what="", success=Rate.of(9, 9), picture="", examples="")
    reach = Reach(label=1, sizes=[1], shares=[0.0], norm=1.0, faint=1.0, far=1.25)
    given = GIVEN.model_copy(update={"triggers": [trigger], "reaches": [reach]})
    done = resists_perturbation(Leans(60.0), Leans(left), make_dark(), given, 0)
    assert done.passed == passed
    assert "l1 norm" in done.detail
    assert "and a perturbation of l2 norm 1 " in done.detail


@triggers
@pytest.mark.parametrize("case", ["no suspect", "no other class"])
def test_without_a_label_nothing_is_verified(check, case):
    clean = make_dark()
    if case == "no other class":
        clean = clean.take(clean.labels == 1)
    given = NOBODY if case == "no suspect" else GIVEN
    assert not check(FallsForSquare(), FallsForSquare(0.0), clean, given, 0).passed


@pytest.mark.parametrize(
    ("lost", "kept", "passed"),
    [(0.02, 100, True), (0.021, 100, False), (0.0, 96, True), (0.0, 94, False), (-0.1, 94, False)],
)
def test_accuracy_counts_on_all_images_and_beyond_its_noise_on_held_out_ones(lost, kept, passed):
    before, after = torch.ones(100, dtype=torch.bool), torch.arange(100) < kept
    assert keeps_accuracy(before, after, lost, 0.02, held_out=True).passed == passed


def test_many_held_out_images_leave_less_room():
    before, after = torch.ones(2000, dtype=torch.bool), torch.arange(2000) < 1920
    assert not keeps_accuracy(before, after, 0.0, 0.02, held_out=True).passed


@pytest.mark.parametrize(("kept", "passed"), [(98, True), (97, False)])
def test_there_is_no_room_on_images_that_were_fitted_on(kept, passed):
    before, after = torch.ones(100, dtype=torch.bool), torch.arange(100) < kept
    assert keeps_accuracy(before, after, 0.0, 0.02, held_out=False).passed == passed
