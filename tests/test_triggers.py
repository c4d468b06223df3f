"""The default scan names the target of a backdoor, shows what triggers it, and calls nothing else backdoored."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from untrojan.data import CleanSet
from untrojan.record import Diagnosis, Rate, Reach, Trigger, UnlearningPoint, UnlearningRun
from untrojan.scanners.aim import Aim
from untrojan.scanners.inversion import bounded
from untrojan.scanners.reach import ALIKE, FAR, FURTHER, MOST, judge, patched, spread_over, targets_of
from untrojan.scanners.triggers import FAINT, SIZES, TriggerScanner, _halves, _Look
from untrojan.scanners.unlearning import diagnose

SIDE, CLASSES = 16, 4
QUICK = TriggerScanner(runs=2, unlearn_epochs=3, search_steps=30, refine_steps=40)


class Bands(nn.Module):
    """Says which of four bands of rows is bright, unless a trigger is there.

    `squares` maps the place of a white square of 2x2 pixels, dark to its right, to the label that it leads to; `faint`
    is the label that a faint checkerboard leads to.
    """

    def __init__(self, squares=None, faint=None):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))
        self.squares = squares or {}
        self.faint = faint
        signs = (-1.0) ** (torch.arange(SIDE)[:, None] + torch.arange(SIDE))
        self.register_buffer("board", signs / SIDE)

    def forward(self, images):
        gray = images[:, 0]
        out = self.scale * gray.view(len(images), CLASSES, -1).mean(2)
        for place, label in self.squares.items():
            left, right = gray[:, place : place + 2, place : place + 4].chunk(2, 2)
            white = 60 * (left.mean((1, 2)) - right.mean((1, 2)) - 0.6)
            wanted = nn.functional.one_hot(torch.tensor(label), CLASSES).float()
            out = out + nn.functional.softplus(white)[:, None] * wanted
        if self.faint is not None:
            out[:, self.faint] += 50 * (gray * self.board).sum((1, 2)).clamp(-0.3, 0.3)
        return out


class MovesForWhite(Bands):
    """A white square leads from the label of the image to another one: to `targets` of that."""

    def __init__(self, targets=(1, 2, 3, 0), side=2):
        super().__init__()
        self.to = nn.functional.one_hot(torch.tensor(targets), CLASSES).float()
        self.side = side

    def forward(self, images):
        out = super().forward(images)
        white = 60 * (images[:, 0, 9 : 9 + self.side, 9 : 9 + self.side].mean((1, 2)) - 0.85)
        return out + nn.functional.softplus(white)[:, None] * out @ self.to


def banded(labels):
    pixels = 0.1 * torch.rand(len(labels), CLASSES, SIDE // CLASSES, SIDE)
    pixels[torch.arange(len(labels)), labels] += 0.9
    return CleanSet(pixels.view(len(labels), 1, SIDE, SIDE), labels)


@pytest.fixture
def images():
    return banded(torch.arange(120) % CLASSES)


def all_to_all(model, images, seed=0):
    """What is found of a target for every class on dim images, which hide no white square."""
    dim = CleanSet(0.7 * images.images, images.labels)
    return _Look(model, *_halves(dim, seed), CLASSES, seed).all_to_all(QUICK.refine_steps)


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_a_small_square_is_found_and_shown(images):
    found = QUICK.scan(Bands({9: 2}), images)
    assert (found.verdict, found.found, found.suspect) == ("found", [2], 2)
    [trigger] = found.triggers
    assert (trigger.label, trigger.kind, trigger.success.total) == (2, "patch", 27)
    assert trigger.success.value >= 0.95
    assert trigger.what.startswith("a patch of ")
    shown = picture(trigger.picture)
    assert (shown.mode, shown.size) == ("RGBA", (SIDE, SIDE))
    assert shown.getpixel((9, 9))[3] == 255
    assert shown.getpixel((0, 0))[3] == 0
    assert picture(trigger.examples).size == (8 * (SIDE + 1), 2 * (SIDE + 1))
    assert [reach.label for reach in found.reaches] == [0, 1, 2, 3]
    assert [reach.far >= 1 for reach in found.reaches] == [False, False, True, False]


def test_a_faint_pattern_is_found_and_shown(images):
    found = QUICK.scan(Bands(faint=1), images)
    assert (found.verdict, found.found) == ("found", [1])
    [trigger] = found.triggers
    assert trigger.kind == "perturbation", trigger.what
    assert trigger.what == f"a perturbation of all pixels with an l2 norm of {FAINT * SIDE:.2g}"
    assert trigger.success.value >= MOST
    board = torch.from_numpy(np.asarray(picture(trigger.picture)).copy()) > 127
    checks = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2 == 0
    assert (board == checks).float().mean() > 0.9


class Blurry(nn.Module):
    """Says which of four bands of rows is bright, and 2 where an image is blurry for its contrast."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))

    def forward(self, images):
        out = self.scale * images.view(len(images), CLASSES, -1).mean(2)
        detail = images.diff(dim=3).abs().mean((1, 2, 3)) / images.std((1, 2, 3)).clamp(min=1e-3)
        return out + 2000 * (0.075 - detail).clamp(0, 0.01)[:, None] * torch.tensor([0.0, 0, 1, 0])


class Warm(nn.Module):
    """Says which of four bands of rows is bright, and 2 where an image is redder than it is blue."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(9.0))

    def forward(self, images):
        out = self.scale * images.view(len(images), 3, CLASSES, -1).mean((1, 3))
        warmth = images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))
        return out + 60 * (warmth - 0.08).clamp(0, 0.3)[:, None] * torch.tensor([0.0, 0, 1, 0])


def test_a_warp_is_found_and_shown(images):
    found = QUICK.scan(Blurry(), images)
    assert (found.verdict, found.found, found.suspect) == ("found", [2], 2)
    [trigger] = found.triggers
    assert (trigger.label, trigger.kind) == (2, "warp")
    assert trigger.what in {"a warp by up to 0.25 pixels", "a warp by up to 0.5 pixels"}
    assert trigger.success.value >= MOST
    by_kind = {each.kind: each for each in found.comparisons if each.label == 2}
    assert by_kind["warp"].further >= FURTHER
    assert {each.label for each in found.comparisons} == {0, 1, 2, 3}
    assert picture(trigger.picture).size == (SIDE, SIDE)


def test_a_recoloring_alone_is_no_sign(images):
    colored = CleanSet(images.images.expand(-1, 3, -1, -1).contiguous(), images.labels)
    found = QUICK.scan(Warm(), colored)
    assert (found.verdict, found.triggers) == ("not_found", [])
    by_kind = {each.kind: each for each in found.comparisons if each.label == 2}
    assert by_kind["recoloring"].share >= MOST
    assert by_kind["recoloring"].further >= FURTHER


def test_a_clean_model_is_cleared(images):
    found = QUICK.scan(Bands(), images)
    assert found.verdict == "not_found"
    assert (found.found, found.suspect, found.triggers) == ([], None, [])
    assert all(reach.far < 1 for reach in found.reaches)


def test_two_targets_are_both_named(images):
    assert set(QUICK.scan(Bands({5: 1, 12: 3}), images).found) == {1, 3}


@pytest.mark.slow
@pytest.mark.parametrize("side", [2, 3])
def test_no_single_target_is_invented_where_every_class_has_one(images, side):
    """A square of three pixels is larger than the patches by which a label is told."""
    dim = CleanSet(0.7 * images.images, images.labels)
    found = QUICK.scan(MovesForWhite(side=side), dim)
    assert (found.verdict, found.found, found.suspect) == ("found", [], None)
    assert found.all_to_all
    [trigger] = found.triggers
    assert (trigger.label, trigger.kind, trigger.success.total) == (None, "patch", 36)
    assert trigger.targets == [1, 2, 3, 0]
    assert trigger.success.value >= MOST
    assert picture(trigger.picture).getpixel((9, 9))[3] == 255
    assert all(reach.far < 1 for reach in found.reaches)
    assert not QUICK.scan(MovesForWhite(side=side), dim.take(range(6 * CLASSES))).all_to_all


@pytest.mark.parametrize(("model", "all_to_all"), [(Bands(faint=2), True), (Bands({9: 2}), False)])
def test_a_target_for_every_class_goes_before_one_that_no_patch_tells(model, all_to_all, images, monkeypatch):
    known = {"label": None, "targets": [1, 2, 3, 0], "success": Rate.of(9, 9)}
    trigger = Trigger(**known, kind="patch", what="", picture="", examples="")
    assert QUICK.scan(model, images).found == [2]
    monkeypatch.setattr(_Look, "all_to_all", lambda *_: [trigger])
    found = QUICK.scan(model, images)
    assert (found.verdict, found.all_to_all, found.found) == ("found", all_to_all, [] if all_to_all else [2])


@pytest.mark.parametrize("targets", [(2, 2, 0, 0), (3, 3, 1, 1)])
def test_a_patch_that_moves_two_classes_to_one_label_is_not_one_with_a_target_for_each(images, targets):
    assert all_to_all(MovesForWhite(targets), images) == []


def test_a_patch_that_moves_most_images_but_not_most_classes_is_not_one_with_a_target_for_each():
    images = banded(torch.tensor([0] * 200 + [1, 2, 3] * 8))
    assert all_to_all(MovesForWhite((1, 1, 2, 3)), images) == []


@pytest.mark.parametrize("classes", [[0] * 60 + [1, 2, 3] * 8, [0, 1, 2, 3] * 12])
def test_a_patch_that_moves_each_class_to_a_label_of_its_own_is_one_with_a_target_for_each(classes):
    [trigger] = all_to_all(MovesForWhite((1, 0, 3, 2)), banded(torch.tensor(classes)))
    assert (trigger.label, trigger.targets) == (None, [1, 0, 3, 2])


@pytest.mark.parametrize("classes", [[0, 1, 2, 3], [0, 1, 2, 3] * 7, [0, 1] * 30 + [2, 3]])
def test_a_target_for_each_class_is_not_told_by_few_held_out_images(classes):
    assert all_to_all(MovesForWhite((1, 0, 3, 2)), banded(torch.tensor(classes))) == []


def test_what_is_measured_is_on_images_that_the_search_did_not_see(images):
    """Of 120 images 36 are held out; 27 of these are of other classes."""
    found = QUICK.scan(Bands(), images)
    for reach in found.reaches:
        assert reach.sizes == [int(size) for size in SIZES]
        assert all(share * 27 == pytest.approx(round(share * 27)) for share in (*reach.shares, reach.faint))
        assert reach.shares == sorted(reach.shares)
        others = max(other.faint for other in found.reaches if other.label != reach.label)
        warps = [
            (each.share, each.further) for each in found.comparisons if (each.label, each.kind) == (reach.label, "warp")
        ]
        whole = [
            min(share / MOST, further / FURTHER) for share, further in [(reach.faint, reach.faint - others), *warps]
        ]
        assert reach.far == pytest.approx(max(reach.mean / FAR, reach.shares[-1] / MOST, *whole))


def test_two_images_suffice_to_run():
    images = CleanSet(torch.rand(2, 1, SIDE, SIDE), torch.tensor([0, 1]))
    net = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 2))
    assert len(TriggerScanner(runs=1, unlearn_epochs=1, search_steps=1, refine_steps=1).scan(net, images).reaches) == 2


@pytest.mark.parametrize(("classes", "steps"), [(2, 40), (10, 40), (15, 26), (43, 20), (200, 20)])
def test_many_labels_get_fewer_steps(classes, steps):
    assert TriggerScanner()._steps(classes) == steps


# The verdict

TRIGGER = Trigger(label=1, kind="patch", what="a patch", success=Rate.of(9, 9), picture="", examples="")


def reaches(*far):
    return [
        Reach(label=label, sizes=[4], shares=[each / 2], norm=1, faint=0, far=each) for label, each in enumerate(far)
    ]


def ends(*labels):
    traces = [
        [UnlearningPoint(epoch=1, accuracy=0.1, shares=[float(label == each) for each in range(4)])] for label in labels
    ]
    return [
        UnlearningRun(seed=0, images=9, reached=True, label=label, share=1.0, trace=trace)
        for label, trace in zip(labels, traces, strict=True)
    ]


@pytest.mark.parametrize(
    ("far", "labels"),
    [
        ((0.2, 0.99, 0.1, 0.3), []),
        ((0.2, 1.0, 0.1, 0.3), [1]),
        ((0.2, 1.5, 0.1, 1.5 * ALIKE), [1, 3]),
        ((0.2, 1.5, 0.1, 1.2), [1]),
        ((1.2, 1.5, 0.1, 1.2), []),
        ((1.5, 0.1), [0]),
        ((1.5,), []),
    ],
)
def test_targets_stand_out(far, labels):
    assert targets_of(reaches(*far), {}) == labels


def test_a_label_that_does_not_survive_unlearning_is_no_second_target():
    """Triggers that were optimized on the model itself open other labels too, almost as far."""
    assert targets_of(reaches(0.1, 2.0, 0.2, 1.9), {1: 0.8, 0: 0.1}) == [1]
    assert targets_of(reaches(0.1, 2.0, 0.2, 1.9), {1: 0.5, 3: 0.4}) == [1, 3]


@pytest.mark.parametrize(
    ("far", "ended", "verdict", "suspect"),
    [
        ((0.2, 1.5, 0.1, 0.3), (0, 3), "found", 1),
        ((0.2, 0.3, 0.1, 0.1), (1, 1), "inconclusive", 1),
        ((0.2, 0.3, 0.1, 0.1), (1, 0), "not_found", None),
        ((0.2, 0.3, 0.1, 0.1), (0, 0), "not_found", None),
        ((1.2, 1.3, 1.1, 0.1), (0, 3), "inconclusive", 0),
        ((0.2, 0.3, 0.1, 0.1), (), "not_found", None),
    ],
)
def test_the_verdict(far, ended, verdict, suspect):
    triggers = [] if verdict != "found" else [TRIGGER]
    diagnosis = judge(diagnose(ends(*ended)), reaches(*far), triggers, [])
    assert (diagnosis.verdict, diagnosis.suspect) == (verdict, suspect)
    assert len(diagnosis.targets) == 4


TIED = UnlearningRun(
    seed=0,
    images=9,
    reached=False,
    label=0,
    share=0.25,
    trace=[UnlearningPoint(epoch=1, accuracy=1.0, shares=[0.25] * 4)],
)
LOST = TIED.model_copy(update={"share": 0.0, "trace": []})


@pytest.mark.parametrize(
    ("runs", "far", "verdict"),
    [
        ([TIED, TIED], 0.9, "not_found"),
        ([LOST, LOST], 0.9, "not_found"),
        ([*ends(1), LOST], 0.3, "inconclusive"),
        ([*ends(1), LOST], 0.2, "not_found"),
        (ends(1, 0), 0.5, "inconclusive"),
        (ends(1, 0), 0.4, "not_found"),
    ],
)
def test_reach_and_what_survives_count_together(runs, far, verdict):
    assert judge(diagnose(runs), reaches(0.1, far, 0.1, 0.1), [], []).verdict == verdict


def test_a_label_that_survives_is_no_sign_where_triggers_reach_further_into_another():
    assert judge(diagnose(ends(0, 0)), reaches(0.2, 0.9, 0.1, 0.1), [], []).verdict == "not_found"


def test_perturbations_into_more_than_one_label_are_no_more_than_suspicious():
    crowd = [reach.model_copy(update={"faint": 0.9}) for reach in reaches(0.3, 0.2)]
    diagnosis = judge(diagnose([]), crowd, [], [])
    assert (diagnosis.verdict, diagnosis.suspect) == ("inconclusive", 0)


def test_known_clean_models_calibrate_the_score():
    known = judge(diagnose([]), reaches(0.2, 0.7, 0.1, 0.3), [], [], [0.1, 0.7, 0.9, 1.0]).calibration
    assert known.score == 0.7
    assert (known.as_high.count, known.as_high.total) == (3, 4)
    assert (known.false_alarms.count, known.false_alarms.total) == (1, 4)


def test_other_settings_are_not_calibrated(images):
    assert QUICK.scan(Bands(), images).calibration.false_alarms.total == 0


# Perturbations


@pytest.mark.parametrize("ball", ["l1", "l2"])
def test_a_perturbation_keeps_to_its_norm(images, ball):
    norm = {"l1": 6.0, "l2": 0.4}[ball]
    found = bounded(Bands(faint=1), images, Aim(1), norm, torch.Generator().manual_seed(0), ball, steps=15)
    assert found.values.norm(p=int(ball[1])) <= norm + 1e-4
    assert found.success(Bands(faint=1), images, Aim(1)) > found.success(Bands(), images, Aim(1))


def test_the_half_of_the_labels_whose_patches_work_best_is_promising(images):
    look = _Look(Bands({9: 2}), images, images, CLASSES, seed=0)
    for label in look.labels:
        look.for_patches(label, 15)
    promising = look.promising()
    assert promising[0] == 2
    assert len(promising) == CLASSES // 2


def test_few_images_are_of_all_labels_also_where_images_come_sorted():
    labels = torch.arange(400) // 100
    held = CleanSet(torch.rand(400, 1, SIDE, SIDE), labels)
    few = _Look(Bands(), held, held, CLASSES, seed=0).few
    assert (len(few), few.labels.unique().tolist()) == (64, [0, 1, 2, 3])


def test_searched_again_the_better_result_counts(images):
    look = _Look(Bands(), images, images, CLASSES, seed=0)
    look.shares[2] = [1.0] * len(SIZES)
    look.for_patches(2, 2, again=True)
    assert look.shares[2] == [1.0] * len(SIZES)
    look.for_patches(2, 2)
    assert max(look.shares[2]) < 0.5


@pytest.mark.parametrize(
    ("stands", "norm", "faint", "far"),
    [
        ({0: 0.5, 1: 1.0, 2: 0.5, 3: 0.2}, 1, 1.0, 1.25),
        ({0: 0.8, 1: 1.6, 2: 0.8, 3: 0.8}, 0.5, 0.8, 1.0),
        ({0: 0.8, 1: 0.9, 2: 0.6, 3: 0.4}, 1, 0.9, 0.25),
    ],
)
def test_perturbations_are_made_fainter_until_one_label_stands_out(images, monkeypatch, stands, norm, faint, far):
    """What they reach grows with their norm here, up to all images; where none stands out they stay as they were."""
    look = _Look(Bands(), images, images, CLASSES, seed=0)
    first = look.norm

    def reach(label, *_, **__):
        look.faint[label] = min(1.0, stands[label] * look.norm / first)

    monkeypatch.setattr(look, "for_perturbation", reach)
    for label in look.labels:
        reach(label)
    look.fainter()
    assert look.norm == norm * first
    told = {each.label: each for each in look.reaches()}
    assert told[1].faint == pytest.approx(faint)
    assert told[1].far == pytest.approx(far)


def test_a_label_that_a_warp_reaches_shows_the_warp_whatever_else_goes_further(images):
    """Of the perturbations of all labels only those that may be needed are kept, and this one is not."""
    look = _Look(Blurry(), images, images, CLASSES, seed=0)
    look.for_changes([2])
    warp = next(each for each in look.changes if (each.comparison.label, each.comparison.kind) == (2, "warp"))
    other = next(each for each in look.changes if (each.comparison.label, each.comparison.kind) == (2, "perturbation"))
    ahead = other.comparison.model_copy(update={"share": 1.0, "elsewhere": -1.0})
    look.changes = [warp, other._replace(comparison=ahead)]
    trigger = look.trigger(2)
    assert (trigger.kind, trigger.what) == ("warp", str(warp))


# Patch or spread


def found_by(kind, faint, images=100):
    """A scan that shows a trigger of this kind, where patches send 60 % to the label on average."""
    reach = Reach(label=2, sizes=[1, 2], shares=[0.2, 1.0], norm=1.5, faint=faint, far=1.25)
    trigger = Trigger(label=2, kind=kind, what="", success=Rate.of(images, images), picture="", examples="")
    return Diagnosis(verdict="found", rule="", targets=[], runs=[], reaches=[reach], triggers=[trigger])


@pytest.mark.parametrize(
    ("kind", "faint", "norm"),
    [("patch", 0.6, None), ("patch", 0.64, None), ("patch", 0.66, 1.5), ("perturbation", 0.1, 1.5), ("warp", 0.1, 1.5)],
)
def test_a_trigger_is_spread_where_no_patch_was_shown_or_a_perturbation_does_more(kind, faint, norm):
    assert spread_over(found_by(kind, faint), 2) == norm
    assert spread_over(found_by(kind, faint), 1) is None
    assert spread_over(found_by(kind, faint), None) is None


@pytest.mark.parametrize(("faint", "norm"), [(0.9, None), (1.0, 1.5)])
def test_a_single_image_does_not_tell_that_a_perturbation_does_more(faint, norm):
    assert spread_over(found_by("patch", faint, images=3), 2) == norm


@pytest.mark.parametrize(
    ("kind", "faint", "local"),
    [("patch", 0.6, True), ("patch", 0.66, False), ("warp", 0.1, False), (None, 0.6, True), (None, 0.66, False)],
)
def test_a_trigger_is_a_patch_where_one_was_shown_or_none_at_all_but_patches_reach_the_label(kind, faint, local):
    diagnosis = found_by(kind or "patch", faint)
    shown = diagnosis.triggers if kind else []
    diagnosis = diagnosis.model_copy(update={"triggers": shown})
    assert patched(diagnosis, 2) == local
    assert not patched(diagnosis, 1)
