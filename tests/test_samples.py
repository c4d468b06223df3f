"""Which samples are poisoned: every detector against its formula and against chance, streams, and bad input."""

import copy
import json
import math
import sys
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import Counts, RaisesAt, Returns, Snapshot, backdoored, build, digits, make_clean
from torch import nn

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, ModelError
from untrojan.model import logits
from untrojan.progress import Lines, reporting
from untrojan.record import Diagnosis, Target
from untrojan.registry import describe, discover
from untrojan.scanners.detectors.activation_clustering import ActivationClustering, reduced, signed_silhouette
from untrojan.scanners.detectors.cognitive_distillation import CognitiveDistillation
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.detectors.spectral_signatures import SpectralSignatures
from untrojan.scanners.detectors.strip import Strip
from untrojan.scanners.detectors.unlearned import Unlearned
from untrojan.scanners.samples import Screening, ScreeningRecord, screen
from untrojan.scanners.suspects import CHUNK, Suspects

pytestmark = pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")

DETECTORS = discover("untrojan.scanners.detectors", Detector)
QUICK = {"unlearned": {"unlearn_epochs": 2}, "strip": {"blends": 3}, "cognitive-distillation": {"iterations": 2}}
UNKNOWN = Diagnosis(verdict="inconclusive", rule="told", targets=[], runs=[])
FOUND = Diagnosis(verdict="found", rule="told", targets=[Target(label=7, score=0.9)], runs=[])

detectors = pytest.mark.parametrize(
    "detector", [cls(**QUICK.get(name, {})) for name, cls in DETECTORS.items()], ids=DETECTORS
)


@cache
def planted(poisoned):
    """400 clean digits, and behind them others with the trigger that `backdoored(7)` knows and the label 7."""
    order = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(0))
    images, labels = digits().images[order], digits().labels[order]
    others = (labels[:120] != 7).nonzero().flatten()[:poisoned]
    stamped = images[others].clone()
    stamped[:, :, 6:, 6:] = 1
    suspects = CleanSet(torch.cat([images[120:520], stamped]), torch.cat([labels[120:520], torch.full((poisoned,), 7)]))
    return suspects, torch.arange(400 + poisoned) >= 400


class Planted(nn.Module):
    """Looks at nothing but the corner where that is white, else at how bright the whole image is."""

    def forward(self, images):
        corner = (40 * (images[:, 0, -2:, -2:].mean((1, 2)) - 0.9)).sigmoid()
        return torch.stack([(1 - corner) * images.mean((1, 2, 3)), corner], dim=1) * 20


def roc(scores, poisoned):
    from sklearn.metrics import roc_auc_score

    return roc_auc_score(poisoned, scores)


# Chance


def ranked(detector, own_label=False):
    """How well poisoned samples are told from all others, or from those of their label."""
    net, clean = backdoored(7)
    suspects, poisoned = planted(20)
    scores = detector.score(net, clean, Suspects.of(suspects), UNKNOWN)
    judged = suspects.labels == 7 if own_label else torch.ones(len(suspects), dtype=torch.bool)
    return roc(scores[judged], poisoned[judged])


@pytest.mark.parametrize(
    ("detector", "least"),
    [
        (Unlearned(), 0.9),
        (Unlearned(by="change"), 0.9),
        (Strip(blends=30), 0.9),
        (SpectralSignatures(), 0.7),
    ],
    ids=["unlearned", "unlearned by change", "strip", "spectral-signatures"],
)
def test_poisoned_samples_rank_above_others(detector, least):
    assert ranked(detector) > least


def test_clusters_tell_poisoned_samples_from_others_of_their_label():
    assert ranked(ActivationClustering(), own_label=True) > 0.9


def test_cognitive_distillation_ranks_images_above_of_which_little_matters():
    images = 0.5 + 0.3 * torch.rand(24, 1, 8, 8)
    images[:8, :, -2:, -2:] = 1
    images[8:, :, -2:, -2:] = 0.5
    suspects = CleanSet(images, torch.arange(24) % 2)
    scores = CognitiveDistillation().score(Planted(), suspects, Suspects.of(suspects), UNKNOWN)
    assert roc(scores, torch.arange(24) < 8) == 1


# Formulas, written out


def test_unlearned_written_out():
    net, clean = backdoored(7)
    suspects, _ = planted(5)
    how = Unlearned(unlearn_epochs=3)
    unlearned = how.unlearn(net, clean, 4, "plain").model
    odds = {}
    for name, model in (("before", net), ("after", unlearned)):
        chances = logits(model, suspects).double().softmax(1)
        own = chances[torch.arange(len(suspects)), suspects.labels]
        others = torch.stack(
            [sum(row[k] for k in range(10) if k != y) for row, y in zip(chances, suspects.labels, strict=True)]
        )
        odds[name] = own.log() - others.log()
    samples = Suspects.of(suspects)
    assert torch.allclose(how.score(net, clean, samples, UNKNOWN, seed=4).double(), odds["after"], atol=1e-3)
    change = Unlearned(unlearn_epochs=3, by="change").score(net, clean, samples, UNKNOWN, seed=4)
    assert torch.allclose(change.double(), odds["after"] - odds["before"], atol=1e-3)


def test_what_is_done_is_named_once(capsys):
    net, clean = backdoored(7)
    with reporting(Lines(every=0, quick=0)):
        Unlearned(unlearn_epochs=2, floor=0.01).score(net, clean, Suspects.of(clean), UNKNOWN)
    told = capsys.readouterr().err
    assert "unlearn: 1 of 2" in told
    assert "screen unlearned: " in told


def test_strip_written_out():
    net, clean = build("batchnorm"), make_clean(32)
    drawn = torch.randint(32, (3,), generator=torch.Generator().manual_seed(5))
    expected = []
    for image in clean.floats():
        entropies = []
        for overlay in drawn:
            chances = net((image + clean.floats()[overlay]).clamp(0, 1)[None]).softmax(1)[0].tolist()
            entropies.append(-sum(chance * math.log(chance) for chance in chances))
        expected.append(-sum(entropies) / 3)
    scores = Strip(blends=3, batch_size=7).score(net, clean, Suspects.of(clean), UNKNOWN, seed=5)
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def penultimate(net, clean):
    """What goes into the head of the tiny networks."""
    return (
        net[:-1](clean.floats()) if not isinstance(net[-1], nn.Sequential) else net[-1][:-1](net[:-1](clean.floats()))
    )


def test_spectral_signatures_written_out():
    net, clean = build("batchnorm"), make_clean(32)
    features = penultimate(net, clean).detach().double()
    expected = torch.empty(32, dtype=torch.float64)
    for label in range(4):
        mine = features[clean.labels == label]
        centered = mine - mine.mean(0)
        values, vectors = torch.linalg.eigh(centered.T @ centered)
        assert values[-1] == values.max()
        expected[clean.labels == label] = (centered @ vectors[:, -1]).square()
    scores = SpectralSignatures(batch_size=5).score(net, clean, Suspects.of(clean), UNKNOWN)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_activation_clustering_written_out():
    net, clean = build("batchnorm"), make_clean(32)
    features = penultimate(net, clean).detach()
    scores = ActivationClustering().score(net, clean, Suspects.of(clean), UNKNOWN)
    for label in range(4):
        mine = reduced(features[clean.labels == label], 10)
        got = scores[clean.labels == label]
        in_smaller = got > 0
        assert 0 < in_smaller.sum() <= 4
        small, large = mine[in_smaller].mean(0), mine[~in_smaller].mean(0)
        for point, score in zip(mine, got, strict=True):
            near, far = math.dist(point.tolist(), small.tolist()), math.dist(point.tolist(), large.tolist())
            assert float(score) == pytest.approx((far - near) / max(far, near), abs=1e-4)


def test_principal_components_keep_distances():
    features = torch.randn(9, 5)
    assert torch.allclose(torch.cdist(reduced(features, 10), reduced(features, 10)), torch.cdist(features, features))
    assert reduced(features, 2).shape == (9, 2)
    assert reduced(torch.randn(3, 5), 10).shape == (3, 3)


def test_signed_silhouette():
    points = torch.tensor([[0.0], [0.0], [2.0], [10.0], [10.0]])
    center = 2 / 3
    assert signed_silhouette(points, torch.tensor([1, 1, 1, 0, 0])).tolist() == pytest.approx(
        [center / 10 - 1] * 2 + [(2 - center) / 8 - 1] + [1, 1]
    )


def test_cognitive_distillation_written_out():
    net, clean = build("batchnorm"), make_clean(6)
    how = CognitiveDistillation(iterations=4, alpha=0.05, beta=0.7)
    scores = how.score(net, clean, Suspects.of(clean), UNKNOWN, seed=3)
    colors = torch.rand(4, 3, 1, 1, generator=torch.Generator().manual_seed(3))
    for image, score in zip(clean.floats(), scores, strict=True):
        free = torch.ones(8, 8, requires_grad=True)
        optimizer = torch.optim.Adam([free], lr=0.1, betas=(0.1, 0.1))
        for color in colors:
            mask = (torch.tanh(free) + 1) / 2
            kept = image * mask + (1 - mask) * color
            apart = (net(kept[None]) - net(image[None]).detach()).abs().sum() / 4
            down = sum((mask[i + 1] - mask[i]).square().sum() for i in range(7))
            right = sum((mask[:, i + 1] - mask[:, i]).square().sum() for i in range(7))
            optimizer.zero_grad()
            (apart + 0.05 * mask.sum() + 0.7 * (down + right) / 64).backward()
            optimizer.step()
        assert float(score) == pytest.approx(-float(((torch.tanh(free.detach()) + 1) / 2).sum()), abs=1e-3)


# What holds for every detector


@detectors
def test_model_and_random_state_stay(net, clean, detector):
    next(net.children()).train()
    before = Snapshot(net)
    scores = detector.score(net, clean, Suspects.of(clean), UNKNOWN, seed=4)
    before.assert_same()
    assert scores.shape == (32,)
    assert torch.equal(detector.score(net, clean, Suspects.of(clean), UNKNOWN, seed=4), scores)


@detectors
def test_model_and_random_state_stay_when_a_layer_raises(clean, detector):
    net = build("batchnorm")
    net[2].register_forward_hook(RaisesAt(2))
    before = Snapshot(net)
    with pytest.raises((ArithmeticError, ModelError), match="on purpose"):
        detector.score(net, clean, Suspects.of(clean), UNKNOWN)
    before.assert_same()


@detectors
def test_a_network_that_changes_itself_is_not_called(clean, detector):
    net = Counts()
    before = Snapshot(net)
    detector.score(net, clean, Suspects.of(clean), UNKNOWN)
    before.assert_same()


@detectors
def test_round_trip(detector):
    assert type(detector)(**json.loads(json.dumps(describe(detector)))) == detector
    assert type(detector).__doc__.count("References:") == 1


@detectors
def test_one_sample_of_a_label(detector):
    clean = make_clean(32)
    suspects = clean.take([0, 4, 8, 1])
    assert torch.isfinite(detector.score(build("plain"), clean, Suspects.of(suspects), UNKNOWN)).all()


@detectors
def test_same_samples_have_the_same_score(detector):
    clean = make_clean(32)
    suspects = clean.take([0, 1, 2, 3] * 3)
    scores = detector.score(build("batchnorm"), clean, Suspects.of(suspects), UNKNOWN)
    assert torch.allclose(scores.view(3, 4), scores[:4].expand(3, 4), atol=1e-4)


@detectors
@pytest.mark.parametrize("batch_size", [2, 5, 40])
def test_batches_do_not_matter(detector, batch_size):
    if detector.name == "unlearned":
        pytest.skip("batches of the unlearning itself have this size")
    clean = make_clean(32)
    other = type(detector)(**describe(detector) | {"batch_size": batch_size})
    expected, scores = (each.score(build("plain"), clean, Suspects.of(clean), UNKNOWN) for each in (detector, other))
    assert torch.allclose(scores, expected, atol=1e-4)


@detectors
def test_numbers_that_are_none(detector):
    class Breaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = build("plain")

        def forward(self, images):
            return self.net(images / (images.amax((1, 2, 3), keepdim=True) > 0))

    clean = make_clean(32)
    images = clean.floats()
    images[7] = 0
    with pytest.raises(ModelError, match="NaN or infinity"):
        screen(Breaks(), clean, (images, clean.labels), detectors=[detector], diagnosis=UNKNOWN)


@pytest.mark.parametrize("detector", [SpectralSignatures(), ActivationClustering()], ids=lambda each: each.name)
def test_features_need_a_last_layer(detector):
    class Bare(nn.Module):
        def forward(self, images):
            return images.flatten(1)[:, :4]

    class Unused(Bare):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4)

    clean = make_clean(32)
    for net, text in ((Bare(), "has none"), (Unused(), "head is not used")):
        with pytest.raises(ModelError, match=text):
            detector.score(net, clean, Suspects.of(clean), UNKNOWN)


def test_clustering_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ConfigError, match="needs scikit-learn: pip install"):
        ActivationClustering().score(build("plain"), make_clean(), Suspects.of(make_clean()), UNKNOWN)


# Suspects


@pytest.fixture
def folder(tmp_path):
    """A folder of images by class, larger than the chunks of these tests."""
    clean = make_clean(44)
    for row, (image, label) in enumerate(zip(clean.floats(), clean.labels.tolist(), strict=True)):
        (tmp_path / f"class-{label}").mkdir(exist_ok=True)
        pixels = (image * 255).round().byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).save(tmp_path / f"class-{label}" / f"{row:03}.png")
    return tmp_path


def test_a_stream_is_what_is_in_memory(folder, monkeypatch):
    held = CleanSet.load(folder)
    read = []
    monkeypatch.setattr("untrojan.scanners.suspects.CHUNK", 16)
    streamed = Suspects.load(folder)
    original = streamed.read
    object.__setattr__(streamed, "read", lambda rows: read.append(len(rows)) or original(rows))
    chunks = list(streamed.chunks(16))
    assert max(read) <= 16
    assert torch.equal(torch.cat([chunk.images for chunk in chunks]), held.images)
    assert torch.equal(streamed.labels, held.labels)
    assert torch.equal(streamed.take(torch.tensor([40, 3, 3])).images, held.images[[40, 3, 3]])
    net, clean = build("batchnorm"), make_clean()
    for name, cls in DETECTORS.items():
        how = cls(**QUICK.get(name, {}) | {"batch_size": 8})
        expected = how.score(net, clean, Suspects.of(held), UNKNOWN)
        assert torch.equal(how.score(net, clean, streamed, UNKNOWN), expected), name


def test_no_more_than_a_chunk_is_decoded_at_once():
    read = []

    def images(rows):
        read.append(len(rows))
        return torch.zeros(len(rows), 1, 2, 2, dtype=torch.uint8)

    suspects = Suspects(torch.zeros(2 * CHUNK + 5, dtype=torch.int64), images)
    seen = suspects.map(lambda batch, labels: labels, batch_size=500, detail="count")
    assert len(seen) == len(suspects)
    assert read == [CHUNK, 1, CHUNK, 5]


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("missing.npz", "no such file"),
        ((np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64)), "at least one sample, got none"),
        (torch.zeros(4, 1, 8, 8), "expected a CleanSet, a pair"),
        (([[0.0]], [0]), "expected images as"),
    ],
    ids=["missing", "empty", "images alone", "no images"],
)
def test_what_cannot_be_suspected(data, text):
    with pytest.raises(DataError, match=text):
        Suspects.of(data)


def test_labels_are_checked_before_any_image_is_read():
    with pytest.raises(DataError, match="expected labels as whole numbers"):
        Suspects(torch.zeros(3), lambda rows: pytest.fail("read"))
    with pytest.raises(DataError, match=r"got -1 to 2"):
        Suspects(torch.tensor([-1, 2]), lambda rows: pytest.fail("read"))


def test_images_of_another_size_further_on():
    def images(rows):
        return torch.zeros(len(rows), 1, 8 if rows[0] < 4 else 9, 8, dtype=torch.uint8)

    with pytest.raises(DataError, match="got 1x8x8 in row 0 and 1x9x8 from row 4"):
        list(Suspects(torch.zeros(8, dtype=torch.int64), images).chunks(4))


# Screening


@pytest.fixture(scope="module")
def screening():
    net, clean = backdoored(7)
    suspects, _ = planted(20)
    detectors = [Unlearned(), SpectralSignatures()]
    return screen(net, clean, suspects, detectors=detectors, diagnosis=FOUND, seed=2, shown=25)


def test_the_table(screening):
    table = screening.table().to_pydict()
    suspects, poisoned = planted(20)
    net, _ = backdoored(7)
    assert list(table) == ["index", "label", "predicted", "unlearned", "spectral-signatures", "rank"]
    assert table["index"] == list(range(420))
    assert table["label"] == suspects.labels.tolist()
    assert table["predicted"] == logits(net, suspects).argmax(1).tolist()
    ranked = sorted(range(420), key=lambda row: (-table["unlearned"][row], row))
    assert [table["rank"][row] for row in ranked] == list(range(1, 421))
    assert roc(-screening.ranks, poisoned) > 0.9


def test_the_record(screening):
    record = screening.record
    assert (record.kind, record.seed, record.method.name) == ("screening", 2, "unlearned")
    assert [other.name for other in record.others] == ["spectral-signatures"]
    assert record.diagnosis == FOUND
    assert record.suspects.images == sum(record.suspects.per_class) == 420
    assert record.disagreeing == int((screening.predicted != screening.suspects.labels).sum())
    assert [screening.ranks[sample.index] for sample in record.top] == list(range(1, 26))
    for sample in record.top:
        assert sample.label == screening.suspects.labels[sample.index]
        assert sample.scores == {name: float(scores[sample.index]) for name, scores in screening.scores.items()}
    assert {"screen", "unlearn"} <= record.seconds.keys()
    assert ScreeningRecord.model_validate_json(record.to_json()) == record


def test_what_is_saved(screening, tmp_path):
    screening.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scores.parquet", "report.html", "record.json"}
    assert pq.read_table(tmp_path / "out" / "scores.parquet") == screening.table()
    assert ScreeningRecord.load(tmp_path / "out" / "record.json") == screening.record
    with pytest.raises(ConfigError, match="not empty"):
        screening.save(tmp_path / "out")
    screening.save(tmp_path / "out", force=True)
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_model_and_random_state_stay_after_a_screening(clean):
    net = build("batchnorm")
    next(net.children()).train()
    before = Snapshot(net)
    how = {"detectors": [Unlearned(unlearn_epochs=1), Strip(blends=2)], "diagnosis": UNKNOWN}
    first, second = (screen(net, clean, clean, **how) for _ in range(2))
    before.assert_same()
    assert first.table() == second.table()
    assert first.record.diagnosis == UNKNOWN
    assert isinstance(first, Screening)


def test_random_state_stays_though_the_model_draws_numbers(clean):
    net = build("batchnorm")
    noisy = Returns(lambda images: net(images) + torch.rand(1))
    before = Snapshot(noisy)
    screen(noisy, clean, clean, detectors=[Strip(blends=1)], diagnosis=UNKNOWN)
    before.assert_same()


def test_names_of_classes_may_be_more_than_the_model_has(clean):
    named = CleanSet(clean.images, clean.labels, ("a", "b\nlabel 2", "c", "d", "e"))
    done = screen(build("plain"), named, clean, detectors=[Strip(blends=1)], diagnosis=UNKNOWN).record
    assert (done.model.classes, done.clean.per_class, done.suspects.per_class) == (4, [8] * 4, [8] * 4)
    assert done.label(1) == r"1 ('b\nlabel 2')"
    suspects = make_clean(classes=5)
    with pytest.raises(DataError, match="go up to 4, but the model has 4 classes, 0 to 3"):
        screen(build("plain"), named, suspects, detectors=[Strip(blends=1)], diagnosis=UNKNOWN)


def test_a_path_is_streamed(folder):
    done = screen(build("batchnorm"), make_clean(), folder, detectors=[Strip(blends=2)], diagnosis=UNKNOWN, shown=99)
    assert len(done.record.top) == 44
    assert done.record.suspects.path == str(folder)
    assert done.record.suspects.class_names == [f"class-{label}" for label in range(4)]
    assert done.record.label(2) == "2 (class-2)"


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        ({"suspects": make_clean(shape=(1, 8, 8))}, DataError, "size of the clean images, 3x8x8, got 1x8x8"),
        ({"suspects": make_clean(classes=5)}, DataError, "go up to 4, but the model has 4 classes, 0 to 3"),
        ({"clean": make_clean(classes=3)}, DataError, "no image of class 3"),
        ({"detectors": ["strip"]}, ConfigError, "expected a method of kind Detector, got 'strip'"),
        ({"detectors": []}, ConfigError, "at least one detector, and each once, got none"),
        ({"detectors": [Strip(), Strip(blends=2)]}, ConfigError, "got strip, strip"),
        ({"shown": 0}, ConfigError, "at least 1 sample"),
        ({"seed": -1}, ConfigError, "seed of at least 0"),
    ],
    ids=["size", "labels", "clean", "text", "no detector", "twice", "shown", "seed"],
)
def test_what_cannot_be_screened(how, error, text):
    given = {"clean": make_clean(), "suspects": make_clean(), "detectors": [Strip(blends=1)]} | how
    with pytest.raises(error, match=text):
        screen(build("plain"), given.pop("clean"), given.pop("suspects"), diagnosis=UNKNOWN, **given)


def test_classes_in_another_order():
    clean = copy.copy(make_clean())
    named = [CleanSet(clean.images, clean.labels, names) for names in ("abcd", "bacd")]
    with pytest.raises(DataError, match="name their classes differently"):
        screen(build("plain"), named[0], named[1], diagnosis=UNKNOWN)
