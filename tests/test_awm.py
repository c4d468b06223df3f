"""AWM beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import NETS, UNLIKE, backdoored, build, make_clean, train
from torch import nn

from untrojan.augmentation import crop_flip
from untrojan.data import CleanSet
from untrojan.defenses.awm import AWM
from untrojan.errors import ConfigError, ModelError
from untrojan.mask import Mask
from untrojan.model import logits
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])

variants = pytest.mark.parametrize("variant", ["fixed", "released"])


def awm(**fields):
    return AWM(**{"outer_rounds": 2, "inner_rounds": 2, "batch_size": 8} | fields)


def tuned(method, net, clean, seed=0):
    return method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed)


def mask_of(net, result, name):
    """What a weight was multiplied by."""
    return (result.get_parameter(name) / net.get_parameter(name)).detach()


def hidden(width=8):
    """A convolution whose first channel is dead behind its ReLU, and a linear layer that reads it."""
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, width), nn.ReLU(), nn.Linear(width, 4)
    )
    net[0].bias.data[0] = -100
    return net.eval()


@variants
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_tuning_written_out(variant, augment):
    """By hand, with delta and masks apart, images with and without delta apart, and Adam spelled out."""
    clean = make_clean(20)
    net = train(hidden(), make_clean(), epochs=20)
    fields = {"lr": 0.05, "alpha": 0.6, "gamma": 1e-3, "tau": 8, "delta_lr": 3, "outer_rounds": 3}
    method = awm(variant=variant, augment=augment, **fields)
    steps = 6 if variant == "fixed" else 4
    slow = copy.deepcopy(net)
    layers = [slow[0], slow[3]] if variant == "fixed" else [slow[0]]
    original = [layer.weight.detach().clone() for layer in layers]
    masks, means, squares = ([torch.full_like(w, start) for w in original] for start in (1.0, 0.0, 0.0))
    generator = torch.Generator().manual_seed(0)
    clipped = len(layers) > 1
    all_images, count, norms = clean.floats(), 0, []

    def draws():
        for drawn in [torch.randint(20, (8,), generator=generator) for _ in range(steps)]:
            images = all_images[drawn]
            yield (images if augment == "none" else crop_flip(images, generator)), drawn

    for _ in range(3):
        with torch.no_grad():
            said = slow(all_images).argmax(1)
        delta = torch.zeros(3, 8, 8)
        for images, drawn in draws():
            delta = delta.detach().requires_grad_()
            shown = (images + delta).clamp(0, 1) if clipped else images + delta
            loss = nn.functional.cross_entropy(slow(shown), said[drawn])
            delta = delta.detach() + 3 * torch.autograd.grad(loss, delta)[0]
        norms.append(float(delta.abs().sum()))
        delta = delta * min(1, 8 / norms[-1])
        for images, drawn in draws():
            count += 1
            slow.zero_grad()
            (0.6 * nn.functional.cross_entropy(slow(images), clean.labels[drawn])).backward()
            perturbed = (images + delta).clamp(0, 1)
            (0.4 * nn.functional.cross_entropy(slow(perturbed), clean.labels[drawn])).backward()
            for i, layer in enumerate(layers):
                slope = layer.weight.grad * original[i] + 1e-3
                means[i] = 0.9 * means[i] + 0.1 * slope
                squares[i] = 0.999 * squares[i] + 0.001 * slope**2
                size = (squares[i] / (1 - 0.999**count)).sqrt() + 1e-8
                masks[i] = (masks[i] - 0.05 * means[i] / (1 - 0.9**count) / size).clamp(0, 1)
                layer.weight.data = original[i] * masks[i]
    assert max(norms) > 8
    assert any(((mask > 0) & (mask < 1)).any() for mask in masks)
    result = tuned(method, net, clean)
    for name, value in result.state_dict().items():
        assert torch.allclose(value, slow.state_dict()[name], atol=2e-4), name
    assert torch.equal(result[5].weight, net[5].weight)
    assert torch.equal(result[3].weight, net[3].weight) == (variant == "released")


@pytest.mark.parametrize(("rounds", "left"), [(1, 0.995), (5, 0.975), (40, 0.8), (210, 0)])
def test_dead_weights_lose_half_a_step(rounds, left):
    """Where gamma is Adam's eps, 1e-8, a mask without any other gradient goes down by lr / 2 a step."""
    net = hidden()
    method = awm(outer_rounds=rounds, inner_rounds=1)
    assert (method.lr, method.gamma) == (0.01, 1e-8)
    result = tuned(method, net, make_clean(8))
    assert left == pytest.approx(max(0, 1 - rounds * method.lr / 2))
    for dead in (mask_of(net, result, "0.weight")[0], mask_of(net, result, "3.weight")[:, :36]):
        assert torch.allclose(dead, torch.full_like(dead, left), atol=1e-3)


def test_without_gamma_dead_weights_stay():
    net = hidden()
    result = tuned(awm(gamma=0), net, make_clean(8))
    assert torch.equal(result[0].weight[0], net[0].weight[0])
    assert not torch.equal(result[0].weight[1:], net[0].weight[1:])


@variants
@pytest.mark.parametrize(("count", "batches"), [(8, 1), (9, 2), (20, 3), (24, 3)])
def test_passes_equal_the_count(variant, count, batches):
    """A round with T batches in each half takes 3 T b passes forward, and one per image for its label."""
    if variant == "released":
        batches = count // 8
    net, seen = build("batchnorm"), []
    net.register_forward_hook(lambda *args: seen.append(len(args[2])))
    tuned(awm(variant=variant, outer_rounds=3, inner_rounds=2), net, make_clean(count))
    steps = 2 * batches
    assert sum(seen) == 3 * (steps * 8 + steps * 2 * 8 + count)


@variants
@pytest.mark.parametrize("name", NETS)
def test_what_is_changed(name, variant):
    clean = make_clean(16)
    net = train(build(name), clean, epochs=3)
    result = tuned(awm(variant=variant), net, clean)
    last = list(Mask.ones(net, "weight").values)
    expected = {key for key in last if variant == "fixed" or net.get_parameter(key).ndim > 2}
    state = result.state_dict(keep_vars=True)
    changed = {key for key, value in net.named_parameters() if not torch.equal(value, state[key])}
    assert changed == expected
    for key, value in net.named_buffers():
        assert torch.equal(state[key], value)
    for key in changed:
        before = net.get_parameter(key)
        assert (state[key].abs() <= before.abs() + 1e-7).all()
        assert (state[key] * before >= 0).all()
    assert logits(result, clean).isfinite().all()


def test_factored_masks():
    net, clean = train(hidden(), make_clean(), epochs=5), make_clean(16)
    plain = tuned(awm(), net, clean)
    conv, linear = net[0].weight.numel(), net[3].weight.numel()
    assert conv < linear
    untouched = tuned(awm(factor_above=linear), net, clean)
    assert all(torch.equal(value, untouched.state_dict()[key]) for key, value in plain.state_dict().items())
    some = tuned(awm(factor_above=conv), net, clean)
    both = tuned(awm(factor_above=0), net, clean)
    for result, factored in ((some, ["3.weight"]), (both, ["0.weight", "3.weight"])):
        for name in ("0.weight", "3.weight"):
            mask = mask_of(net, result, name)
            assert not torch.equal(mask, torch.ones_like(mask))
            assert (_rank_one(mask) < 1e-3) == (name in factored)


def _rank_one(mask):
    values = torch.linalg.svdvals(mask.flatten(1))
    return float(values[1] / values[0])


@pytest.mark.parametrize("name", NETS)
def test_factored_masks_on_all_networks(name, clean):
    result = tuned(awm(factor_above=0), build(name), clean)
    assert logits(result, clean).isfinite().all()


def test_one_shot_settings():
    method = AWM.one_shot()
    assert (method.tau, method.alpha, method.batch_size, method.copies, method.hold_out) == (100, 0.99, 32, 9, 0)
    assert AWM() == AWM(tau=1000, alpha=0.9, batch_size=128, outer_rounds=20, inner_rounds=5)


def test_copies_are_made_once(monkeypatch):
    """Ten of each image, the first as it is; all that is drawn later is among them."""
    clean, drawn = make_clean(4), []
    sets = []
    draws = CleanSet.draws
    monkeypatch.setattr(
        CleanSet, "draws", lambda self, *args: sets.append(self) or (drawn.append(b) or b for b in draws(self, *args))
    )
    method = awm(copies=9)
    tuned(method, build("batchnorm"), clean)
    assert len(sets) == 4
    generator = torch.Generator().manual_seed(0)
    images = clean.floats()
    expected = torch.cat([images, *(crop_flip(images, generator) for _ in range(9))])
    for each in sets:
        assert torch.allclose(each.floats(), expected)
    assert sets[1].labels.tolist() == clean.labels.tolist() * 10
    assert len(drawn) == 4 * math.ceil(40 / 8) * 2
    assert all(any(torch.allclose(image, each) for each in expected) for images, _ in drawn for image in images)


def test_one_shot_on_one_image_per_class():
    method = AWM(**(vars(AWM.one_shot()) | {"outer_rounds": 1, "inner_rounds": 1}))
    record = method.repair(build("batchnorm"), make_clean(4), GIVEN).record
    assert record.values_changed > 0
    assert record.after.accuracy.total == 4
    assert not record.after.held_out
    assert not any("too few images to hold any out" in text for text in record.warnings)


@pytest.mark.slow
def test_masking_takes_the_backdoor():
    net, clean = backdoored(7)
    rest = clean.take(range(150))
    images = clean.floats()
    images[:, :, 6:, 6:] = 1
    others = clean.labels != 7
    result = tuned(AWM(outer_rounds=20), net, rest)
    with torch.no_grad():
        fooled, still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, result))
        right = (result(clean.floats()).argmax(1) == clean.labels).float().mean()
    assert fooled > 0.9
    assert still < 0.5
    assert right > 0.85


def test_released_takes_no_step_without_a_full_batch():
    with pytest.raises(ConfigError, match="no step with fewer images than a batch: expected a batch size of at most 7"):
        tuned(awm(variant="released"), build("batchnorm"), make_clean(7))
    net = build("batchnorm")
    assert not torch.equal(tuned(awm(), net, make_clean(7))[0].weight, net[0].weight)


def test_nothing_to_mask(clean):
    head = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ModelError, match="nothing to mask by weight"):
        tuned(awm(), head, clean)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ModelError, match="the released code masks convolutions, and the network has none"):
        tuned(awm(variant="released"), dense, clean)
    assert not torch.equal(tuned(awm(), dense, clean)[1].weight, dense[1].weight)


@pytest.mark.parametrize(
    "fields",
    [
        {"variant": "paper"},
        {"outer_rounds": 0},
        {"inner_rounds": 0},
        {"delta_lr": 0},
        {"tau": 0},
        {"lr": 0},
        {"alpha": 1.1},
        {"gamma": -1},
        {"batch_size": 1},
        {"copies": -1},
        {"factor_above": -1},
        {"hold_out": 1},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^awm: `{next(iter(fields))}`"):
        AWM(**fields)


@variants
@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("fields", [{"lr": 1e30}, {"delta_lr": 1e38}, {"gamma": 1e38}])
def test_divergence_does_not_crash(name, variant, fields, clean):
    result = tuned(awm(variant=variant, **fields), build(name), clean)
    assert all(value.isfinite().all() for value in result.state_dict().values())
    assert logits(result, clean).isfinite().all()


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize(("count", "batch_size"), [(2, 128), (4, 128), (9, 8), (7, 2)])
def test_few_images(name, count, batch_size):
    net = build(name)
    result = tuned(awm(batch_size=batch_size), net, make_clean(count))
    assert any(not torch.equal(value, result.get_parameter(key)) for key, value in net.named_parameters())
