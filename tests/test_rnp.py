"""RNP beyond the contract of every method."""

import copy

import pytest
import torch
from tiny import CLASSES, UNLIKE, Snapshot, backdoored, build, make_clean, train
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses.rnp import RNP
from untrojan.errors import ConfigError, ModelError, UnreliableWarning
from untrojan.mask import Mask
from untrojan.model import correct
from untrojan.record import Diagnosis, Record, Target
from untrojan.scanners import unlearning
from untrojan.scanners.unlearning import UnlearningScanner

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("short_searches")]

unchecked = pytest.mark.usefixtures("no_checks")

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def rnp(**fields):
    return RNP(**{"unlearn_epochs": 4, "recover_epochs": 4} | fields)


def few_digits():
    net, clean = backdoored(7)
    return net, clean.take(range(100))


def scores_of(repair):
    return torch.cat([torch.tensor(layer.values) for layer in repair.record.layers])


def changed_of(repair):
    return torch.cat([torch.isin(torch.arange(len(x.values)), torch.tensor(x.changed)) for x in repair.record.layers])


@unchecked
@pytest.mark.parametrize("variant", ["fixed", "released"])
@pytest.mark.parametrize("threshold", [-0.5, 0, 0.33])
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


@unchecked
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


@unchecked
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


@pytest.mark.parametrize(("lr", "alpha"), [(0.5, 1), (2.5, 0.2)])
def test_recovery_written_out(lr, alpha, clean):
    """Descent on the cross-entropy over the scales of BatchNorm in training mode, clipped to [0, 1] after each step.

    A factor alpha of the loss, as in the released code, is one of the learning rate.
    """
    method = rnp(recover_lr=0.5, recover_epochs=6, batch_size=8)
    unlearned, _ = method.unlearn(train(build("batchnorm"), clean, epochs=5), clean, seed=0, view="plain")
    slow = copy.deepcopy(unlearned).train()
    norms = slow[1], slow[4]
    scales = [norm.weight.detach().clone() for norm in norms]
    masks, speeds = [torch.ones(6), torch.ones(6)], [torch.zeros(6), torch.zeros(6)]
    seen = [[mask] for mask in masks]
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        for images, labels in method.viewed(clean, generator, "crop-flip"):
            slow.zero_grad()
            (alpha * nn.functional.cross_entropy(slow(images), labels)).backward()
            for i, norm in enumerate(norms):
                speeds[i] = 0.9 * speeds[i] + norm.weight.grad * scales[i]
                masks[i] = (masks[i] - lr * speeds[i]).clamp(0, 1)
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


@unchecked
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


@unchecked
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
    repair = RNP(select="threshold", threshold=0).repair(net, clean, UnlearningScanner().scan(net, clean))
    with torch.no_grad():
        fooled, still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, repair.model))
    assert fooled > 0.9
    assert still < 0.2
    assert repair.record.diagnosis.targets[0].label == 7
    assert repair.record.checks[0].name == "keeps clean accuracy"


def test_released_needs_a_rule():
    with pytest.raises(ConfigError, match="the released code has no such rule; give select threshold or count"):
        RNP(variant="released")
    assert RNP(variant="released", select="count").count == 20


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
        RNP(**fields)


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_a_floor_that_is_not_reached_warns_and_delivers(variant):
    net, clean = few_digits()
    method = rnp(variant=variant, select="count", count=3, unlearn_epochs=1, unlearn_lr=1e-9)
    with pytest.warns(UnreliableWarning, match=r"unlearning ended at an accuracy of 0\.\d\d, not at the floor of 0.20"):
        repair = method.repair(net, clean, GIVEN)
    assert repair.record.units_changed == 3
    assert all("not at the floor" in text for text in repair.record.warnings)
    assert len(repair.record.warnings) == (3 if variant == "fixed" else 1)


@unchecked
@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("given", [GIVEN, pytest.param(None, marks=pytest.mark.slow)], ids=["given", "looked"])
@pytest.mark.parametrize("fields", [{"unlearn_lr": 1e30}, {"recover_lr": 1e30}], ids=["unlearn", "recover"])
def test_divergence_does_not_crash(name, given, fields, clean):
    net = build(name)
    repair = rnp(budget=0.5, unlearn_epochs=2, **{"recover_epochs": 2} | fields).repair(net, clean, given)
    assert all(torch.isfinite(value).all() for value in repair.model.state_dict().values())
    assert Record.model_validate_json(repair.record.to_json()) == repair.record
    assert repair.record.status in ("inconclusive", "failed")


@unchecked
@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize(("count", "batch_size"), [(4, 128), (9, 8), (17, 4), (33, 16), (13, 3), (7, 2)])
def test_few_images(name, count, batch_size):
    method = rnp(select="count", count=1, batch_size=batch_size, unlearn_epochs=1, recover_epochs=1)
    repair = method.repair(build(name), make_clean(count), GIVEN)
    assert repair.record.units_changed == 1
    assert repair.record.before.accuracy.total == count


@unchecked
@pytest.mark.parametrize(("variant", "count"), [("fixed", 2), ("fixed", 3), ("released", 33)])
def test_no_batch_holds_a_single_image(variant, count):
    classes = min(count, CLASSES)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes)).eval()
    method = rnp(variant=variant, select="count", count=1, batch_size=32, unlearn_epochs=1, recover_epochs=1)
    assert method.repair(net, make_clean(count, classes), GIVEN).record.units_changed == 1


def test_one_image_alone_is_shown_twice():
    clean = make_clean().take([5])
    ((images, labels),) = rnp().viewed(clean, torch.Generator().manual_seed(0), "plain")
    assert torch.equal(images, clean.floats().repeat(2, 1, 1, 1))
    assert labels.tolist() == [1, 1]


def test_no_backdoor_changes_nothing():
    net, clean = few_digits()
    nothing = Diagnosis(verdict="not_found", rule="given", targets=[], runs=[])
    repair = rnp().repair(net, clean, nothing)
    assert repair.record.status == "nothing_to_repair"
    assert not any("changed nothing" in text for text in repair.record.warnings)
    assert same(repair.model.state_dict(), net.state_dict())
    assert repair.record.before == repair.record.after


def test_scores_do_not_depend_on_the_callers_mode_and_leave_the_random_state():
    net, clean = build("dropout"), make_clean()
    method = rnp(unlearn_epochs=1, recover_epochs=1)
    before = Snapshot(net)
    scores = method.score(net, clean, seed=3)
    before.assert_same()
    with torch.inference_mode():
        assert method.score(net, clean, seed=3).equal(scores)


def test_nothing_to_mask():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    with pytest.raises(ModelError, match="nothing to mask by neuron"):
        rnp().repair(net, make_clean(), GIVEN)


@unchecked
def test_order_of_the_images_in_the_record():
    """Before and after are counted over every image once, whatever the folds."""
    net, clean = few_digits()
    shuffled = CleanSet(clean.images.flip(0), clean.labels.flip(0))
    for data in (clean, shuffled):
        record = rnp(folds=3, select="count").repair(net, data, GIVEN).record
        assert record.before.accuracy.count == int(correct(net, clean).sum())
        assert record.after.accuracy.total == len(clean)


def test_released_shows_whole_batches_cropped_and_flipped_and_clips_nothing(monkeypatch):
    """The released code clips the gradient at a norm of 20, but before it is computed, so that nothing is clipped."""
    clean, sizes, clips, varied = make_clean(44), [], [], []
    run, crop_flip = unlearning.fit, unlearning.VIEWS["crop-flip"]

    def spy(parameters, step, batches, *rest, clip=None, **named):
        def counted():
            made = list(batches())
            sizes.append([len(labels) for _, labels in made])
            return made

        clips.append(clip)
        return run(parameters, step, counted, *rest, clip=clip, **named)

    def view(images, generator):
        varied.append(len(images))
        return crop_flip(images, generator)

    monkeypatch.setattr(unlearning, "fit", spy)
    monkeypatch.setattr("untrojan.defenses.rnp.fit", spy)
    monkeypatch.setitem(unlearning.VIEWS, "crop-flip", view)
    rnp(variant="released", select="count", batch_size=16, unlearn_epochs=1).learn(build("batchnorm"), clean, 0)
    assert clips == [None, None]
    assert {tuple(each) for each in sizes} == {(16, 16, 12)}
    assert len(varied) == 3 * len(sizes)
