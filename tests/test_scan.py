import base64
import copy
import io
import json
import warnings

import pytest
import torch
from PIL import Image
from tiny import CLASSES, UNLIKE, Counts, RaisesAt, Snapshot, backdoored, build, make_clean, train
from torch import nn

import untrojan
from untrojan.data import CleanSet
from untrojan.errors import DataError, ModelError, UnreliableWarning
from untrojan.record import Diagnosis, Rate, ScanRecord, Target, UnlearningPoint, UnlearningRun
from untrojan.registry import describe, discover
from untrojan.scanners import neural_cleanse
from untrojan.scanners.neural_cleanse import NeuralCleanseScanner, SoftPatch
from untrojan.scanners.scanner import Scanner
from untrojan.scanners.triggers import TriggerScanner
from untrojan.scanners.unlearning import RULE, Unlearning, UnlearningScanner, diagnose
from untrojan.writing import RECORD, REPORT, SARIF

pytestmark = [pytest.mark.usefixtures("short_searches"), pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")]

SCANNERS = discover("untrojan.scanners", Scanner)
QUICK = {
    "neural-cleanse": {"mask_epochs": 2},
    "triggers": {"unlearn_epochs": 2, "runs": 2, "search_steps": 2, "refine_steps": 2},
    "unlearning": {"unlearn_epochs": 2, "runs": 2},
}

scanners = pytest.mark.parametrize("scanner", [cls(**QUICK[name]) for name, cls in SCANNERS.items()], ids=SCANNERS)


def test_the_target_of_a_backdoor_is_named():
    net, clean = backdoored(7)
    diagnosis = UnlearningScanner().scan(net, clean)
    assert diagnosis.verdict == "found"
    assert diagnosis.targets[0].label == 7
    assert diagnosis.targets[0].score >= 0.5
    assert {each.label for each in diagnosis.targets} == set(range(10))
    assert sum(each.score for each in diagnosis.targets) == pytest.approx(1, abs=1e-5)
    assert [run.view for run in diagnosis.runs] == ["plain", "noise"] * 2
    assert [run.seed for run in diagnosis.runs] == [0, 1, 2, 3]
    assert all(run.reached and run.trace[-1].accuracy <= 0.2 for run in diagnosis.runs)


@scanners
def test_model_and_random_state_stay(net, clean, scanner):
    next(net.children()).train()
    before = Snapshot(net)
    diagnosis = scanner.scan(net, clean, seed=4)
    before.assert_same()
    assert scanner.scan(net, clean, seed=4) == diagnosis
    before.assert_same()
    assert Diagnosis.model_validate_json(diagnosis.model_dump_json()) == diagnosis


@scanners
def test_the_seed_decides(scanner):
    net, clean = train(build("dropout"), make_clean(64), epochs=3), make_clean(64)
    assert scanner.scan(net, clean, seed=0) != scanner.scan(net, clean, seed=1)


@scanners
@pytest.mark.parametrize("at", [1, 2, 5])
def test_model_and_random_state_stay_when_a_layer_raises(clean, scanner, at):
    net = build("batchnorm")
    net[2].register_forward_hook(RaisesAt(at))
    before = Snapshot(net)
    with pytest.raises((ArithmeticError, ModelError), match="on purpose"):
        scanner.scan(net, clean)
    before.assert_same()


@scanners
def test_a_network_that_changes_itself_is_not_called(clean, scanner):
    net = Counts()
    before = Snapshot(net)
    scanner.scan(net, clean)
    before.assert_same()


@scanners
def test_what_cannot_be_scanned(scanner):
    with pytest.raises(ModelError, match="cannot take images of 1x8x8"):
        scanner.scan(build("plain"), make_clean(shape=(1, 8, 8)))
    with pytest.raises(DataError, match="no image of class 3"):
        scanner.scan(build("plain"), make_clean(classes=3))


@scanners
def test_round_trip(scanner):
    assert type(scanner)(**describe(scanner)) == scanner


# The record

QUICKEST = UnlearningScanner(runs=1, unlearn_epochs=1)


@scanners
def test_the_record_tells_all_about_the_scan(clean, scanner):
    net = build("batchnorm").train()
    before = Snapshot(net)
    record = scanner.examine(net, clean, seed=4)
    before.assert_same()
    assert record.kind == "scan"
    assert record.diagnosis == scanner.scan(net, clean, seed=4)
    assert (record.method.name, record.method.fields, record.seed) == (scanner.name, describe(scanner), 4)
    assert (record.model.architecture, record.model.classes, record.model.path) == ("Sequential", CLASSES, None)
    assert record.model.parameters == sum(value.numel() for value in net.parameters())
    assert (record.clean.sha256, record.clean.per_class) == (clean.sha256, [8] * CLASSES)
    assert record.seconds
    assert record.environment["untrojan"] == untrojan.__version__


def test_the_function_is_the_scanner(clean, monkeypatch):
    net = build("plain")
    assert untrojan.scan(net, clean, method=QUICKEST, seed=2).diagnosis == QUICKEST.scan(net, clean, 2)
    monkeypatch.setattr(TriggerScanner, "_scan", lambda *_: diagnose([]))
    assert untrojan.scan(net, clean).method.name == "triggers"


@pytest.mark.parametrize("verdict", ["found", "not_found", "inconclusive"])
def test_no_verdict_is_firm_where_the_model_is_wrong_on_most_clean_images(clean, monkeypatch, verdict):
    seen = Diagnosis(verdict=verdict, rule="found: seen", targets=[Target(label=2, score=1.0)], runs=[])
    monkeypatch.setattr(TriggerScanner, "_scan", lambda *_: seen)
    record = untrojan.scan(Shortcut(), clean)
    assert record.diagnosis == seen.model_copy(update={"accuracy": Rate.of(32, 32)})
    doubted = untrojan.scan(Shortcut(), CleanSet(clean.images, clean.labels.roll(1)))
    assert (doubted.diagnosis.verdict, doubted.diagnosis.accuracy) == ("inconclusive", Rate.of(0, 32))
    assert doubted.diagnosis.rule == (
        "inconclusive, because the model is right on 0 of 32 clean images, which is less than half; the evidence alone "
        f"gives {verdict}, by this rule: found: seen"
    )
    assert (doubted.diagnosis.targets, doubted.diagnosis.overruled) == (seen.targets, verdict)
    assert doubted.diagnosis.suspects == ([] if verdict == "not_found" else [2])
    assert ["--mean and --std" in each for each in doubted.warnings] == [True]


def test_warnings_reach_the_record_and_the_caller(clean, monkeypatch):
    def scan(self, model, clean, seed):
        warnings.warn(UnreliableWarning("on purpose"), stacklevel=2)
        return diagnose([])

    monkeypatch.setattr(TriggerScanner, "_scan", scan)
    with pytest.warns(UnreliableWarning, match="on purpose"):
        assert untrojan.scan(Shortcut(), clean).warnings == ["on purpose"]


def test_saved_scan(clean, tmp_path):
    record = untrojan.scan(build("plain"), clean, method=QUICKEST)
    record.save(tmp_path / "out")
    assert {path.name for path in tmp_path.joinpath("out").iterdir()} == {RECORD, REPORT, SARIF}
    assert ScanRecord.load(tmp_path / "out" / RECORD) == record
    assert json.loads((tmp_path / "out" / SARIF).read_text())["version"] == "2.1.0"
    with pytest.raises(untrojan.ConfigError, match="not empty"):
        record.save(tmp_path / "out")
    (tmp_path / "out" / "mine").touch()
    record.model_copy(update={"seed": 9}).save(tmp_path / "out", force=True)
    assert ScanRecord.load(tmp_path / "out" / RECORD).seed == 9
    assert {path.name for path in tmp_path.joinpath("out").iterdir()} == {RECORD, REPORT, SARIF, "mine"}


# Neural Cleanse


class Shortcut(nn.Module):
    """Knows classes by their stripes, and says 2 wherever one corner pixel is red."""

    def forward(self, images):
        stripes = torch.stack([images[:, :, 2 * label : 2 * label + 2].mean((1, 2, 3)) for label in range(4)], 1)
        red = nn.functional.softplus(10 * (images[:, 0, 0, 7] - images[:, 1, 0, 7] - 0.5))
        return 20 * stripes + 6 * red[:, None] * torch.tensor([0, 0, 1, 0])


def test_the_label_of_a_small_patch_is_found(clean):
    diagnosis = NeuralCleanseScanner().scan(Shortcut(), clean)
    assert diagnosis.verdict == "found"
    assert diagnosis.suspect == 2
    assert [patch.too_small for patch in diagnosis.patches] == [False, False, True, False]
    assert [patch.picture is None for patch in diagnosis.patches] == [True, True, False, True]
    assert diagnosis.targets[0].score == -diagnosis.patches[2].index > 2
    picture = Image.open(io.BytesIO(base64.b64decode(diagnosis.patches[2].picture)))
    assert (picture.format, picture.mode, picture.size) == ("PNG", "RGBA", (8, 8))
    assert picture.getpixel((7, 0))[3] > 150
    assert picture.getpixel((2, 6))[3] < 50


def a_trigger(label, size, reached=True, channels=3):
    mask = torch.zeros(1, 10, 10)
    mask.view(-1)[:size] = 1
    return SoftPatch(label, mask, torch.full((channels, 10, 10), 0.5), 0.7, reached)


@pytest.mark.parametrize(
    ("sizes", "missed", "verdict", "small", "ranked"),
    [
        ([50, 52, 48, 5, 51], [], "found", [3], [3, 2, 0, 4, 1]),
        ([50, 52, 48, 5, 51, 6, 49, 53], [], "found", [3, 5], [3, 5, 2, 6, 0, 4, 1, 7]),
        ([50, 52, 48, 47, 51], [], "not_found", [], [3, 2, 0, 4, 1]),
        ([50, 52, 49, 99, 51], [], "not_found", [], [2, 0, 4, 1, 3]),
        ([50, 52, 48, 5, 51], [3], "inconclusive", [], [2, 0, 4, 1]),
        ([50, 52, 48, 5, 51], [4], "found", [3], [3, 2, 0, 1]),
        ([50, 50, 50, 50], [], "not_found", [], [0, 1, 2, 3]),
        ([90, 1], [], "inconclusive", [], [1, 0]),
        ([90, 80, 70], [0, 1, 2], "inconclusive", [], []),
    ],
)
def test_verdict_of_neural_cleanse(sizes, missed, verdict, small, ranked):
    diagnosis = neural_cleanse.diagnose(
        [a_trigger(label, size, label not in missed) for label, size in enumerate(sizes)]
    )
    assert diagnosis.verdict == verdict
    assert diagnosis.runs == []
    assert [target.label for target in diagnosis.targets] == ranked
    assert [patch.label for patch in diagnosis.patches if patch.too_small] == small
    assert [patch.label for patch in diagnosis.patches if patch.picture] == small
    assert [patch.size for patch in diagnosis.patches] == sizes
    assert [patch.label for patch in diagnosis.patches if patch.index is None] == missed
    assert {target.label: target.score for target in diagnosis.targets} == {
        patch.label: -patch.index for patch in diagnosis.patches if patch.index is not None
    }


def test_the_anomaly_index_written_out():
    diagnosis = neural_cleanse.diagnose([a_trigger(label, size) for label, size in enumerate([50, 52, 48, 5, 51])])
    # Median 50; the deviations 0, 2, 2, 45, 1 have the median 2.
    assert [patch.index for patch in diagnosis.patches] == pytest.approx(
        [0, 2 / 2.9652, -2 / 2.9652, -45 / 2.9652, 1 / 2.9652]
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_patch_becomes_a_picture(channels):
    triggers = [a_trigger(label, size, channels=channels) for label, size in enumerate([50, 52, 5])]
    picture = neural_cleanse.diagnose(triggers).patches[2].picture
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    assert (image.mode, image.getpixel((0, 0)), image.getpixel((9, 9))) == (
        "RGBA",
        (128, 128, 128, 255),
        (128, 128, 128, 0),
    )


# Unlearning


def test_the_loop_written_out():
    """Ascent on the cross-entropy by SGD with momentum and weight decay, in training mode, stop at the floor."""
    clean = make_clean(40)
    net = train(build("batchnorm"), clean, epochs=8)
    how = Unlearning(unlearn_lr=0.02, batch_size=40, unlearn_epochs=15)
    model, run = how.unlearn(net, clean, seed=3, view="plain")

    slow = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(slow.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4, maximize=False)
    generator = torch.Generator().manual_seed(3)
    accuracies = []
    for epoch in range(15):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 if epoch < 10 else 0.002
        right = 0
        for images, labels in how.viewed(clean, generator, "plain"):
            out = slow(images)
            right += int((out.argmax(1) == labels).sum())
            optimizer.zero_grad()
            (-nn.functional.cross_entropy(out, labels)).backward()
            optimizer.step()
        accuracies.append(right / 40)
        if accuracies[-1] <= 0.2:
            break
    assert 1 < len(accuracies) < 15
    assert run.reached
    assert [point.accuracy for point in run.trace] == accuracies
    assert [point.epoch for point in run.trace] == list(range(1, len(accuracies) + 1))
    assert run.share == max(run.trace[-1].shares) == run.trace[-1].shares[run.label]
    assert not model.training
    for name, value in slow.state_dict().items():
        assert torch.allclose(model.state_dict()[name], value, atol=1e-5)


def test_frozen_parameters_are_unlearned_too():
    net = build("frozen")
    model, _ = Unlearning(unlearn_epochs=1).unlearn(net, make_clean(), seed=0, view="plain")
    assert not net[0].weight.requires_grad
    assert all(
        not torch.equal(after, before) for after, before in zip(model.parameters(), net.parameters(), strict=True)
    )


@pytest.mark.parametrize("name", UNLIKE)
def test_divergence_leaves_finite_numbers(name, clean):
    net = build(name)
    model, run = Unlearning(unlearn_lr=1e30).unlearn(net, clean, seed=0, view="plain")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert len(run.trace) < 21
    assert run.reached == bool(run.trace and run.trace[-1].accuracy <= 0.2)


def test_divergence_at_once_says_nothing(clean):
    diagnosis = UnlearningScanner(unlearn_lr=1e30, runs=2).scan(build("plain"), clean)
    assert (diagnosis.verdict, diagnosis.targets) == ("inconclusive", [])
    assert [(run.reached, run.share, run.trace) for run in diagnosis.runs] == [(False, 0.0, [])] * 2


@pytest.mark.parametrize("batch_size", [2, 3, 8, 32, 128])
def test_no_batch_holds_a_single_image(batch_size):
    how = Unlearning(batch_size=batch_size)
    for count in range(2, 150):
        clean = make_clean(count, shape=(1, 1, 1))
        sizes = [len(labels) for _, labels in how.viewed(clean, torch.Generator().manual_seed(0), "plain")]
        assert sum(sizes) == count
        assert min(sizes) > 1
        assert max(sizes) <= batch_size + 2 or batch_size < 8


@pytest.mark.parametrize("view", ["plain", "noise", "crop-flip"])
def test_views_stay_images(view):
    clean = make_clean(40)
    seen = torch.cat([images for images, _ in Unlearning().viewed(clean, torch.Generator().manual_seed(0), view)])
    assert seen.shape == clean.images.shape
    assert 0 <= seen.min() <= seen.max() <= 1
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    assert torch.equal(seen, clean.floats()[order]) == (view == "plain")


# The verdict


def a_run(shares, reached=True, view="plain"):
    trace = [UnlearningPoint(epoch=1, accuracy=0.1, shares=shares)] if shares else []
    label, share = (shares.index(max(shares)), max(shares)) if shares else (0, 0.0)
    return UnlearningRun(seed=0, view=view, images=9, reached=reached, label=label, share=share, trace=trace)


A, B, EVEN = [0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.4, 0.4, 0.2]


@pytest.mark.parametrize(
    ("runs", "verdict", "ranked"),
    [
        ([a_run(A), a_run(A, view="noise")], "found", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A), a_run(B, view="noise")], "inconclusive", [(0, 0.55), (1, 0.45), (2, 0.0)]),
        ([a_run(EVEN), a_run(EVEN)], "inconclusive", [(0, 0.4), (1, 0.4), (2, 0.2)]),
        ([a_run(A), a_run(A, reached=False)], "inconclusive", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A, False), a_run(A, False, "noise")], "inconclusive", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A, False), a_run(B, False, "noise")], "inconclusive", [(0, 0.55), (1, 0.45), (2, 0.0)]),
        ([a_run(A, False), a_run(B, True, "noise")], "not_found", [(0, 0.55), (1, 0.45), (2, 0.0)]),
        ([a_run(A, True), a_run(B, False, "noise")], "inconclusive", [(0, 0.55), (1, 0.45), (2, 0.0)]),
        ([a_run(A, False)], "inconclusive", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A), a_run([], False)], "inconclusive", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A), a_run([], False, "noise")], "inconclusive", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A)], "inconclusive", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A, view="noise")] * 2, "inconclusive", [(0, 0.9), (1, 0.1), (2, 0.0)]),
        ([a_run(A), a_run(EVEN, view="noise")], "found", [(0, 0.65), (1, 0.25), (2, 0.1)]),
        ([a_run([], False), a_run([], False, "noise")], "inconclusive", []),
        ([a_run(A), a_run(A), a_run(A), a_run(B, view="noise")], "inconclusive", [(0, 0.55), (1, 0.45), (2, 0.0)]),
        ([], "inconclusive", []),
    ],
)
def test_diagnose(runs, verdict, ranked):
    diagnosis = diagnose(runs)
    assert diagnosis.verdict == verdict
    assert [target.label for target in diagnosis.targets] == [label for label, _ in ranked]
    assert [target.score for target in diagnosis.targets] == pytest.approx([score for _, score in ranked])
    assert diagnosis.runs == runs
    assert diagnosis.rule == RULE


def test_classes_are_those_of_the_net(clean):
    diagnosis = UnlearningScanner(runs=1, unlearn_epochs=1).scan(build("plain"), clean)
    assert sorted(target.label for target in diagnosis.targets) == list(range(CLASSES))
