"""ANP beyond the contract of every method."""

import copy

import pytest
import torch
from tiny import NETS, UNLIKE, Snapshot, backdoored, build, make_clean, train
from torch import nn

from untrojan.augmentation import crop_flip
from untrojan.defenses.anp import ANP
from untrojan.errors import ConfigError, ModelError
from untrojan.mask import Mask
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])

SCALED = [name for name in NETS if name != "no-affine"]

variants = pytest.mark.parametrize("variant", ["fixed", "released"])


def anp(**fields):
    fields = {"iterations": 5, "batch_size": 8} | fields
    return ANP(**({"select": "count"} if fields.get("variant") == "released" else {}) | fields)


def flat(mask):
    return torch.cat(list(mask.values.values()))


def learned(variant, iterations=5, name="batchnorm", **fields):
    clean = make_clean()
    net = train(build(name), clean, epochs=5)
    return anp(variant=variant, iterations=iterations, **fields).score(net, clean, seed=0)


@variants
@pytest.mark.parametrize("anp_steps", [1, 3])
def test_learning_written_out(clean, variant, anp_steps):
    """Over the scales and biases of BatchNorm in training mode, by hand: random start, sign ascent, descent, clip."""
    method = anp(variant=variant, lr=2, iterations=12, anp_steps=anp_steps, eps=0.3, alpha=0.4)
    net = train(build("batchnorm"), clean, epochs=5)
    slow = copy.deepcopy(net).train()
    norms = slow[1], slow[4]
    scales, biases = [norm.weight.detach().clone() for norm in norms], [norm.bias.detach().clone() for norm in norms]
    generator = torch.Generator().manual_seed(0)
    all_images = clean.floats()

    def gradients(images, labels, factors):
        for norm, scale, bias, (m, x) in zip(norms, scales, biases, factors, strict=True):
            norm.weight.data, norm.bias.data = scale * m, bias * x
        slow.zero_grad()
        nn.functional.cross_entropy(slow(images), labels).backward()
        pairs = zip(norms, scales, biases, strict=True)
        return [(norm.weight.grad * scale, norm.bias.grad * bias) for norm, scale, bias in pairs]

    masks, speeds, zeros = [torch.ones(6)] * 2, [torch.zeros(6)] * 2, [torch.zeros(6)] * 2
    largest = 0.0
    for _ in range(12):
        drawn = torch.randint(len(clean), (8,), generator=generator)
        images, labels = all_images[drawn], clean.labels[drawn]
        if variant == "released":
            images = crop_flip(images, generator)
        noise = [[torch.empty(6).uniform_(-0.3, 0.3, generator=generator) for _ in "mx"] for _ in norms]
        for _ in range(anp_steps):
            slopes = gradients(images, labels, [(m + d, 1 + x) for m, (d, x) in zip(masks, noise, strict=True)])
            for layer, slope in zip(noise, slopes, strict=True):
                layer[:] = [value + 0.3 / anp_steps * each.sign() for value, each in zip(layer, slope, strict=True)]
                if variant == "fixed":
                    layer[:] = [value.clamp(-0.3, 0.3) for value in layer]
        largest = max(largest, max(float(value.abs().max()) for layer in noise for value in layer))
        robust = gradients(images, labels, [(m + d, 1 + x) for m, (d, x) in zip(masks, noise, strict=True)])
        natural = gradients(images, labels, [(m, torch.ones(6)) for m in masks])
        for i in range(2):
            speeds[i] = 0.9 * speeds[i] + 0.4 * natural[i][0] + 0.6 * robust[i][0]
            masks[i] = (masks[i] - 2 * speeds[i]).clamp(0, 1)
            zeros[i] = zeros[i] + (masks[i] == 0)
    scores = torch.cat(masks)
    assert (scores == 0).any()
    assert ((scores > 0) & (scores < 1)).any()
    if variant == "fixed":
        assert largest <= 0.3 + 1e-6
        scores = torch.where(scores > 0, scores, -torch.cat(zeros) / 12)
    else:
        assert 0.3 < largest <= 0.6
        scores = (scores * 1e4).round() / 1e4
    assert torch.allclose(flat(method.score(net, clean, seed=0)), scores, atol=1.1e-4)


@variants
@pytest.mark.parametrize("name", SCALED)
def test_scores_of_all_networks(name, variant):
    net, clean = build(name), make_clean()
    before = copy.deepcopy(net.state_dict())
    scores = anp(variant=variant).score(net, clean, seed=0)
    assert not scores.equal(Mask.ones(net, "neuron"))
    assert scores.values.keys() == Mask.ones(net, "neuron").values.keys()
    assert flat(scores).min() >= (0 if variant == "released" else -1)
    assert flat(scores).max() <= 1
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("name", SCALED)
def test_perturbation_covers_scales_and_their_biases(name, monkeypatch, clean):
    net = build(name)
    mask = Mask.ones(net, "neuron")
    seen = []
    call = Mask.call
    monkeypatch.setattr(Mask, "call", lambda self, *args: seen.append(self) or call(self, *args))
    anp(iterations=1).score(net, clean, seed=0)
    start, plain, perturbed = seen
    assert start.values.keys() == perturbed.values.keys()
    assert plain.values.keys() == mask.values.keys()
    known = dict(net.named_parameters())
    biases = {name[: -len("weight")] + "bias" for name in mask.values}
    assert set(perturbed.values) - set(mask.values) == biases & set(known)
    for values in (start, perturbed):
        assert 0.3 < max(float((value.detach() - 1).abs().max()) for value in values.values.values()) <= 0.4 + 1e-6


def test_three_passes_per_image_drawn(clean):
    net, seen = build("batchnorm"), []
    net.register_forward_hook(lambda *args: seen.append(len(args[2])))
    anp(iterations=7, batch_size=16).score(net, clean, seed=0)
    assert sum(seen) == 3 * 7 * 16


def test_only_scales_are_zeroed(clean):
    net = train(build("batchnorm"), clean, epochs=5)
    repair = anp(select="count", count=4).repair(net, clean, GIVEN)
    masked = {f"{layer.name}.weight": layer.changed for layer in repair.record.layers}
    assert sum(map(len, masked.values())) == repair.record.units_changed == 4
    for name, before in net.state_dict().items():
        expected = before.clone()
        if name in masked:
            expected[masked[name]] = 0
        assert torch.equal(repair.model.state_dict()[name], expected)


@variants
@pytest.mark.parametrize("threshold", [0, 0.33])
def test_threshold_prunes_scores_at_or_below_it(variant, threshold):
    net, clean = backdoored(7)
    method = anp(variant=variant, select="threshold", threshold=threshold, iterations=20)
    record = method.repair(net, clean.take(range(100)), GIVEN).record
    scores = torch.cat([torch.tensor(layer.values) for layer in record.layers])
    assert record.units_changed == (scores <= threshold).sum()
    assert record.units_total == len(scores)
    assert record.after.held_out == (variant == "fixed")
    assert {*ANP.thresholds, threshold} >= {0, 0.05, 0.9, threshold}
    assert len(record.selection.curve) == len({*ANP.thresholds, threshold})


def test_pruning_weakens_the_backdoor():
    net, clean = backdoored(7)
    images = clean.floats()
    images[:, :, 6:, 6:] = 1
    others = clean.labels != 7
    pruned = [ANP(iterations=40).score(net, clean, seed).count(10).bake(net) for seed in range(3)]
    with torch.no_grad():
        fooled, *still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, *pruned))
        right = [(model(clean.floats()).argmax(1) == clean.labels).float().mean() for model in pruned]
    assert fooled > 0.9
    assert sum(still) / 3 < 0.3
    assert sum(right) / 3 > 0.6


def test_alpha_1_needs_no_robustness():
    """Then the perturbation has no say, whatever its size."""
    one, other = (learned("fixed", 10, alpha=1, eps=eps) for eps in (0.01, 1.0))
    assert all(torch.allclose(value, other.values[name], atol=1e-6) for name, value in one.values.items())


def test_released_needs_a_rule():
    with pytest.raises(ConfigError, match="the released code has no such rule; give select threshold or count"):
        ANP(variant="released")


@pytest.mark.parametrize(
    "fields",
    [
        {"threshold": -1.1},
        {"lr": 0},
        {"iterations": 0},
        {"batch_size": 1},
        {"augment": "blur"},
        {"eps": 0},
        {"anp_steps": 0},
        {"alpha": 1.1},
        {"alpha": -0.1},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^anp: `{next(iter(fields))}`"):
        ANP(**fields)


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("fields", [{"lr": 1e30}, {"eps": 1e30}, {"eps": 1e38, "lr": 1e38}])
def test_divergence_does_not_crash(name, fields, clean):
    net = build(name)
    scores = anp(**fields).score(net, clean, seed=0)
    assert flat(scores).isfinite().all()
    assert flat(scores).abs().max() <= 1


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize(("count", "batch_size"), [(1, 2), (2, 128), (9, 8)])
def test_few_images(name, count, batch_size):
    scores = anp(batch_size=batch_size, augment="crop-flip").score(build(name), make_clean(count), seed=0)
    assert scores.total == Mask.ones(build(name), "neuron").total
    assert flat(scores).isfinite().all()


def test_one_image_per_class():
    repair = anp(select="count", count=1).repair(build("batchnorm"), make_clean(4), GIVEN)
    assert repair.record.units_changed == 1
    assert repair.record.before.accuracy.total == 4


def test_scores_do_not_depend_on_the_callers_mode_and_leave_the_random_state(clean):
    net = build("dropout")
    before = Snapshot(net)
    scores = anp().score(net, clean, seed=3)
    before.assert_same()
    with torch.inference_mode():
        assert anp().score(net, clean, seed=3).equal(scores)


def test_nothing_to_mask(clean):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ModelError, match="nothing to mask by neuron"):
        anp().repair(net, clean, GIVEN)


def batches_of(images, **fields):
    """The images that go through the network in one iteration: for the noise, without it and with it."""
    seen = []
    net = build("batchnorm")
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    anp(iterations=1, **fields).score(net, images, seed=0)
    return seen


@pytest.mark.parametrize("size", [32, 64])
def test_few_images_are_all_of_each_batch(size):
    clean = make_clean(32)
    seen = batches_of(clean, batch_size=size)
    assert len(seen) == 3
    assert all(torch.equal(images, clean.floats()) for images in seen)


@pytest.mark.parametrize("fields", [{"augment": "crop-flip"}, {"variant": "released"}])
def test_few_images_are_drawn_where_they_are_varied(fields):
    assert [len(images) for images in batches_of(make_clean(32), batch_size=64, **fields)] == [64] * 3


@pytest.mark.parametrize(("count", "size"), [(1, 8), (32, 31)])
def test_more_images_than_a_batch_are_drawn_and_so_is_a_single_one(count, size):
    assert [len(images) for images in batches_of(make_clean(count), batch_size=size)] == [size] * 3
