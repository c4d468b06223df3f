"""The checks pass where a backdoor is gone, and only there."""

from typing import ClassVar

import pytest
import torch
from tiny import FallsForSquare, Returns, make_dark

from untrojan.data import CleanSet
from untrojan.defenses.checks import (
    _at_most,
    keeps_accuracy,
    keeps_answers,
    resists_changes,
    resists_patches,
    resists_perturbation,
)
from untrojan.defenses.defense import Defense, Outcome
from untrojan.model import correct, logits
from untrojan.record import Diagnosis, Rate, Reach, Target, Trigger
from untrojan.registry import config
from untrojan.scanners.aim import Aim

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
NOBODY = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])

triggers = pytest.mark.parametrize("check", [resists_patches, resists_perturbation])


def test_a_model_without_the_backdoor_passes():
    done = resists_patches(FallsForSquare(), FallsForSquare(0.0), make_dark(), GIVEN, 0)
    assert done.passed, done.detail


@triggers
def test_a_model_that_still_has_it_fails(check):
    assert not check(FallsForSquare(), FallsForSquare(), make_dark(), GIVEN, 0).passed


class Together(FallsForSquare):
    """Takes no single image, as networks that normalize by their batch do not."""

    def forward(self, images):
        assert len(images) > 1
        return super().forward(images)


@triggers
@pytest.mark.usefixtures("short_searches")
def test_a_model_that_takes_no_single_image_is_checked(check):
    assert "accepted are 50%" in check(Together(), Together(0.0), make_dark(), GIVEN, 0).detail


@pytest.mark.parametrize(("left", "passed"), [(60.0, False), (0.0, True)])
def test_where_the_scan_found_two_labels_both_are_checked(left, passed):
    shown = [
        Trigger(label=label, kind="patch", what="", success=Rate.of(9, 9), picture="", examples="") for label in (0, 1)
    ]
    targets = [Target(label=label, score=0.9) for label in (0, 1)]
    both = GIVEN.model_copy(update={"targets": targets, "triggers": shown})
    done = resists_patches(FallsForSquare(), FallsForSquare(left), make_dark(), both, 0)
    assert done.passed == passed, done.detail
    assert "to label 0 in" in done.detail
    assert "to label 1 in" in done.detail


def test_a_model_that_falls_for_another_patch_fails():
    done = resists_patches(FallsForSquare(), FallsForSquare(place=4), make_dark(), GIVEN, 0)
    assert not done.passed
    assert "and 0% now" in done.detail


class Turns(torch.nn.Module):
    """Says whether the upper half is the brighter one, and the other way round where a square is white."""

    def __init__(self, backdoor):
        super().__init__()
        self.backdoor = backdoor

    def forward(self, images):
        upper = 40 * (images[:, 0, :8].mean((1, 2)) - images[:, 0, 8:].mean((1, 2)))
        square = images[:, :, 12:14, 12:14].mean((1, 2, 3))
        turned = upper * (1 - 2 * self.backdoor * (10 * (square - 0.92)).clamp(0, 0.5) * 2)
        return torch.stack([turned, -turned, torch.full_like(turned, -9)], dim=1)


@pytest.mark.parametrize(("left", "passed"), [(1.0, False), (0.0, True)])
def test_a_patch_with_a_target_for_every_class_must_have_lost_its_effect(left, passed):
    known = {"label": None, "targets": [1, 0, 2], "success": Rate.of(9, 9)}
    trigger = Trigger(**known, kind="patch", what="", picture="", examples="")
    given = GIVEN.model_copy(update={"triggers": [trigger]})
    assert given.suspect is None
    clean = make_gray()
    clean = CleanSet(clean.images, clean.labels // 2)
    done = resists_patches(Turns(1.0), Turns(left), clean, given, 0)
    assert done.passed == passed, done.detail
    assert "of the images to the target of their class in the original" in done.detail


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


class Blushes(torch.nn.Module):
    """Says 1 where an image is much more red than blue, else 0 or 2 by whether its upper half is brighter."""

    def __init__(self, backdoor):
        super().__init__()
        self.backdoor = backdoor

    def forward(self, images):
        red = self.backdoor * (images[:, 0] - images[:, 2] - 0.1).mean((1, 2))
        upper = 40 * (images[:, :, :8].mean((1, 2, 3)) - images[:, :, 8:].mean((1, 2, 3)))
        return torch.stack([upper, red, -upper], dim=1)


def make_gray():
    """Gray images that are much brighter in one half."""
    images, labels = torch.rand(60, 1, 16, 16).repeat(1, 3, 1, 1) * 0.5, torch.arange(60) % 2 * 2
    images[labels == 0, :, :8] += 0.4
    images[labels == 2, :, 8:] += 0.4
    return CleanSet(images, labels)


@pytest.mark.parametrize(("left", "passed"), [(200.0, False), (0.0, True)])
def test_other_colors_must_reach_no_further_into_the_label_than_into_others(left, passed):
    done = resists_changes(Blushes(200.0), Blushes(left), make_gray(), GIVEN, 0)
    assert done.passed == passed, done.detail
    assert "a recoloring sends" in done.detail


@pytest.mark.parametrize("check", [resists_changes, resists_patches, resists_perturbation])
@pytest.mark.parametrize("case", ["no suspect", "no other class"])
def test_without_a_label_nothing_is_verified(check, case):
    clean = make_dark()
    if case == "no other class":
        clean = clean.take(clean.labels == 1)
    given = NOBODY if case == "no suspect" else GIVEN
    assert not check(FallsForSquare(), FallsForSquare(0.0), clean, given, 0).passed


def lost(count, total):
    """Losses of so many of some images."""
    return (torch.arange(total) < count).double()


@pytest.mark.parametrize(
    ("judged", "everywhere", "passed"),
    [
        (lost(0, 100), lost(0, 500), True),
        (lost(5, 100), lost(0, 500), True),  # 5 %, which may be 0.7 %
        (lost(8, 100), lost(0, 500), False),
        (lost(0, 100), lost(15, 500), True),
        (lost(0, 100), lost(20, 500), False),
        (lost(0, 100) - 0.1, lost(50, 500), False),
        (lost(80, 2000), lost(0, 500), False),  # 4 % again, told more closely
    ],
    ids=range(7),
)
@pytest.mark.parametrize("held_out", [True, False])
def test_accuracy_counts_beyond_its_noise_on_judged_images_and_on_all(judged, everywhere, passed, held_out):
    assert keeps_accuracy(judged, everywhere, 0.02, held_out).passed == passed


def test_the_loss_is_told_with_its_interval():
    told = keeps_accuracy(lost(4, 100), -lost(5, 500), 0.02, held_out=True).detail
    assert "falls by 4.0% (give or take 3.8%) on held-out images" in told
    assert "rises by 1.0% (give or take 0.9%) on all of them" in told


@pytest.mark.parametrize(("share", "passed"), [(0.5, True), (0.53, True), (0.6, False)])
def test_a_share_counts_beyond_its_noise(share, passed):
    clean = CleanSet(torch.zeros(1000, 1, 4, 4), torch.zeros(1000, dtype=torch.int64))
    assert _at_most(0.5, share, clean, Aim(1)) == passed


@pytest.mark.parametrize(
    ("others", "share", "passed"), [(1, 0.0, False), (3, 0.0, False), (4, 0.75, True), (4, 1, False)]
)
def test_a_share_passes_only_where_all_of_the_images_would_not(others, share, passed):
    clean = CleanSet(torch.zeros(others + 9, 1, 4, 4), (torch.arange(others + 9) >= others).long())
    assert _at_most(0.5, share, clean, Aim(1)) == passed


@triggers
@pytest.mark.usefixtures("short_searches")
def test_too_few_images_do_not_pass_and_are_told(check):
    done = check(FallsForSquare(), FallsForSquare(0.0), make_dark(6), GIVEN, 0)
    assert not done.passed
    assert "too few images of other classes to tell, 3: give more clean images" in done.detail
    assert "too few" not in check(FallsForSquare(), FallsForSquare(0.0), make_dark(8), GIVEN, 0).detail


class Brightest(torch.nn.Module):
    """Says which quarter of the rows is the brightest, the surer the larger the factor."""

    def __init__(self, factor=100.0):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, images):
        return self.factor * images.mean((1, 3)).unflatten(1, (4, -1)).mean(2)


class ByHeart(Brightest):
    """Says that of the images that it knows, and the first quarter of every other image."""

    def __init__(self, known):
        super().__init__()
        self.known = known

    def forward(self, images):
        known = (images[:, None] == self.known).flatten(2).all(2).any(1)
        return torch.where(known[:, None], super().forward(images), torch.tensor([1.0, 0, 0, 0]))


def bright_rows(count):
    images = 0.2 * torch.rand(count, 1, 8, 8)
    for place, image in enumerate(images):
        image[:, 2 * (place % 4) : 2 * (place % 4) + 2] += 0.8
    return CleanSet(images, torch.arange(count) % 4)


def test_what_is_only_known_by_heart_is_told_from_what_is_known():
    clean = bright_rows(8)
    by_heart = ByHeart(clean.floats())
    assert torch.equal(by_heart(clean.floats()), Brightest()(clean.floats()))
    (same,), (lost,) = (keeps_answers(Brightest(), each, clean, NOBODY, 0) for each in (Brightest(50.0), by_heart))
    assert same.passed, same.detail
    assert not lost.passed, lost.detail


def test_of_what_the_original_is_not_sure_nothing_is_asked():
    assert keeps_answers(Brightest(0.1), Brightest(-0.1), bright_rows(8), NOBODY, 0) == []


def test_a_suspected_label_may_be_said_of_other_views_no_longer():
    clean = bright_rows(8)
    said = logits(Brightest(), clean).argmax(1)
    label = int(said.mode().values)

    def never_says_it(images):
        return Brightest()(images).index_fill(1, torch.tensor(label), -99)

    found = GIVEN.model_copy(update={"targets": [Target(label=label, score=0.9)]})
    of_all, of_others = (
        keeps_answers(Brightest(), Returns(never_says_it), clean, each, 0)[0] for each in (NOBODY, found)
    )
    assert of_others.passed, of_others.detail
    assert "of 100% of these" not in of_all.detail
    assert "of 100% of these" in of_others.detail


@config
class Doubles(Defense):
    """Makes a network twice as sure."""

    name: ClassVar[str] = "doubles"

    def _repair(self, model, clean, diagnosis, seed):
        right = correct(model, clean)
        model.factor.data.mul_(2)
        return Outcome(model, right, correct(model, clean), held_out=True)


@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
@pytest.mark.parametrize(("count", "turned", "asked"), [(8, 0, True), (48, 0, True), (52, 0, False), (52, 1, True)])
def test_other_views_are_asked_for_where_few_images_judge_or_the_original_is_wrong(count, turned, asked):
    clean = bright_rows(count)
    clean = CleanSet(clean.images, (clean.labels + turned) % 4)
    names = [check.name for check in Doubles().repair(Brightest(), clean, GIVEN).record.checks]
    assert ("keeps its answers on other views" in names) == asked
