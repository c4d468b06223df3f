"""TSBD beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import NETS, UNLIKE, backdoored, build, make_clean, train
from torch import nn
from torch.nn import functional

from untrojan.defenses.tsbd import TSBD, _most_changed, _pooled
from untrojan.errors import ConfigError, ModelError, UnreliableWarning
from untrojan.mask import products
from untrojan.model import correct
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
STILL = {"epochs": 1, "lr": 1e-12}


def tsbd(**fields):
    return TSBD(**{"unlearn_epochs": 3, "unlearn_lr": 0.01, "epochs": 2} | fields)


def tuned(method, net, clean, held=None, seed=0):
    torch.manual_seed(seed)
    return method.tune(copy.deepcopy(net), clean, held or clean, GIVEN, seed).eval()


def alike(one, other, atol=0.0):
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.allclose(value, other[name], rtol=0, atol=atol)] == []


def changed_at_random(name):
    """A network, and a copy of which every weight went elsewhere."""
    net = build(name)
    torch.manual_seed(4)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for weight in other.parameters():
            weight += torch.randn_like(weight)
    return net, other


@pytest.mark.parametrize("name", ["batchnorm", "convnext", "depthwise"])
def test_unlearning_written_out(name, clean):
    method = tsbd(unlearn_lr=0.001)
    slow = train(build(name), clean, epochs=15).train()
    speeds = [torch.zeros_like(weight) for weight in slow.parameters()]
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        for images, labels in method.batches(clean, generator):
            slow.zero_grad()
            functional.cross_entropy(slow(images), labels).backward()
            with torch.no_grad():
                for weight, speed in zip(slow.parameters(), speeds, strict=True):
                    speed.mul_(0.9).add_(weight.grad)
                    weight.add_(0.001 * speed)
    net = train(build(name), clean, epochs=15)
    alike(method._unlearn(net, clean, seed=3).state_dict(), slow.state_dict(), atol=1e-5)
    alike(net.state_dict(), train(build(name), clean, epochs=15).state_dict())


def test_unlearning_stops_at_the_floor(clean, recwarn):
    net = train(build("batchnorm"), clean, epochs=10)
    unlearned = tsbd(unlearn_epochs=1000)._unlearn(net, clean, seed=0)
    assert correct(unlearned, clean).float().mean() < 0.5 < correct(net, clean).float().mean()
    assert not recwarn.list


@pytest.mark.parametrize(("floor", "expected"), [(0.1, "0.25"), (0.3, "0.30")])
def test_a_floor_that_is_not_reached_warns(clean, floor, expected):
    """Nobody gets below 1 in 4 by always giving the same of four classes."""
    net = train(build("batchnorm"), clean, epochs=10)
    with pytest.warns(UnreliableWarning, match=rf"unlearning ended at an accuracy of 1\.00, not at .* of {expected};"):
        tsbd(unlearn_lr=1e-9, floor=floor)._unlearn(net, clean, seed=0)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("m", [0.3, 0.7, 1])
def test_most_changed_by_hand(name, m):
    net, unlearned = changed_at_random(name)
    filters = {}
    for layer in products(net)[:-1]:
        changes = (unlearned.get_submodule(layer).weight - net.get_submodule(layer).weight).detach().abs().flatten(1)
        filters |= {(f"{layer}.weight", row): change.tolist() for row, change in enumerate(changes)}
    order = sorted(filters, key=lambda each: -sum(filters[each]))
    scores = _most_changed(tsbd()._changes(net, unlearned), m)
    for place, (key, row) in enumerate(order):
        change = filters[key, row]
        most = sorted(range(len(change)), key=lambda at: -change[at])[: round(m * len(change))]
        expected = [place if at in most else math.inf for at in range(len(change))]
        assert scores.values[key][row].flatten().tolist() == expected
    assert scores.values.keys() == {key for key, _ in filters}


@pytest.mark.parametrize("name", [name for name in NETS if any(w.ndim > 2 for w in build(name).parameters())])
@pytest.mark.parametrize("count", [1, 5])
def test_released_pools_the_weights_of_convolutions(name, count):
    net, unlearned = changed_at_random(name)
    changes = tsbd(variant="released")._changes(net, unlearned)
    convolutions = [f"{layer}.weight" for layer in products(net)[:-1] if net.get_submodule(layer).weight.ndim > 2]
    assert list(changes.values) == convolutions
    filters = {}
    for key in convolutions:
        change = (unlearned.get_parameter(key) - net.get_parameter(key)).detach().abs().flatten(1)
        filters |= {(key, row): each.tolist() for row, each in enumerate(change)}
    chosen = sorted(filters, key=lambda each: -sum(filters[each]))[:count]
    pool = sorted((value for each in chosen for value in filters[each]), reverse=True)
    least = pool[round(0.7 * len(pool)) - 1]
    mask = _pooled(changes, 0.7, count)
    for (key, row), change in filters.items():
        zeroed = [(key, row) in chosen and value >= least for value in change]
        assert (mask.values[key][row].flatten() == 0).tolist() == zeroed


def test_released_fine_tunes_an_epoch_more(clean):
    fields = {"unlearn_lr": 1e-9, "m": 1e-9}
    one = tuned(tsbd(variant="released", epochs=1, **fields), build("batchnorm"), clean)
    alike(one.state_dict(), tuned(tsbd(epochs=2, **fields), build("batchnorm"), clean).state_dict())


def test_released_ranks_convolutions_alone(clean):
    with pytest.raises(ModelError, match="the released code ranks convolutions, and the network has none"):
        tsbd(variant="released").repair(
            nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 4)), clean, GIVEN
        )


def test_as_many_filters_as_accuracy_allows():
    net, clean = backdoored(7)
    clean, held = clean.split(0.4, 0)
    fields = {"unlearn_epochs": 100, "unlearn_lr": 0.003}
    scores = _most_changed(tsbd()._changes(net, tsbd(**fields)._unlearn(net, clean, 0)), 0.7)
    total = sum(len(value) for value in scores.values.values())
    before, pruned = correct(net, held), []
    for drop in (0.1, 0.3, 0.6):
        zeroed = None
        for share in (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9):
            tried = copy.deepcopy(net)
            for key, value in scores.values.items():
                tried.get_parameter(key).data[value < int(share * total)] = 0
            if (before.float() - correct(tried, held).float()).mean() > drop + 1e-6:
                break
            zeroed = tried
        assert zeroed is not None
        after = tuned(tsbd(prune_budget=drop, **fields, **STILL), net, clean, held)
        for key in scores.values:
            assert torch.allclose(after.get_parameter(key), zeroed.get_parameter(key), atol=1e-6)
        pruned.append(sum(int((zeroed.get_parameter(key) == 0).sum()) for key in scores.values))
    assert pruned == sorted(pruned)
    assert 0 < pruned[0] < pruned[-1]


@pytest.mark.parametrize("name", ["batchnorm", "shared", "tied", "vit", "no-affine"])
@pytest.mark.parametrize("alpha", [0, 0.7, 1])
def test_fine_tuning_written_out(name, alpha):
    """Mix the gradient with that of a copy, every tensor of which went a step of length r uphill."""
    clean = make_clean(20)
    method = tsbd(alpha=alpha, r=0.2, lr=0.02, epochs=3, batch_size=8)
    slow = build(name).train()
    speeds = [torch.zeros_like(weight) for weight in slow.parameters()]
    generator = torch.Generator().manual_seed(7)

    def slopes(net, images, labels):
        net.zero_grad()
        functional.cross_entropy(net(images), labels).backward()
        return [weight.grad.clone() for weight in net.parameters()]

    for _ in range(3):
        for images, labels in method.batches(clean, generator):
            uphill = copy.deepcopy(slow)
            first = slopes(slow, images, labels)
            with torch.no_grad():
                for weight, slope in zip(uphill.parameters(), first, strict=True):
                    weight += 0.2 * slope / (slope.norm() + 1e-12)
            second = slopes(uphill, images, labels)
            with torch.no_grad():
                for weight, here, there, speed in zip(slow.parameters(), first, second, speeds, strict=True):
                    speed.mul_(0.9).add_((1 - alpha) * here + alpha * there)
                    weight.sub_(0.02 * speed)
    fast = build(name).train()
    method._fine_tune(fast, clean, seed=7)
    alike(fast.state_dict(), slow.state_dict(), atol=1e-4)


@pytest.mark.parametrize("name", NETS)
def test_diverged_unlearning_says_nothing(name, clean):
    net = build(name)
    with pytest.warns(UnreliableWarning, match="unlearning ended at the first step, not at the floor"):
        after = tuned(tsbd(unlearn_lr=1e38, unlearn_epochs=1, **STILL), net, clean)
    for key, value in net.named_parameters():
        assert torch.allclose(after.get_parameter(key), value, atol=1e-6)


@pytest.mark.parametrize("name", UNLIKE)
def test_divergence_ends_finite(name, clean):
    after = tuned(tsbd(epochs=8, lr=1e30), build(name), clean)
    assert all(torch.isfinite(value).all() for value in after.parameters())


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("count", [4, 5, 9, 17])
def test_few_images(name, count):
    net, clean = build(name), make_clean(count)
    after = tuned(tsbd(batch_size=8, epochs=1), net, clean).state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, after[key]) for key, value in net.named_parameters())


def test_nothing_to_rank(clean):
    with pytest.raises(ModelError, match="nothing to mask by weight"):
        tsbd().repair(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), clean, GIVEN)


@pytest.mark.parametrize(
    "fields",
    [
        {"unlearn_lr": 0},
        {"unlearn_epochs": 0},
        {"floor": 1},
        {"m": 0},
        {"prune_budget": 0},
        {"r": 0},
        {"alpha": 1.1},
        {"lr": 0},
        {"epochs": 0},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^tsbd: `{next(iter(fields))}`"):
        TSBD(**fields)
