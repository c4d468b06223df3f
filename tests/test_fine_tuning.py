"""Plain fine-tuning beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import UNLIKE, build, make_clean, train
from torch.nn import functional

from untrojan.defenses.fine_tuning import FineTuning
from untrojan.errors import ConfigError, UnreliableWarning
from untrojan.record import Diagnosis, Target
from untrojan.speed import lay_out

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("short_searches")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])


def tuned(method, net, clean, seed=0):
    torch.manual_seed(seed)
    copied = copy.deepcopy(net)
    lay_out(copied, torch.channels_last)  # as a repair does
    return method.tune(copied, clean, clean, GIVEN, seed).eval()


def alike(one, other, atol=0.0):
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.allclose(value, other[name], rtol=0, atol=atol)] == []


@pytest.mark.parametrize("name", ["batchnorm", "shared", "tied", "vit"])
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_written_out(name, augment):
    """Descent with momentum and weight decay, at a rate that falls to 0 along half a cosine."""
    clean = make_clean(20)
    method = FineTuning(lr=0.05, epochs=4, weight_decay=0.01, batch_size=8, augment=augment)
    slow = build(name).train()
    speeds = [torch.zeros_like(weight) for weight in slow.parameters()]
    generator = torch.Generator().manual_seed(7)
    for epoch in range(4):
        rate = 0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2
        for images, labels in method.batches(clean, generator):
            slow.zero_grad()
            functional.cross_entropy(slow(images), labels).backward()
            with torch.no_grad():
                for weight, speed in zip(slow.parameters(), speeds, strict=True):
                    speed.mul_(0.9).add_(weight.grad + 0.01 * weight)
                    weight.sub_(rate * speed)
    alike(tuned(method, build(name), clean, seed=7).state_dict(), slow.state_dict(), atol=1e-5)


def test_held_out_images_are_not_trained_on(clean):
    method = FineTuning(epochs=2, hold_out=0.25)
    net = train(build("batchnorm"), clean, epochs=2)
    repair = method.repair(net, clean, GIVEN, seed=4)
    rest, held = clean.split(0.25, 4)
    assert (len(rest), len(held)) == (24, 8)
    alike(repair.model.state_dict(), tuned(method, net, rest, seed=4).state_dict())
    assert repair.record.after.held_out
    assert repair.record.after.accuracy.total == repair.record.before.accuracy.total == 8


@pytest.mark.parametrize(("count", "hold_out"), [(4, 0.2), (4, 0.5), (7, 0.5)])
def test_too_few_images_to_hold_any_out(count, hold_out):
    clean, net = make_clean(count), build("batchnorm")
    method = FineTuning(epochs=2, hold_out=hold_out)
    with pytest.warns(UnreliableWarning, match="too few images to hold any out"):
        repair = method.repair(net, clean, GIVEN)
    alike(repair.model.state_dict(), tuned(method, net, clean).state_dict())
    assert repair.record.values_changed > 0
    assert not repair.record.after.held_out
    assert repair.record.after.accuracy.total == count


def test_nothing_held_out_on_request(clean):
    method = FineTuning(epochs=2, hold_out=0)
    repair = method.repair(build("batchnorm"), clean, GIVEN)
    alike(repair.model.state_dict(), tuned(method, build("batchnorm"), clean).state_dict())
    assert not any("too few images" in text for text in repair.record.warnings)
    assert repair.record.after.accuracy.total == len(clean)


def test_frozen_parameters_are_trained_and_stay_frozen(clean):
    net = build("frozen")
    repair = FineTuning(epochs=1).repair(net, clean, GIVEN)
    before, after = net.state_dict(), repair.model.state_dict()
    assert not torch.equal(after["0.weight"], before["0.weight"])
    assert [value.requires_grad for value in repair.model.parameters()] == [v.requires_grad for v in net.parameters()]
    assert not repair.model[0].weight.requires_grad


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("count", [4, 5, 9, 17])
def test_few_images(name, count):
    net, clean = build(name), make_clean(count)
    after = tuned(FineTuning(epochs=1, batch_size=8), net, clean).state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, after[key]) for key, value in net.named_parameters())


@pytest.mark.parametrize("name", UNLIKE)
def test_divergence_goes_back(name, clean):
    net = build(name)
    with pytest.warns(UnreliableWarning, match="fine-tune: NaN or infinity"):
        after = tuned(FineTuning(epochs=8, lr=1e30), net, clean)
    alike(after.state_dict(), net.state_dict())


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("epochs", [1, 5])
def test_divergence_in_a_single_step_goes_back_too(name, epochs):
    net = build(name)
    with pytest.warns(UnreliableWarning, match="NaN or infinity|left the numbers"):
        repair = FineTuning(epochs=epochs, lr=1e30).repair(net, make_clean(4), GIVEN)
    alike(repair.model.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0},
        {"epochs": 0},
        {"weight_decay": -1},
        {"hold_out": 1},
        {"hold_out": -0.1},
        {"batch_size": 1},
        {"augment": "mixup"},
        {"budget": 0},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^fine-tuning: `{next(iter(fields))}`"):
        FineTuning(**fields)
