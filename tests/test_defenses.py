import contextlib
import copy
import errno
import random
from collections import OrderedDict
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch
from tiny import CLASSES, DEFENSES, GIVEN, NETS, QUICK, UNLIKE, Counts, RaisesAt, Snapshot, build, make_clean, train
from torch import nn

import untrojan
from untrojan.data import CleanSet
from untrojan.defenses.defense import Defense, Outcome
from untrojan.defenses.rnp import RNP
from untrojan.errors import ConfigError, DataError, ModelError, NoEffectWarning, UnreliableWarning
from untrojan.mask import products
from untrojan.model import correct, logits
from untrojan.record import Record
from untrojan.registry import config, describe
from untrojan.report import render
from untrojan.scanners.triggers import TriggerScanner
from untrojan.sources.files import Checkpoint, save_state, state_sha256
from untrojan.sources.undo import restore

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("short_searches")]

FILES = {"repaired.safetensors", "changes.safetensors", "report.html", "record.json"}

NO_STATISTICS = "BNP compares clean images with BatchNorm running statistics, and the network has none"
NO_CHANNELS = "CLP bounds channels that a convolution or linear layer makes, and no channel here is one"
NO_SCALES = "learns how far to scale channels down, and here a normalization undoes every such change"
WITHOUT_MEANING = {
    **{("bnp", net): NO_STATISTICS for net in ("plain", "groupnorm", "vit", "convnext", "shared", "tied")},
    ("clp", "vit"): NO_CHANNELS,
    ("rnp", "no-affine"): f"RNP {NO_SCALES}",
    ("anp", "no-affine"): f"ANP {NO_SCALES}",
    ("nft", "no-affine"): f"NFT {NO_SCALES}",
}

methods = pytest.mark.parametrize(
    "method", [cls(**QUICK.get(name, {})) for name, cls in DEFENSES.items()], ids=list(DEFENSES)
)


@pytest.fixture(autouse=True)
def _has_meaning(request):
    """Leave out networks for which the method has no meaning; that it says so is a test of its own."""
    given = getattr(request.node, "callspec", None)
    if given and isinstance(given.params.get("method"), Defense):
        where = given.params.get("net", given.params.get("name"))
        if (given.params["method"].name, where) in WITHOUT_MEANING:
            pytest.skip("the method has no meaning for this network and says so")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@cache
def done(name):
    """A repair to look at; nobody changes it."""
    return DEFENSES[name](**QUICK.get(name, {})).repair(build("batchnorm"), make_clean(), GIVEN)


named = pytest.mark.parametrize("name", DEFENSES)


# The contract of every method


@methods
def test_the_caller_sees_no_change_and_the_repair_is_whole(net, clean, method, request):
    if request.node.callspec.params["net"] != "batchnorm" and method.name != "fine-tuning":
        request.getfixturevalue("no_checks")
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
    if record.before.accuracy.total == len(clean):
        assert record.before.accuracy.count == correct(net, clean).sum()
    assert record.after.accuracy.total == record.before.accuracy.total > 0
    assert record.values_changed == sum(int((v != before.state[k]).sum()) for k, v in repair.model.state_dict().items())
    assert repr(repair) == f"Repair({record.status}: {record.reason})"


LEARNS_LAST_IN_TRAINING_MODE = {
    **dict.fromkeys(["rnp", "anp", "fine-pruning", "fine-tuning", "ft-sam", "nad", "ulrl", "nft", "tsbd", "fmp"], True),
    **dict.fromkeys(["neural-cleanse"], True),
    **dict.fromkeys(["auto", "awm", "i-bau", "npd", "sau"], False),
}


@pytest.mark.parametrize("name", LEARNS_LAST_IN_TRAINING_MODE)
@pytest.mark.usefixtures("no_checks")
def test_in_which_mode_a_method_learns(name, clean):
    net, seen = build("batchnorm"), []
    norm = next(each for each in net.modules() if isinstance(each, nn.BatchNorm2d))
    norm.register_forward_hook(lambda at, _, out: seen.append(at.training) if out.requires_grad else None)
    DEFENSES[name](**QUICK[name]).repair(net, clean, GIVEN)
    assert seen[-1] == LEARNS_LAST_IN_TRAINING_MODE[name]
    assert name != "awm" or not any(seen)


CHOICES = {
    "auto": ["labels whose triggers may be spread over the image"],
    "fine-pruning": ["features pruned"],
    "fmp": ["maps pruned"],
    "i-bau": ["round delivered"],
    "nad": ["weight of the attention of each layer"],
    "neural-cleanse": ["label", "l1 norm of its mask"],
    "npd": ["layer behind the polarizer"],
    "tsbd": ["filters with weights zeroed"],
    "ulrl": ["rows reset"],
}


@named
def test_the_record_holds_what_a_method_chose(name):
    record, model = done(name).record, done(name).model
    assert list(record.choices) == CHOICES.get(name, [])
    if name == "fmp":
        for layer, maps in record.choices["maps pruned"].items():
            silent = (model.get_submodule(layer).weight == 0).flatten(1).all(1)
            assert silent.nonzero().flatten().tolist() == sorted(maps)
    if name == "fine-pruning":
        silent = (model.get_parameter(f"{products(model)[-1]}.weight") == 0).all(0)
        assert int(silent.sum()) == record.choices["features pruned"] > 0


def test_nothing_is_chosen_where_nothing_is_done(clean):
    clear = GIVEN.model_copy(update={"verdict": "not_found", "targets": []})
    assert DEFENSES["fmp"](**QUICK["fmp"]).repair(build("batchnorm"), clean, clear).record.choices == {}


def test_every_method_that_learns_is_asked_for_its_mode():
    assert set(DEFENSES) - set(LEARNS_LAST_IN_TRAINING_MODE) == {"clp", "bnp"}


def repeats(method, name, clean):
    one = method.repair(build(name), clean, GIVEN, seed=3)
    torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
    other = method.repair(build(name), clean, GIVEN, seed=3)
    assert same(one.model.state_dict(), other.model.state_dict())
    varying = {"seconds": {}, "peak_memory_bytes": 0}
    assert one.record.model_copy(update=varying) == other.record.model_copy(update=varying)


def test_a_repair_with_its_checks_repeats(clean):
    repeats(DEFENSES["fine-tuning"](**QUICK["fine-tuning"]), "dropout", clean)


@methods
@pytest.mark.parametrize(
    "name", [each if each == "dropout" else pytest.param(each, marks=pytest.mark.slow) for each in NETS]
)
@pytest.mark.usefixtures("no_checks")
def test_what_a_method_does_repeats(name, clean, method):
    repeats(method, name, clean)


@methods
@pytest.mark.parametrize("at", [1, 2, 5, 11])
@pytest.mark.parametrize("name", UNLIKE)
def test_the_caller_sees_no_change_when_a_layer_raises(clean, method, name, at):
    net, raises = build(name), RaisesAt(at)
    list(net.modules())[2].register_forward_hook(raises)
    before = Snapshot(net)
    try:
        method.repair(net, clean, GIVEN)
    except (ArithmeticError, ModelError) as error:
        assert "on purpose" in str(error)  # noqa: PT017
    else:
        assert raises.left[0] > 0
    before.assert_same()


@pytest.mark.parametrize(("method", "net"), WITHOUT_MEANING)
def test_networks_without_meaning_for_a_method_are_refused(method, net, clean):
    with pytest.raises(ModelError, match=WITHOUT_MEANING[method, net]):
        DEFENSES[method](**QUICK[method]).repair(build(net), clean, GIVEN)


@methods
@pytest.mark.usefixtures("no_checks")
def test_a_network_that_changes_itself_is_not_called(clean, method):
    net = Counts()
    before = Snapshot(net)
    method.repair(net, clean, GIVEN)
    before.assert_same()


@pytest.mark.parametrize("caller", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ["rnp", "awm", "fmp", "anp", "clp", "bnp", "fine-pruning", "ft-sam", "fine-tuning"])
@pytest.mark.usefixtures("no_checks")
def test_a_network_with_more_than_weights_is_repaired_whatever_mode_the_caller_is_in(name, caller):
    """It holds infinity where attention is masked, and whole numbers that are parameters but cannot be trained."""
    fields = QUICK[name] | ({"p": 4} if name == "fmp" else {})
    with caller():
        net, clean = build("batchnorm"), make_clean()
        net.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        net.order = nn.Parameter(torch.tensor([3, 2, 1, 0]), requires_grad=False)
        net.register_forward_hook(lambda net, _, out: out[:, net.order] + 0 * net.mask.softmax(1).sum())
        repair = DEFENSES[name](**fields).repair(net, clean, GIVEN)
    assert repair.record.values_changed > 0
    assert not any("NaN or infinity" in text for text in repair.record.warnings)
    assert torch.equal(repair.model.order, net.order)
    assert torch.equal(repair.model.mask, net.mask)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_that_cannot_be_copied_is_refused(clean):
    net = nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(192, CLASSES)))
    with pytest.raises(ModelError, match="the network cannot be copied, because a weight of it is computed"):
        DEFENSES["fine-tuning"](**QUICK["fine-tuning"]).repair(net, clean, GIVEN)


@pytest.mark.parametrize("name", ["rnp", "fine-tuning", "auto"])
def test_methods_look_for_themselves(clean, name):
    net = train(build("batchnorm"), clean, epochs=3)
    repair = DEFENSES[name](**QUICK[name]).repair(net, clean)
    assert repair.record.diagnosis is not None
    assert repair.record.status in ("repaired", "nothing_to_repair", "inconclusive", "failed")
    unchanged = same(repair.model.state_dict(), net.state_dict())
    assert unchanged == (repair.record.values_changed == 0)


@methods
def test_method_round_trip(method):
    assert type(method)(**describe(method)) == method
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
    method = RNP(**QUICK["rnp"])
    one = untrojan.repair(build("plain"), clean, method=method, diagnosis=GIVEN, seed=2)
    assert same(one.model.state_dict(), method.repair(build("plain"), clean, GIVEN, 2).model.state_dict())


# Files


def listing(folder):
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


@pytest.mark.parametrize(
    "name",
    [name if name in ("fine-tuning", "rnp") else pytest.param(name, marks=pytest.mark.slow) for name in DEFENSES],
)
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
    repair = RNP(**QUICK["rnp"]).repair(source.into(net), clean, GIVEN, source=source)
    assert (repair.record.model.path, repair.record.model.sha256) == (source.path, source.sha256)
    assert repair.record.model.state_sha256 == state_sha256(source.tensors)
    repair.save(tmp_path / "run")
    child = Checkpoint.read(tmp_path / "run" / "repaired.safetensors").tensors
    assert {name: value.dtype for name, value in child.items()} == {n: v.dtype for n, v in source.tensors.items()}
    assert same(restore(child, tmp_path / "run" / "changes.safetensors"), source.tensors)


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("wrapped", [False, True])
def test_what_is_judged_is_what_a_file_of_a_coarser_type_will_hold(tmp_path, clean, wrapped):
    net = build("batchnorm")
    tensors = {key: value.bfloat16() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    save_state(tmp_path / "half.safetensors", tensors)
    source = Checkpoint.read(tmp_path / "half.safetensors")
    net = source.into(net)
    if wrapped:
        net = nn.Sequential(OrderedDict(module=net))
    repair = DEFENSES["fine-tuning"](**QUICK["fine-tuning"]).repair(net, clean, GIVEN, source=source)
    repair.save(tmp_path / "run")
    child = Checkpoint.read(tmp_path / "run" / "repaired.safetensors")
    assert repair.record.values_changed > 0
    assert torch.equal(logits(child.into(build("batchnorm")), clean), logits(repair.model, clean))


def test_what_is_saved_is_what_came_out(tmp_path, clean):
    net = build("batchnorm")
    repair = RNP(**QUICK["rnp"]).repair(net, clean, GIVEN)
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


@config
class Looks(Defense):
    """Sees how the weights of the first convolution lie in memory, and changes them."""

    name: ClassVar[str] = "looks"
    seen: ClassVar[list[bool]] = []

    def _repair(self, model, clean, diagnosis, seed):
        weights = next(model.parameters())
        self.seen.append(weights.is_contiguous(memory_format=torch.channels_last))
        before = correct(model, clean)
        weights.data.mul_(1.5)
        return Outcome(model, before, correct(model, clean), held_out=False)


class Views(nn.Sequential):
    """Views the output of its convolution in another shape, which it cannot be with the channels last."""

    def forward(self, images):
        return self[1](self[0](images).view(len(images), -1))


class ViewsWeights(nn.Conv2d):
    """Views its weights in another shape, which they cannot be with the channels last."""

    def forward(self, images):
        scale = self.weight.view(len(self.weight), -1).norm(dim=1)
        return super().forward(images) / scale[:, None, None]


@pytest.mark.parametrize(
    ("net", "last"),
    [
        (build("batchnorm"), True),
        (build("groupnorm"), False),
        (Views(nn.Conv2d(3, 2, 3), nn.Linear(72, CLASSES)), False),
        (nn.Sequential(ViewsWeights(3, 2, 3), nn.Flatten(), nn.Linear(72, CLASSES)), False),
    ],
    ids=["batchnorm", "groupnorm", "views", "views weights"],
)
def test_a_network_is_repaired_with_the_channels_last_and_given_back_as_usual(clean, net, last):
    repair = Looks().repair(net, clean, GIVEN)
    assert Looks.seen.pop() is last
    assert torch.equal(repair.model[0].weight, 1.5 * net[0].weight)
    assert all(weights.is_contiguous() for net in (net, repair.model) for weights in net.parameters())


@config
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
        return Outcome(model, before, before, True)


def rude(rule, net=None):
    net = net or build("batchnorm")
    before = Snapshot(net)
    try:
        return Rude(rule=rule).repair(net, make_clean(), GIVEN, seed=1)
    finally:
        before.assert_same()


def test_a_method_may_do_what_it_likes_with_its_copy():
    repair = rude("mutate")
    assert torch.equal(repair.model[0].weight, 2 * build("batchnorm")[0].weight)


def test_another_architecture_is_told_where_the_model_came_from_a_file_too(tmp_path):
    net = build("batchnorm")
    save_state(tmp_path / "a.safetensors", net.state_dict())
    with pytest.raises(ModelError, match="the method changed the architecture"):
        Rude(rule="architecture").repair(net, make_clean(), GIVEN, source=Checkpoint.read(tmp_path / "a.safetensors"))


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


@pytest.mark.usefixtures("no_checks")
def test_after_an_inconclusive_scan_nothing_is_called_repaired(clean):
    method = DEFENSES["fine-tuning"](**QUICK["fine-tuning"])
    net = train(build("batchnorm"), clean)
    sure = method.repair(net, clean, GIVEN)
    unsure = method.repair(net, clean, GIVEN.model_copy(update={"verdict": "inconclusive"}))
    assert (sure.record.status, unsure.record.status) == ("repaired", "inconclusive")
    assert same(sure.model.state_dict(), unsure.model.state_dict())
    assert unsure.record.reason.startswith(f"{sure.record.reason}, but ")


@pytest.mark.usefixtures("no_checks")
@pytest.mark.parametrize("verdict", ["found", "not_found"])
def test_nothing_is_called_repaired_or_sound_where_the_model_is_wrong_on_most_clean_images(clean, monkeypatch, verdict):
    monkeypatch.setattr(TriggerScanner, "_scan", lambda *_: GIVEN.model_copy(update={"verdict": verdict}))
    net, method = train(build("plain"), clean), DEFENSES["fine-tuning"](**QUICK["fine-tuning"])
    firm = "repaired" if verdict == "found" else "nothing_to_repair"
    assert method.repair(net, clean).record.status == firm
    wrong = CleanSet(clean.images, clean.labels.roll(1))
    looked = method.repair(net, wrong).record
    given = method.repair(net, wrong, GIVEN.model_copy(update={"verdict": verdict})).record
    assert (looked.status, given.status) == ("inconclusive", "inconclusive")
    assert "but the model is right on 3 of 32 clean images, which is less than half" in given.reason
    assert (looked.values_changed == given.values_changed == 0) == (verdict == "not_found")
    assert ("model is unchanged." in render(looked)) == (verdict == "not_found")


def test_a_method_that_changes_nothing_warns():
    with pytest.warns(NoEffectWarning, match="rude changed nothing: the method changed nothing"):
        repair = rude("nothing", train(build("batchnorm"), make_clean()))
    assert (repair.record.status, repair.record.reason) == ("failed", "the method changed nothing")
    assert repair.record.warnings == ["rude changed nothing: the method changed nothing"]
    assert (repair.record.units_total, repair.record.layers, repair.record.selection) == (0, [], None)


@pytest.mark.parametrize("given", [GIVEN, None], ids=["given", "scanned"])
def test_a_model_that_is_right_by_chance_is_told_once(clean, given, monkeypatch):
    monkeypatch.setattr(TriggerScanner, "_scan", lambda *_: GIVEN)
    told = Rude(rule="nothing").repair(build("batchnorm"), clean, given).record.warnings
    assert sum(text.startswith("the model is right on 8 of 32 clean images, which is less") for text in told) == 1


def test_warnings_reach_the_caller_and_the_record():
    with pytest.warns(UnreliableWarning) as caught:
        repair = rude("warn", train(build("batchnorm"), make_clean()))
    texts = [str(warning.message) for warning in caught]
    assert texts == repair.record.warnings
    assert texts[:2] == ["first", "second"]
