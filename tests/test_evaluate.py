import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import Returns
from torch import nn

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, ModelError, RecordError
from untrojan.lab.attack import Attack
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.attacks.lira import LIRA
from untrojan.lab.evaluate import Scores, der, evaluate
from untrojan.progress import timing
from untrojan.record import MethodInfo, Rate
from untrojan.registry import parse
from untrojan.sources import load

SHARED = Path(__file__).parents[2] / "shared"
K = 4
ATTACK = BadNets(size=2)


def make_set(labels=None, count=37, classes=K):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (count,), generator=generator) if labels is None else torch.tensor(labels)
    return CleanSet(torch.rand(len(labels), 1, 4, 4, generator=generator), labels)


def make_model(seed=0, classes=K):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, classes),
    )


def counted(model, clean, target):
    """Count every metric one image at a time: clean hits and totals, then ASR, RA and images attacked."""
    model.eval()
    acc = [0, 0]
    rest = [0, 0]
    asr = ra = attacked = 0
    for image, label in zip(clean.floats(), clean.labels.tolist(), strict=True):
        triggered = image[None].clone()
        triggered[:, :, 2:, 2:] = 1
        with torch.no_grad():
            predicted = model(image[None]).argmax().item()
            fooled = model(triggered).argmax().item()
        wanted = (label + 1) % K if target == "all-to-all" else target
        acc[0] += predicted == label
        acc[1] += 1
        if wanted != label:
            rest[0] += predicted == label
            rest[1] += 1
            attacked += 1
            asr += fooled == wanted
            ra += fooled == label
    return acc, rest, (asr, attacked), (ra, attacked)


@pytest.mark.parametrize("target", range(K))
def test_success_over_all_images_is_that_over_others_and_the_triggered_accuracy_of_the_target(target):
    """As published: ((n - n_t) ASR + n_t A_t) / n."""
    model, clean = make_model().eval(), make_set()
    scores = evaluate(model, clean, ATTACK, target)
    theirs = clean.take(clean.labels == target)
    kept = (model(ATTACK.trigger(theirs.floats())).argmax(1) == target).double().mean().item()
    share = ((37 - len(theirs)) * scores.asr.value + len(theirs) * kept) / 37
    assert scores.asr_all.value == pytest.approx(share)
    assert scores.asr_all.total == 37
    assert evaluate(model, clean, ATTACK, "all-to-all").asr_all is None


@pytest.mark.parametrize("target", [0, 1, 2, 3, "all-to-all"])
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_against_a_plain_loop(target, seed):
    model, clean = make_model(seed), make_set()
    scores = evaluate(model, clean, ATTACK, target)
    acc, rest, asr, ra = counted(model, clean, target)
    assert scores.acc == Rate.of(*acc)
    assert scores.acc_without_target == (None if target == "all-to-all" else Rate.of(*rest))
    assert scores.asr == Rate.of(*asr)
    assert scores.ra == Rate.of(*ra)
    assert asr[0] + ra[0] <= asr[1]
    assert scores.images == 37
    assert scores.images_sha256 == clean.sha256
    assert scores.attack == MethodInfo(
        name="badnets", fields={"pattern": "square", "size": 2, "row": None, "col": None, "value": 1.0}
    )
    assert scores.target == target


def test_without_an_attack_there_is_accuracy_only():
    scores = evaluate(make_model(), make_set())
    assert scores.acc.total == 37
    left = {name for name, value in scores if value is None}
    assert left == {
        *("acc_without_target", "asr", "asr_without_trigger", "asr_all", "ra", "der"),
        *("attack", "attack_sha256", "target"),
    }


class Constant(nn.Module):
    """Always gives one class, or NaN."""

    def __init__(self, label, classes=K, value=1.0):
        super().__init__()
        self.row = torch.zeros(classes)
        self.row[label] = value

    def forward(self, images):
        return self.row.expand(len(images), -1)


def test_a_model_of_one_answer():
    clean = make_set([0, 0, 1, 2, 3])
    scores = evaluate(Constant(0), clean, ATTACK, 0)
    assert (scores.acc.count, scores.acc.total) == (2, 5)
    assert (scores.acc_without_target.count, scores.acc_without_target.total) == (0, 3)
    assert (scores.asr.count, scores.asr.total) == (3, 3)
    assert scores.asr_without_trigger == scores.asr
    assert (scores.ra.count, scores.ra.total) == (0, 3)


def test_all_to_all_counts_modulo_the_classes_of_the_model_not_of_the_set():
    clean = make_set([0, 1, 2, 2, 2])
    assert evaluate(Constant(3), clean, ATTACK, "all-to-all").asr.count == 3
    assert evaluate(Constant(0), clean, ATTACK, "all-to-all").asr.count == 0
    assert evaluate(Constant(0, classes=3), clean, ATTACK, "all-to-all").asr.count == 3


def test_rates_over_no_images_are_null():
    scores = evaluate(Constant(0), make_set([2, 2, 2]), ATTACK, 2)
    assert scores.acc.value == 0
    assert scores.asr == scores.ra == scores.acc_without_target == Rate.of(0, 0)
    assert json.loads(scores.model_dump_json())["asr"]["value"] is None
    assert evaluate(Constant(0), make_set([2, 2, 2]), ATTACK, 2, before=scores).der is None


def test_the_batch_size_makes_no_difference():
    model, clean = make_model(), make_set()
    results = [evaluate(model, clean, ATTACK, 1, batch_size=size) for size in (1, 5, 36, 37, 38, 1000)]
    assert all(result == results[0] for result in results)


def test_a_batch_size_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="batch size"):
        evaluate(make_model(), make_set(), batch_size=0)


def test_the_model_is_left_as_it_was():
    model = make_model()
    model.train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    draws = torch.get_rng_state()
    evaluate(model, make_set(), ATTACK, 1)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def test_the_mode_comes_back_when_the_trigger_does_not_fit():
    model = make_model().train()
    with pytest.raises(DataError, match="inside of the 4x4 image"):
        evaluate(model, make_set(), BadNets(size=5), 1)
    assert all(module.training for module in model.modules())


def test_the_same_weights_score_the_same_in_either_mode():
    model, clean = make_model(), make_set()
    assert evaluate(model.train(), clean, ATTACK, 1) == evaluate(model.eval(), clean, ATTACK, 1)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (Constant(0, value=torch.nan), "NaN or infinite logits"),
        (Constant(0, classes=1), r"K >= 2 from the model, got shape \(37, 1\)"),
        (nn.Identity(), r"expected floating-point logits .* got torch.float32 of \(2, 1, 4, 4\)"),
        (nn.Flatten(0), r"expected floating-point logits .* got torch.float32 of \(32,\)"),
        (Returns(lambda images: (images.flatten(1),)), "expected floating-point logits .* got tuple"),
        (nn.Linear(3, 2), "the model cannot take images of 1x4x4"),
    ],
)
def test_models_that_give_no_logits_are_refused(model, text):
    with pytest.raises(ModelError, match=text):
        evaluate(model, make_set(), ATTACK, 0)


def test_a_set_of_nothing_is_refused():
    with pytest.raises(DataError, match="at least one image to measure the model on, got none"):
        evaluate(make_model(), CleanSet(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long)))


def test_nan_on_triggered_images_alone_is_refused():
    class Fragile(nn.Module):
        def forward(self, images):
            out = torch.ones(len(images), K)
            out[images[:, 0, -1, -1] == 1] = torch.nan
            return out

    evaluate(Fragile(), make_set())
    with pytest.raises(ModelError, match="finite logits"):
        evaluate(Fragile(), make_set(), ATTACK, 0)


def test_a_target_of_numpy_is_one_of_python():
    ours, theirs = (evaluate(make_model(), make_set(), ATTACK, target) for target in (1, np.int64(1)))
    assert theirs.model_dump_json() == ours.model_dump_json()


@pytest.mark.parametrize("target", [-1, K, "all-to-one"])
def test_targets_that_do_not_exist_are_refused(target):
    with pytest.raises(ConfigError, match="expected target"):
        evaluate(make_model(), make_set(), ATTACK, target)


def test_attack_and_target_come_together():
    with pytest.raises(ConfigError, match="attack and target together, got only one of them"):
        evaluate(make_model(), make_set(), attack=ATTACK)
    with pytest.raises(ConfigError, match="attack and target together, got only one of them"):
        evaluate(make_model(), make_set(), target=0)


def test_labels_beyond_the_model_are_refused():
    with pytest.raises(DataError, match="labels from 0 to 1, the model's classes, got label 3"):
        evaluate(make_model(classes=2), make_set([0, 3]))


def test_the_work_is_timed():
    with timing() as seconds:
        evaluate(make_model(), make_set(), ATTACK, 0)
    assert list(seconds) == ["evaluate"]


def test_scores_survive_json_and_cannot_be_changed():
    scores = evaluate(make_model(), make_set(), ATTACK, "all-to-all")
    assert Scores.model_validate_json(scores.model_dump_json()) == scores
    with pytest.raises(ValidationError, match="frozen"):
        scores.target = 3


def scored(acc, asr, **changes):
    """Scores of the given accuracy and attack success rate, in thousandths."""
    base = Scores(acc=Rate.of(acc, 1000), asr=Rate.of(asr, 1000), target=0, images=1000, images_sha256="0")
    return base.model_copy(update=changes)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((900, 1000), (900, 1000), 0.5),
        ((900, 1000), (900, 0), 1.0),
        ((900, 1000), (800, 0), 0.95),
        ((900, 1000), (0, 1000), 0.05),
        ((1000, 500), (0, 500), 0.0),
        ((900, 500), (950, 500), 0.5),
        ((900, 500), (900, 700), 0.5),
        ((848, 995), (842, 31), 0.979),
    ],
)
def test_der_values(before, after, expected):
    assert der(scored(*before), scored(*after)) == pytest.approx(expected, abs=1e-12)


def test_der_falls_as_accuracy_is_lost():
    ratings = [der(scored(900, 990), scored(acc, 20)) for acc in range(1000, -1, -50)]
    assert all(later <= sooner for sooner, later in pairwise(ratings))
    assert ratings[2] > ratings[3] > ratings[-1]
    assert all(0 <= rating <= 1 for rating in ratings)


def test_evaluate_adds_der():
    clean = make_set()
    before = evaluate(make_model(0), clean, ATTACK, 1)
    after = evaluate(make_model(1), clean, ATTACK, 1, before=before)
    saved = max(0, before.asr.value - after.asr.value)
    lost = max(0, before.acc.value - after.acc.value)
    assert after.der == pytest.approx((saved - lost + 1) / 2)
    assert der(before, after) == after.der
    assert before.der is None


def test_scores_of_different_things_have_no_der():
    clean = make_set()
    before = evaluate(make_model(), clean, ATTACK, 1)
    with pytest.raises(RecordError, match="same target before and after, got 1 and 2"):
        evaluate(make_model(), clean, ATTACK, 2, before=before)
    with pytest.raises(RecordError, match="same attack"):
        evaluate(make_model(), clean, BadNets(size=3), 1, before=before)
    with pytest.raises(RecordError, match="same images"):
        evaluate(make_model(), make_set(count=36), ATTACK, 1, before=before)
    with pytest.raises(RecordError, match="same attack"):
        evaluate(make_model(), clean, before=before)


def test_scores_of_different_learned_triggers_have_no_der():
    clean = make_set()
    first, second = (LIRA().begun(channels=1) for _ in range(2))
    before = evaluate(make_model(), clean, first, 1)
    assert evaluate(make_model(), clean, first, 1, before=before).der == 0.5
    with pytest.raises(RecordError, match="same trigger before and after"):
        evaluate(make_model(), clean, second, 1, before=before)


def test_there_is_no_der_without_an_attack():
    before = evaluate(make_model(), make_set())
    assert evaluate(make_model(), make_set(), before=before).der is None
    assert der(before, before) is None


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_against_newcombe_1998_table_1(count, total, low, high):
    rate = Rate.of(count, total)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no published checkpoints in {SHARED}")
@pytest.mark.parametrize(
    ("checkpoint", "net", "spec", "target", "acc", "asr"),
    [
        pytest.param(
            "ibau-cifar10-badnets-t8.pth",
            "small-vgg",
            "badnets:size=4,row=27,col=27,value=1",
            8,
            0.846,
            0.981,
            marks=pytest.mark.slow,
        ),
        ("abl-cifar10-grid-t0.tar", "wrn-16-1", "badnets:pattern=grid", 0, 0.858, 0.999),
        pytest.param(
            "ibau-cifar10-trojan_sq-t2.pth",
            "small-vgg",
            f"additive:image={SHARED}/checkpoints/triggers/trojan_sq.png",
            2,
            0.849,
            0.995,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "ibau-cifar10-l0_inv-t0.pth",
            "small-vgg",
            f"masked:image={SHARED}/checkpoints/triggers/l0_inv.png,mask={SHARED}/checkpoints/triggers/l0_inv_mask.npy",
            0,
            0.837,
            1.0,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["badnets", "grid", "trojan_sq", "l0_inv"],
)
def test_published_backdoors_score_as_measured_before(checkpoint, net, spec, target, acc, asr):
    model = load(SHARED / "checkpoints" / checkpoint, net)
    clean = CleanSet.load(SHARED / "data" / "cifar10" / "test-lossless.parquet")
    scores = evaluate(model, clean, parse(spec, "untrojan.lab.attacks", Attack), target)
    assert scores.images == 1017
    assert scores.acc.value == pytest.approx(acc, abs=0.005)
    assert scores.asr.value == pytest.approx(asr, abs=0.005)
    assert scores.asr.value + scores.ra.value <= 1


@pytest.mark.parametrize("attack", ["badnets", BadNets])
def test_an_attack_is_no_text(attack):
    with pytest.raises(ConfigError, match="expected a method of kind Attack, got "):
        evaluate(make_model(), make_set(), attack, 0)


def test_images_are_a_clean_set():
    with pytest.raises(DataError, match="expected clean images as a CleanSet, got str"):
        evaluate(make_model(), "images.npz")
