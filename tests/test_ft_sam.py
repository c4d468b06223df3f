"""FT-SAM beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import NETS, UNLIKE, build, make_clean
from torch import nn
from torch.nn import functional

from untrojan.defenses.fine_tuning import FineTuning
from untrojan.defenses.ft_sam import FTSAM
from untrojan.defenses.tuning import moved
from untrojan.errors import ConfigError, UnreliableWarning
from untrojan.model import call_with
from untrojan.record import Diagnosis, Target

pytestmark = pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])


def tuned(method, net, clean, seed=0):
    torch.manual_seed(seed)
    return method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed).eval()


def alike(one, other, atol=0.0):
    assert one.keys() == other.keys()
    assert [name for name, value in one.items() if not torch.allclose(value, other[name], rtol=0, atol=atol)] == []


@pytest.mark.parametrize("variant", ["fixed", "released"])
@pytest.mark.parametrize("name", ["batchnorm", "shared", "tied", "vit", "no-affine", "depthwise"])
def test_written_out(name, variant):
    """Go uphill on a copy, take the gradient there, and descend with it from where the weights were."""
    clean = make_clean(20)
    method = FTSAM(variant=variant, rho=0.5, label_smoothing=0.2, lr=0.05, epochs=3, weight_decay=0.01, batch_size=8)
    slow = build(name).train()
    speeds = [torch.zeros_like(weight) for weight in slow.parameters()]
    generator = torch.Generator().manual_seed(7)

    def slopes(net, images, labels):
        net.zero_grad()
        true = functional.one_hot(labels, 4)
        surely = true * 0.8 + (0.2 / 4 if variant == "fixed" else (1 - true) * 0.2 / 3)
        (-(surely * functional.log_softmax(net(images), 1)).sum(1).mean()).backward()
        return [weight.grad.clone() for weight in net.parameters()]

    updates = 0
    for epoch in range(3):
        for images, labels in method.batches(clean, generator):
            rate = 0.05 * (1 + math.cos(math.pi * (epoch if variant == "fixed" else updates) / 3)) / 2
            updates += 1
            uphill = copy.deepcopy(slow)
            first = slopes(slow, images, labels)
            with torch.no_grad():
                size = sum(float((w * g).square().sum()) for w, g in zip(slow.parameters(), first, strict=True)) ** 0.5
                for weight, slope in zip(uphill.parameters(), first, strict=True):
                    weight += 0.5 * weight**2 * slope / size
            second = slopes(uphill, images, labels)
            with torch.no_grad():
                for weight, slope, speed in zip(slow.parameters(), second, speeds, strict=True):
                    speed.mul_(0.9).add_(slope + 0.01 * weight)
                    weight.sub_(rate * speed)
    alike(tuned(method, build(name), clean, seed=7).state_dict(), slow.state_dict(), atol=1e-5)


@pytest.mark.parametrize("name", ["batchnorm", "vit"])
def test_no_perturbation_is_plain_fine_tuning(name, clean):
    fields = {"lr": 0.05, "epochs": 2, "weight_decay": 0.01}
    one = tuned(FTSAM(rho=1e-9, label_smoothing=0, **fields), build(name), clean)
    alike(one.state_dict(), tuned(FineTuning(**fields), build(name), clean).state_dict(), atol=1e-6)


def test_running_statistics_follow_the_first_pass(clean):
    net = build("batchnorm")
    one = tuned(FTSAM(epochs=1, lr=1e-12, batch_size=32), net, clean)
    expected = copy.deepcopy(net).train()
    for images, _ in FTSAM(batch_size=32).batches(clean, torch.Generator().manual_seed(0)):
        expected(images)
    for key, value in expected.state_dict().items():
        assert torch.allclose(one.state_dict()[key], value, atol=1e-6)
    assert int(one[1].num_batches_tracked) == 4


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("training", [False, True])
def test_moved_weights(name, training, clean):
    """Moving the weights is loading other ones, in layers with two names too, and leaves everything as it was."""
    net = build(name).train(training)
    torch.manual_seed(1)
    moves = [torch.randn_like(weight) for weight in net.parameters()]
    other, before = copy.deepcopy(net), copy.deepcopy(net.state_dict())
    with torch.no_grad():
        for weight, move in zip(other.parameters(), moves, strict=True):
            weight += move
    torch.manual_seed(2)
    expected = other(clean.floats())
    torch.manual_seed(2)
    assert torch.allclose(moved(net, clean.floats(), moves), expected, atol=1e-5)
    alike(net.state_dict(), before)


def test_buffers_that_are_not_replaced_follow(clean):
    net = build("batchnorm").train()
    other = copy.deepcopy(net)
    other(clean.floats())
    call_with(net, clean.floats(), {})
    alike(net.state_dict(), other.state_dict())


def test_weights_without_a_part_in_the_loss(clean):
    net = nn.Sequential(build("batchnorm"), nn.Identity())
    net[1].spare = nn.Parameter(torch.ones(3))
    after = tuned(FTSAM(epochs=1, weight_decay=0), net, clean)
    assert torch.equal(after[1].spare, torch.ones(3))
    assert not torch.equal(after[0][0].weight, net[0][0].weight)


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("count", [4, 5, 9, 17])
def test_few_images(name, count):
    net, clean = build(name), make_clean(count)
    after = tuned(FTSAM(epochs=1, batch_size=8), net, clean).state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, after[key]) for key, value in net.named_parameters())


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("fields", [{"lr": 1e30}, {"rho": 1e30}], ids=["lr", "rho"])
def test_divergence_ends_finite(name, fields, clean):
    after = tuned(FTSAM(epochs=8, **fields), build(name), clean)
    assert all(torch.isfinite(value).all() for value in after.state_dict().values())


def test_divergence_goes_back(clean):
    net = build("batchnorm")
    with pytest.warns(UnreliableWarning, match="fine-tune: NaN or infinity at step"):
        alike(tuned(FTSAM(epochs=1, lr=1e30), net, clean).state_dict(), net.state_dict())


@pytest.mark.parametrize(
    "fields",
    [{"rho": 0}, {"rho": -1}, {"label_smoothing": 1}, {"lr": 0}, {"epochs": 0}, {"weight_decay": -1}, {"color": "red"}],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^ft-sam: `{next(iter(fields))}`"):
        FTSAM(**fields)
