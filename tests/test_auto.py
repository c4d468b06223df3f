"""auto removes a backdoor that it is not told of, and keeps what the model knows."""

import copy

import pytest
import torch
from tiny import backdoored, build, make_clean
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses.auto import (
    Auto,
    _distracted,
    _noise,
    _Triggers,
)
from untrojan.errors import UnreliableWarning
from untrojan.model import correct, logits
from untrojan.progress import Lines, reporting
from untrojan.record import Comparison, Diagnosis, Rate, Target, Trigger
from untrojan.scanners.aim import Aim
from untrojan.scanners.inversion import Perturbation
from untrojan.scanners.patches import Patches

TARGET = 3
GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=TARGET, score=0.9)], runs=[])
NOBODY = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])


def with_square(clean, target=TARGET, where=slice(6, 8)):
    """Images of other classes than the target, if there is one, with the square that the attacker planted."""
    others = clean if target is None else clean.take(clean.labels != target)
    images = others.floats()
    images[:, :, where, where] = 1
    return CleanSet(images, others.labels)


def patch_for(label, targets=()):
    shown = {"kind": "patch", "what": "", "picture": "", "examples": ""}
    return Trigger(label=label, targets=list(targets), success=Rate.of(9, 9), **shown)


class Falls(nn.Module):
    """Falls for everything, or for nothing."""

    def __init__(self, falls):
        super().__init__()
        self.falls = falls

    def forward(self, images):
        return torch.tensor([[0.0, 9.0 if self.falls else -9.0]]).expand(len(images), -1)


def triggers(count=3):
    made = _Triggers(Aim(1), (3, 8, 8), 0.5, torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2, 2, 3, 3]]).repeat(count, 1)
    found = Patches(torch.rand(2, 3, 8, 8), boxes, torch.zeros(count, dtype=torch.int64), torch.ones(count))
    made.add(found, found.at(found.keys[:1]))
    made.choose(Falls(False), CleanSet(torch.rand(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)))
    made.faint.append(Perturbation(torch.full((3, 8, 8), 0.01), 1.92))
    return made


def reached(kind, share, elsewhere):
    return Comparison(label=1, kind=kind, share=share, elsewhere=elsewhere)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_a_planted_square_loses_its_effect():
    net, clean = backdoored(TARGET)
    stamped = with_square(clean)
    assert (logits(net, stamped).argmax(1) == TARGET).double().mean() > 0.9
    rest, held = clean.split(0.5, 0)
    repaired = Auto(rounds=1, search_steps=60).tune(copy.deepcopy(net), rest, held, GIVEN, seed=0)
    assert (logits(repaired, stamped).argmax(1) == TARGET).double().mean() < 0.1
    assert correct(repaired, stamped).double().mean() > 0.8
    assert correct(net, held).double().mean() - correct(repaired, held).double().mean() <= 0.03


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_two_squares_lose_their_effect_where_the_scan_found_both_labels():
    net, clean = backdoored(TARGET, second=0)
    rest, held = clean.split(0.5, 0)
    targets = [Target(label=label, score=1) for label in (TARGET, 0)]
    shown = [patch_for(label) for label in (TARGET, 0)]
    given = Diagnosis(verdict="found", rule="given", targets=targets, runs=[], triggers=shown)
    repaired = Auto(rounds=2, search_steps=60).tune(copy.deepcopy(net), rest, held, given, seed=0)
    for label, where in ((TARGET, slice(6, 8)), (0, slice(0, 2))):
        stamped = with_square(clean, label, where)
        assert (logits(net, stamped).argmax(1) == label).double().mean() > 0.9
        assert (logits(repaired, stamped).argmax(1) == label).double().mean() < 0.1
        assert correct(repaired, stamped).double().mean() > 0.8
    assert correct(net, held).double().mean() - correct(repaired, held).double().mean() <= 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_a_square_that_leads_each_class_to_the_next_loses_its_effect():
    net, clean = backdoored(None)
    stamped = with_square(clean, None)

    def led(model):
        return (logits(model, stamped).argmax(1) == (stamped.labels + 1) % 10).double().mean()

    assert led(net) > 0.8
    rest, held = clean.split(0.5, 0)
    shown = patch_for(None, [(label + 1) % 10 for label in range(10)])
    given = Diagnosis(verdict="found", rule="given", targets=[], runs=[], triggers=[shown])
    repaired = Auto(rounds=4, steps=128, search_steps=60).tune(copy.deepcopy(net), rest, held, given, seed=0)
    assert led(repaired) < 0.2
    assert correct(net, held).double().mean() - correct(repaired, held).double().mean() <= 0.05


@pytest.mark.usefixtures("short_searches")
@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_with_a_target_for_every_class_patches_are_unlearned_and_checked():
    net, clean = build("batchnorm"), make_clean()
    given = Diagnosis(verdict="found", rule="given", targets=[], runs=[], triggers=[patch_for(None, (1, 2, 3, 0))])
    done = Auto(rounds=1, steps=2, search_steps=2, budget=0.99).repair(net, clean, given)
    assert done.record.values_changed
    assert [check.name for check in done.record.checks] == ["keeps clean accuracy", "resists recovered patches"]


@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_running_statistics_stay():
    net, clean = build("batchnorm"), make_clean()
    repaired = Auto(rounds=1, steps=2, search_steps=2).tune(copy.deepcopy(net), clean, clean, GIVEN, seed=0)
    before, after = dict(net.named_buffers()), dict(repaired.named_buffers())
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(not torch.equal(one, other) for one, other in zip(net.parameters(), repaired.parameters(), strict=True))


@pytest.mark.usefixtures("short_searches")
@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_rounds_and_updates_are_told_as_they_go(capsys):
    net, clean = build("batchnorm"), make_clean()
    with reporting(Lines(every=0, quick=0)):
        Auto(rounds=2, steps=20, search_steps=2).tune(net, clean, clean, GIVEN, seed=0)
    told = [line.partition(", ")[0].partition(" in ")[0] for line in capsys.readouterr().err.splitlines()]
    of_interest = [line for line in told if line.startswith(("auto", "unlearn triggers round 2/2"))]
    assert of_interest == [
        "auto: 1 of 2",
        "unlearn triggers round 2/2: 1 of 3",
        "unlearn triggers round 2/2: 2 of 3",
        "unlearn triggers round 2/2: done",
        "auto: done",
    ]


@pytest.mark.parametrize("case", ["no suspect", "no other class"])
def test_without_a_label_nothing_is_done(case):
    net, clean = build("plain"), make_clean()
    if case == "no other class":
        clean = clean.take(clean.labels == TARGET)
    before = copy.deepcopy(net.state_dict())
    with pytest.warns(UnreliableWarning, match="no label"):
        out = Auto().tune(net, clean, clean, NOBODY if case == "no suspect" else GIVEN, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in out.state_dict().items())


@pytest.mark.parametrize("falls", [True, False])
def test_what_works_is_remembered(falls):
    made = triggers()
    images = torch.rand(64, 3, 8, 8)
    carriers = made.put_on(images, torch.zeros(64, dtype=torch.int64), Falls(falls))
    assert carriers.shape == images.shape
    assert carriers.min() >= 0
    assert carriers.max() <= 1
    assert len(made.now) == len(made.patches.boxes) == len(made.patches.which) == len(made.patches.strength)
    if falls:
        assert len(made.now) > 4
        assert (made.now > 0.9).all()
    else:
        assert len(made.now) == 4
        assert (made.now < 0.6).all()


class FallsForWhite(nn.Module):
    """The surer of 1 the more of the image is white."""

    def forward(self, images):
        white = (images > 0.99).double().mean((1, 2, 3))
        return torch.stack([0 * white, 60 * white - 4], 1)


def pinned(*sides):
    """A round with white squares, each of a pattern of its own, all of which climbing led to."""
    patterns = torch.stack([0.995 + torch.full((3, 8, 8), 1e-3 * number) for number in range(len(sides))])
    boxes = torch.tensor([[side, side, 0, 0] for side in sides])
    found = Patches(patterns, boxes, torch.arange(len(sides)), torch.ones(len(sides)))
    return found, found.at(found.keys)


def test_what_works_best_is_tried_on_every_image_and_half_of_it_is_of_the_first_round():
    made = _Triggers(Aim(1), (3, 8, 8), 0.5, torch.Generator().manual_seed(0))
    clean = CleanSet(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64))

    def sides():
        return sorted(made.patches.boxes[made.always, 0].tolist())

    made.add(*pinned(1, 2, 3, 4, 5))
    made.choose(FallsForWhite(), clean)
    assert sides() == [2, 3, 4, 5]
    made.add(*pinned(6, 7, 8))
    made.choose(FallsForWhite(), clean)
    assert sides() == [3, 4, 6, 7]


def test_patches_of_one_pattern_are_tried_once():
    made = _Triggers(Aim(1), (3, 8, 8), 0.5, torch.Generator().manual_seed(0))
    found, surest = pinned(2, 3)
    made.add(found, surest._replace(which=torch.zeros(2, dtype=torch.int64)))
    made.choose(FallsForWhite(), CleanSet(torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.int64)))
    assert made.patches.boxes[made.always, 0].tolist() == [3]


def test_three_quarters_carry_a_patch_and_the_others_a_perturbation():
    images = torch.rand(400, 3, 8, 8) * 0.5
    changed = (triggers().put_on(images, torch.zeros(400, dtype=torch.int64), Falls(False)) - images).abs() > 1e-6
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[2:6, 2:6] = True
    outside = changed[:, :, ~inside].any(2).any(1)
    assert outside[:100].all()
    assert not outside[100:].any()
    assert changed[100:].any(3).any(2).any(1).double().mean() > 0.9


def test_a_trigger_that_may_be_spread_is_met_by_changes_and_distractions():
    made = triggers()
    made.weigh([reached("perturbation", 0.9, 0.9), reached("warp", 0.8, 0.1), reached("recoloring", 0.1, 0.3)], True)
    assert made.spread
    assert made.shares.sum() == pytest.approx(0.75)
    assert made.shares.argmax() == 1
    assert made.shares[0] == made.shares[2] > 0
    images = torch.rand(64, 3, 8, 8)
    carriers = made.put_on(images, torch.zeros(64, dtype=torch.int64), Falls(False))
    assert carriers.shape == images.shape
    assert carriers.min() >= 0
    assert carriers.max() <= 1
    assert not any(torch.equal(carrier, image) for carrier, image in zip(carriers[:48], images[:48], strict=True))


def test_of_two_images_none_is_left_for_a_patch():
    made = triggers()
    made.weigh([reached("perturbation", 0.9, 0.9), reached("warp", 0.8, 0.1), reached("recoloring", 0.1, 0.3)], True)
    images = torch.rand(2, 3, 8, 8)
    assert made.put_on(images, torch.zeros(2, dtype=torch.int64), Falls(False)).shape == images.shape


@pytest.mark.parametrize("local", [True, False])
def test_a_patch_that_was_recovered_is_met_by_patches(local):
    made = triggers()
    made.weigh([reached("perturbation", 0.9, 0.1), reached("warp", 0.1, 0.1), reached("recoloring", 0.9, 0.3)], local)
    assert made.spread != local


@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
@pytest.mark.parametrize("spread", [True, False])
def test_few_images_are_varied_but_not_what_carries_changes_of_the_whole_image(spread, monkeypatch):
    shown = []

    def put_on(self, images, *rest):
        shown.extend(images)
        return original(self, images, *rest)

    original = _Triggers.put_on
    monkeypatch.setattr(_Triggers, "put_on", put_on)
    clean = make_clean()
    given = GIVEN if spread else GIVEN.model_copy(update={"triggers": [patch_for(TARGET)]})
    Auto(rounds=1, steps=2, search_steps=2, augment="none").tune(build("plain"), clean, clean, given, seed=0)
    as_they_are = torch.stack([(clean.floats() == each).flatten(1).all(1).any() for each in shown]).double().mean()
    assert as_they_are == 1 if spread else as_they_are < 0.25


def test_distractions_lay_something_over_half_of_the_images():
    images = torch.full((400, 3, 8, 8), 0.5)
    others = torch.rand(400, 3, 8, 8)
    changed = (_distracted(images, others, torch.Generator().manual_seed(0)) - images).abs().amax((1, 2, 3))
    assert (changed > 0).double().mean() == pytest.approx(0.5, abs=0.1)
    assert 0.1 < changed.max() <= 0.35 * 0.5


def test_noise_is_coarse_or_fine_and_always_an_image():
    generator = torch.Generator().manual_seed(0)
    made = torch.stack([_noise(torch.Size([3, 8, 6]), generator) for _ in range(60)])
    assert made.shape == (60, 3, 8, 6)
    assert 0 <= made.min() < made.max() <= 1
    spread = made.std((2, 3)).amax(1)
    assert (spread < 1e-6).any()
    assert (spread > 0.1).any()


@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_divergence_leaves_a_working_model():
    net, clean = build("batchnorm"), make_clean()
    repaired = Auto(rounds=2, steps=3, search_steps=2, lr=1e30).tune(copy.deepcopy(net), clean, clean, GIVEN, seed=0)
    assert logits(repaired, clean).isfinite().all()
