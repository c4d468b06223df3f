import copy
import errno
import random
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass
from tiny import CLASSES, NETS, Counts, RaisesAt, Snapshot, backdoored, build, make_clean, train
from torch import nn

import untrojan
from untrojan.data import CleanSet
from untrojan.defenses.defense import Defense, Outcome
from untrojan.defenses.rnp import RNP
from untrojan.errors import ConfigError, DataError, ModelError, NoEffectWarning, UnreliableWarning
from untrojan.mask import Mask
from untrojan.model import correct, logits
from untrojan.record import Diagnosis, Record, Target
from untrojan.registry import describe, discover, make
from untrojan.sources.files import Checkpoint, restore, save_state, state_sha256

pytestmark = pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")

DEFENSES = discover("untrojan.defenses", Defense)
QUICK = {"rnp": {"select": "count", "count": 2, "unlearn_epochs": 2, "recover_epochs": 2}}
GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
FILES = {"repaired.safetensors", "changes.safetensors", "report.html", "record.json"}

methods = pytest.mark.parametrize(
    "method", [make(cls, QUICK.get(name, {})) for name, cls in DEFENSES.items()], ids=list(DEFENSES)
)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@cache
def done(name):
    """A repair to look at; nobody changes it."""
    return make(DEFENSES[name], QUICK.get(name, {})).repair(build("batchnorm"), make_clean(), GIVEN)


named = pytest.mark.parametrize("name", DEFENSES)


# The contract of every method


@methods
def test_the_caller_sees_no_change_and_the_repair_is_whole(net, clean, method):
    next(net.children()).train()
    net.register_forward_hook(lambda *_: None)
    before = Snapshot(net)
    repair = method.repair(net, clean, GIVEN, seed=3)
    before.assert_same()

    plain = copy.deepcopy(net)
    assert list(repair.model.state_dict()) == list(before.state)
    plain.load_state_dict(repair.model.state_dict())
    assert torch.equal(logits(plain, clean), logits(repair.model, clean))
    assert type(repair.model) is type(net)
    assert [module.training for module in repair.model.modules()] == [module.training for module in net.modules()]
    assert [v.requires_grad for v in repair.model.parameters()] == [v.requires_grad for v in net.parameters()]

    record = repair.record
    assert Record.model_validate_json(record.to_json()) == record
    assert record.method.fields == describe(method)
    assert (record.seed, record.model.classes, record.clean.per_class) == (3, CLASSES, [8] * CLASSES)
    assert record.model.state_sha256 == state_sha256(net.state_dict())
    assert record.repaired.state_sha256 == state_sha256(repair.model.state_dict())
    assert record.before.accuracy.value == correct(net, clean).float().mean()
    assert repr(repair) == f"Repair({record.status}: {record.reason})"


@methods
def test_same_seed_same_repair_whatever_the_random_state(net, clean, method):
    one = method.repair(net, clean, GIVEN, seed=5)
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    other = method.repair(net, clean, GIVEN, seed=5)
    assert same(one.model.state_dict(), other.model.state_dict())
    varying = {"seconds": {}, "peak_memory_bytes": 0}
    assert one.record.model_copy(update=varying) == other.record.model_copy(update=varying)


@methods
@pytest.mark.parametrize("at", [1, 2, 5, 11])
@pytest.mark.parametrize("name", ["batchnorm", "dropout", "vit", "shared"])
def test_the_caller_sees_no_change_when_a_layer_raises(clean, method, name, at):
    net = build(name)
    list(net.modules())[2].register_forward_hook(RaisesAt(at))
    before = Snapshot(net)
    with pytest.raises((ArithmeticError, ModelError), match="on purpose"):
        method.repair(net, clean, GIVEN)
    before.assert_same()


@methods
def test_a_network_that_changes_itself_is_not_called(clean, method):
    net = Counts()
    before = Snapshot(net)
    method.repair(net, clean, GIVEN)
    before.assert_same()


@methods
def test_methods_look_for_themselves(clean, method):
    net = train(build("batchnorm"), clean, epochs=3)
    repair = method.repair(net, clean)
    assert repair.record.diagnosis is not None
    assert repair.record.status in ("repaired", "nothing_to_repair", "failed")
    unchanged = same(repair.model.state_dict(), net.state_dict())
    assert unchanged == (repair.record.units_changed == 0)


@methods
def test_method_round_trip(method):
    assert make(type(method), describe(method)) == method
    assert untrojan.repair.__module__ == "untrojan"
    with pytest.raises(AttributeError):
        method.name = "other"


@methods
@pytest.mark.parametrize(
    ("clean", "error", "text"),
    [
        (make_clean(shape=(1, 8, 8)), ModelError, "cannot take images of 1x8x8"),
        (make_clean(classes=3), DataError, "no image of class 3"),
        (make_clean(1), DataError, "at least 2 clean images"),
        (make_clean(40, classes=5), DataError, "labels go up to 4"),
    ],
)
def test_what_cannot_be_repaired(method, clean, error, text):
    with pytest.raises(error, match=text):
        method.repair(build("plain"), clean)


@methods
def test_nan_weights_are_refused(method, clean):
    net = build("plain")
    net[0].bias.data[0] = float("nan")
    with pytest.raises(ModelError, match=r"NaN or infinity: 0\.bias"):
        method.repair(net, clean)


def test_the_function_is_the_method(clean):
    method = make(RNP, QUICK["rnp"])
    one = untrojan.repair(build("plain"), clean, method=method, diagnosis=GIVEN, seed=2)
    assert same(one.model.state_dict(), method.repair(build("plain"), clean, GIVEN, 2).model.state_dict())


# Files


def listing(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


@named
def test_saved_files(tmp_path, name):
    repair = done(name)
    folder = tmp_path / "deep" / "er" / "run"
    repair.save(folder)
    assert set(listing(folder)) == FILES
    assert set(listing(folder.parent)) == {"run"}

    checkpoint = Checkpoint.read(folder / "repaired.safetensors")
    assert same(checkpoint.tensors, repair.model.state_dict())
    assert torch.equal(logits(checkpoint.into(build("batchnorm")), make_clean()), logits(repair.model, make_clean()))
    assert same(restore(checkpoint.tensors, folder / "changes.safetensors"), build("batchnorm").state_dict())

    saved = Record.load(folder / "record.json")
    assert (saved.repaired.path, saved.repaired.sha256) == ("repaired.safetensors", checkpoint.sha256)
    assert saved.model_copy(update={"repaired": repair.record.repaired}) == repair.record
    assert repair.record.method.name in (folder / "report.html").read_text()


def test_source_gives_keys_and_types(tmp_path, clean):
    net = build("batchnorm")
    tensors = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    del tensors["1.num_batches_tracked"]
    save_state(tmp_path / "half.safetensors", tensors)
    source = Checkpoint.read(tmp_path / "half.safetensors")
    repair = make(RNP, QUICK["rnp"]).repair(source.into(net), clean, GIVEN, source=source)
    assert (repair.record.model.path, repair.record.model.sha256) == (source.path, source.sha256)
    assert repair.record.model.state_sha256 == state_sha256(source.tensors)
    repair.save(tmp_path / "run")
    child = Checkpoint.read(tmp_path / "run" / "repaired.safetensors").tensors
    assert {name: value.dtype for name, value in child.items()} == {n: v.dtype for n, v in source.tensors.items()}
    assert same(restore(child, tmp_path / "run" / "changes.safetensors"), source.tensors)


def test_what_is_saved_is_what_came_out(tmp_path, clean):
    net = build("batchnorm")
    repair = make(RNP, QUICK["rnp"]).repair(net, clean, GIVEN)
    for model in (net, repair.model):
        with torch.no_grad():
            for value in model.state_dict().values():
                value.zero_()
    repair.save(tmp_path / "run")
    child = Checkpoint.read(tmp_path / "run" / "repaired.safetensors").tensors
    assert state_sha256(child) == repair.record.repaired.state_sha256
    assert same(restore(child, tmp_path / "run" / "changes.safetensors"), build("batchnorm").state_dict())


def test_an_empty_folder_is_taken(tmp_path):
    done("rnp").save(tmp_path)
    assert set(listing(tmp_path)) == FILES


def test_folders_that_hold_something(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "record.json").write_text("old")
    before = listing(tmp_path)
    with pytest.raises(ConfigError, match="is not empty; give another folder, or --force"):
        done("rnp").save(tmp_path)
    assert listing(tmp_path) == before
    done("rnp").save(tmp_path, force=True)
    assert set(listing(tmp_path)) == FILES | {"notes.txt"}
    assert listing(tmp_path)["notes.txt"] == b"mine"
    assert Record.load(tmp_path / "record.json").seed == done("rnp").record.seed


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("mine")
    for force in (False, True):
        with pytest.raises(ConfigError, match="run is a file; give a folder to write into"):
            done("rnp").save(tmp_path / "run", force)
    assert listing(tmp_path) == {"run": b"mine"}


@pytest.mark.parametrize("there", ["nothing", "empty", "a run"])
@pytest.mark.parametrize("broken", ["sources.files.write_atomic", "defenses.defense.write_atomic", "report.render"])
def test_nothing_stays_behind_when_writing_fails(tmp_path, monkeypatch, there, broken):
    folder = tmp_path / "run"
    if there == "empty":
        folder.mkdir()
    if there == "a run":
        done("rnp").save(folder)
        (folder / "notes.txt").write_text("mine")
        (folder / "record.json").write_text("old")
    before = listing(tmp_path), listing(folder) if folder.exists() else None

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"untrojan.{broken}", fail)
    with pytest.raises(OSError, match="No space left"):
        done("rnp").save(folder, force=True)
    assert (listing(tmp_path), listing(folder) if folder.exists() else None) == before


# What the base does for a method


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Rude(Defense):
    """Breaks one rule of the house."""

    name: ClassVar[str] = "rude"
    rule: Literal["nothing", "mutate", "architecture", "nan", "warn", "raise", "filter"]

    def _repair(self, model, clean, diagnosis, seed):
        before = correct(model, clean)
        match self.rule:
            case "mutate":
                torch.rand(2), np.random.rand(2), random.random()  # noqa: NPY002
                model.train().requires_grad_(False).register_forward_hook(lambda *_: None)
                model[0].weight.data.mul_(2)
            case "architecture":
                model = build("plain")
            case "nan":
                model[0].weight.data.fill_(float("nan"))
            case "warn":
                import warnings

                warnings.warn(UnreliableWarning("first"), stacklevel=1)
                warnings.warn(UnreliableWarning("second"), stacklevel=1)
            case "raise":
                raise ArithmeticError("on purpose")
        return Outcome(model, before, before, True, [])


def rude(rule, net=None):
    net = net or build("batchnorm")
    before = Snapshot(net)
    try:
        return Rude(rule=rule).repair(net, make_clean(), seed=1)
    finally:
        before.assert_same()


def test_a_method_may_do_what_it_likes_with_its_copy():
    repair = rude("mutate")
    assert repair.record.status == "repaired"
    assert torch.equal(repair.model[0].weight, 2 * build("batchnorm")[0].weight)


@pytest.mark.parametrize(
    ("rule", "error", "text"),
    [
        ("architecture", ModelError, "the method changed the architecture"),
        ("nan", ModelError, "expected finite logits"),
        ("raise", ArithmeticError, "on purpose"),
    ],
)
def test_half_results_do_not_come_out(rule, error, text):
    with pytest.raises(error, match=text):
        rude(rule)


def test_a_method_that_changes_nothing_warns():
    with pytest.warns(NoEffectWarning, match="rude changed nothing: the method changed nothing"):
        repair = rude("nothing")
    assert (repair.record.status, repair.record.reason) == ("failed", "the method changed nothing")
    assert repair.record.warnings == ["rude changed nothing: the method changed nothing"]
    assert (repair.record.units_total, repair.record.layers, repair.record.selection) == (0, [], None)


def test_warnings_reach_the_caller_and_the_record():
    with pytest.warns(UnreliableWarning) as caught:
        repair = rude("warn")
    texts = [str(warning.message) for warning in caught]
    assert texts == repair.record.warnings
    assert texts[:2] == ["first", "second"]


# RNP


def rnp(**fields):
    return make(RNP, {"unlearn_epochs": 4, "recover_epochs": 4} | fields)


def few_digits():
    net, clean = backdoored(3)
    return net, clean.take(range(100))


def scores_of(repair):
    return torch.cat([torch.tensor(layer.values) for layer in repair.record.layers])


def changed_of(repair):
    return torch.cat([torch.isin(torch.arange(len(x.values)), torch.tensor(x.changed)) for x in repair.record.layers])


@pytest.mark.parametrize("variant", ["fixed", "released"])
@pytest.mark.parametrize("threshold", [-1, -0.5, 0, 0.2, 0.33, 1])
def test_threshold_prunes_scores_at_or_below_it(variant, threshold):
    net, clean = few_digits()
    repair = rnp(variant=variant, select="threshold", threshold=threshold).repair(net, clean, GIVEN)
    scores, changed = scores_of(repair), changed_of(repair)
    assert scores.min() >= (-1 if variant == "fixed" else 0)
    assert scores.max() <= 1
    assert torch.equal(changed, scores <= threshold)
    point = repair.record.selection.curve[repair.record.selection.chosen]
    assert repair.record.units_changed == point.pruned == int(changed.sum())
    assert repair.record.units_total == len(scores)
    assert repair.record.after.held_out == (variant == "fixed")


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_threshold_0_prunes_the_fully_masked(variant):
    """The masks again, by hand: what ended at 0 is pruned, and negative scores are nothing else."""
    net, clean = backdoored(7)
    method = rnp(variant=variant, select="threshold", threshold=0, recover_epochs=10)
    learned = method.learn(net, clean, seed=0)
    masked = torch.cat([value <= 0 for value in learned.scores.values.values()])
    assert 0 < masked.sum() < len(masked)
    assert torch.equal(changed_of(method.repair(net, clean, GIVEN)), masked)
    released = rnp(variant="released", select="count", recover_epochs=10).learn(net, clean, seed=0).scores
    for value in released.values.values():
        assert torch.equal(value, (value * 1e4).round() / 1e4)
        assert value.min() >= 0


def test_only_scales_are_zeroed_and_running_statistics_shared():
    net, clean = few_digits()
    repair = rnp(select="count", count=9).repair(net, clean, GIVEN)
    after, masked = repair.model.state_dict(), {f"{layer.name}.weight": layer.changed for layer in repair.record.layers}
    assert sum(map(len, masked.values())) == 9
    for name, before in net.state_dict().items():
        expected = before.clone()
        if name in masked:
            expected[masked[name]] = 0
        assert torch.equal(after[name], expected)


def test_recovery_leaves_the_unlearned_copy():
    net, clean = few_digits()
    method = rnp()
    unlearned, _ = method.unlearn(net, clean, seed=0, view="plain")
    before = copy.deepcopy(unlearned.state_dict())
    scores = method._recover(unlearned, clean, seed=0, detail="")
    assert same(unlearned.state_dict(), before)
    assert not scores.equal(Mask.ones(net, "neuron"))


def test_recovery_written_out(clean):
    """Descent on the cross-entropy over the scales of BatchNorm in training mode, clipped to [0, 1] after each step."""
    method = rnp(recover_lr=0.5, recover_epochs=6, batch_size=8)
    unlearned, _ = method.unlearn(train(build("batchnorm"), clean, epochs=5), clean, seed=0, view="plain")
    slow = copy.deepcopy(unlearned).train()
    norms = slow[1], slow[4]
    scales = [norm.weight.detach().clone() for norm in norms]
    masks, speeds = [torch.ones(6), torch.ones(6)], [torch.zeros(6), torch.zeros(6)]
    seen = [[mask] for mask in masks]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for images, labels in method.batches(clean, generator, "crop-flip"):
            slow.zero_grad()
            nn.functional.cross_entropy(slow(images), labels).backward()
            for i, norm in enumerate(norms):
                speeds[i] = 0.9 * speeds[i] + norm.weight.grad * scales[i]
                masks[i] = (masks[i] - 0.5 * speeds[i]).clamp(0, 1)
                seen[i].append(masks[i])
                norm.weight.data = scales[i] * masks[i]
    expected = [
        torch.where(last > 0, last, torch.stack(all_).mean(0) - 1) for last, all_ in zip(masks, seen, strict=True)
    ]
    scores = method._recover(unlearned, clean, seed=0, detail="")
    for value, by_hand in zip(scores.values.values(), expected, strict=True):
        assert torch.allclose(value, by_hand, atol=1e-4)
    flat = torch.cat(expected)
    assert (flat < -0.1).any()
    assert ((flat > 0) & (flat < 1)).any()


@pytest.mark.parametrize("count", [0, 1, 40, 112])
def test_count_prunes_the_lowest_scores(count):
    net, clean = few_digits()
    repair = rnp(select="count", count=count).repair(net, clean, GIVEN)
    scores, changed = scores_of(repair), changed_of(repair)
    assert changed.sum() == repair.record.units_changed == count
    if 0 < count < len(scores):
        assert scores[changed].max() <= scores[~changed].min()


def test_count_beyond_the_network():
    net, clean = few_digits()
    with pytest.raises(ConfigError, match="expected a count between 0 and 112 units, got 113"):
        rnp(select="count", count=113).repair(net, clean, GIVEN)


@pytest.mark.parametrize("budget", [0.01, 0.05, 0.5])
def test_budget_takes_the_last_cut_before_the_first_excess(budget):
    net, clean = few_digits()
    repair = rnp(budget=budget).repair(net, clean, GIVEN)
    selection = repair.record.selection
    over = [point.drop > budget + 1e-9 for point in selection.curve]
    assert any(over)
    pruned = [point.pruned for point in selection.curve]
    assert pruned == sorted(set(pruned))
    assert repair.record.units_changed == (0 if selection.chosen is None else pruned[selection.chosen])

    def lost(chosen):
        values = {f"{layer.name}.weight": torch.tensor(layer.values) for layer in repair.record.layers}
        delivered = Mask(values, "neuron").count(pruned[chosen]).bake(net)
        return float(correct(net, clean).double().mean() - correct(delivered, clean).double().mean())

    fits = [index for index in range(over.index(True)) if lost(index) <= budget + 1e-9]
    assert selection.chosen == (fits[-1] if fits else None)
    assert f"{budget:.1%}" in selection.rule


def test_pruning_takes_the_backdoor():
    net, clean = backdoored(7)
    images = clean.floats()
    images[:, :, 6:, 6:] = 1
    others = clean.labels != 7
    repair = RNP(select="threshold", threshold=0).repair(net, clean)
    with torch.no_grad():
        fooled, still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, repair.model))
    assert fooled > 0.9
    assert still < 0.2
    assert repair.record.diagnosis.targets[0].label == 7
    assert {check.name for check in repair.record.checks} >= {"keeps clean accuracy", "loses the suspected label"}


def test_released_needs_a_rule():
    with pytest.raises(ConfigError, match="the released code chooses no threshold; give select threshold or count"):
        make(RNP, {"variant": "released"})
    assert make(RNP, {"variant": "released", "select": "count"}).count == 20


@pytest.mark.parametrize(
    "fields",
    [
        {"budget": 0},
        {"threshold": 1.1},
        {"count": -1},
        {"folds": 1},
        {"recover_lr": 0},
        {"floor": 1},
        {"batch_size": 1},
        {"unlearn_epochs": 0},
        {"select": "oracle"},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^rnp: `{next(iter(fields))}`"):
        make(RNP, fields)


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_a_floor_that_is_not_reached_warns_and_delivers(variant):
    net, clean = few_digits()
    method = rnp(variant=variant, select="count", count=3, unlearn_epochs=1, unlearn_lr=1e-9)
    with pytest.warns(UnreliableWarning, match=r"unlearning ended at an accuracy of 0\.\d\d, not at the floor of 0.20"):
        repair = method.repair(net, clean, GIVEN)
    assert repair.record.units_changed == 3
    assert all("not at the floor" in text for text in repair.record.warnings)
    assert len(repair.record.warnings) == (3 if variant == "fixed" else 1)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("given", [GIVEN, None], ids=["given", "looked"])
@pytest.mark.parametrize("fields", [{"unlearn_lr": 1e30}, {"recover_lr": 1e30}], ids=["unlearn", "recover"])
def test_divergence_does_not_crash(name, given, fields, clean):
    net = build(name)
    repair = rnp(budget=0.5, unlearn_epochs=2, **{"recover_epochs": 2} | fields).repair(net, clean, given)
    assert all(torch.isfinite(value).all() for value in repair.model.state_dict().values())
    assert Record.model_validate_json(repair.record.to_json()) == repair.record
    assert repair.record.status in ("repaired", "failed", "nothing_to_repair")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("count", "batch_size"), [(4, 128), (9, 8), (17, 4), (33, 16), (13, 3), (7, 2)])
def test_few_images(name, count, batch_size):
    method = rnp(select="count", count=1, batch_size=batch_size, unlearn_epochs=1, recover_epochs=1)
    repair = method.repair(build(name), make_clean(count), GIVEN)
    assert repair.record.units_changed == 1
    assert repair.record.before.accuracy.total == count


def test_no_backdoor_changes_nothing():
    net, clean = few_digits()
    nothing = Diagnosis(verdict="not_found", rule="given", targets=[], runs=[])
    repair = rnp().repair(net, clean, nothing)
    assert repair.record.status == "nothing_to_repair"
    assert not any("changed nothing" in text for text in repair.record.warnings)
    assert same(repair.model.state_dict(), net.state_dict())
    assert repair.record.before == repair.record.after


def test_nothing_to_mask():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with pytest.raises(ModelError, match="nothing to mask by neuron"):
        rnp().repair(net, make_clean(), GIVEN)


def test_order_of_the_images_in_the_record():
    """Before and after are counted over every image once, whatever the folds."""
    net, clean = few_digits()
    shuffled = CleanSet(clean.images.flip(0), clean.labels.flip(0))
    for data in (clean, shuffled):
        record = rnp(folds=3, select="count").repair(net, data, GIVEN).record
        assert record.before.accuracy.count == int(correct(net, clean).sum())
        assert record.after.accuracy.total == len(clean)
