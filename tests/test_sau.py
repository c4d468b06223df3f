"""SAU beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import CLASSES, UNLIKE, build, make_clean, train
from torch import nn
from torch.nn.functional import cross_entropy, kl_div

from untrojan.data import CleanSet
from untrojan.defenses.sau import SAU, _jensen_shannon, _shared_loss
from untrojan.errors import ConfigError
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

VARIANTS = ["fixed", "released"]
GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


class Passes:
    """A hook that counts the images that go through the network, and through its copies."""

    def __init__(self, net):
        self.images = 0
        net.register_forward_hook(self)

    def __deepcopy__(self, _):
        return self

    def __call__(self, net, inputs, output):
        self.images += len(inputs[0])


def pair(name="batchnorm"):
    """A trained network and one that differs from it a bit, in double precision, with images that both know."""
    clean = make_clean()
    frozen = train(build(name), clean, epochs=20).double()
    model = copy.deepcopy(frozen)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model, frozen, clean.floats().double(), clean.labels


def divergence(one, other):
    """Jensen-Shannon by two Kullback-Leibler divergences from the middle."""
    one, other = one.softmax(1), other.softmax(1)
    middle = (one + other) / 2
    return sum(kl_div(middle.log(), each, reduction="none").sum(1) / 2 for each in (one, other))


def searched(model, frozen, image, label, method):
    """The search for one image, step by step."""
    ours_before, theirs_before = label, label
    if method.variant == "released":
        ours_before, theirs_before = model(image).argmax(1), frozen(image).argmax(1)
    shift = torch.full_like(image, method.radius)
    if method.variant == "fixed":
        shift = (image + shift).clamp(0, 1) - image
    for _ in range(method.iterations):
        shift = shift.detach().requires_grad_()
        ours, theirs = model(image + shift), frozen(image + shift)
        loss = torch.zeros(())
        if ours.argmax() == ours_before:
            loss = loss - method.beta_1 * cross_entropy(ours, label) / 2
        if theirs.argmax() == theirs_before:
            loss = loss - method.beta_1 * cross_entropy(theirs, label) / 2
        if ours.argmax() == ours_before or theirs.argmax() == theirs_before or ours.argmax() != theirs.argmax():
            loss = loss + method.beta_2 * divergence(ours, theirs).squeeze()
        else:
            break
        slope = torch.autograd.grad(loss, shift)[0]
        shift = (shift - method.step_size * slope.sign()).clamp(-method.radius, method.radius)
        if method.variant == "fixed":
            shift = (image + shift).clamp(0, 1) - image
    return (image + shift).detach()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "fields", [{}, {"radius": 0.3, "step_size": 0.1, "iterations": 4}, {"beta_1": 1.0, "beta_2": 0.1}], ids=str
)
def test_search_against_one_image_at_a_time(variant, fields):
    model, frozen, images, labels = pair()
    labels = torch.where(torch.arange(len(labels)) % 4 == 0, (labels + 1) % CLASSES, labels)  # not known to either
    method = SAU(variant=variant, **fields)
    found = method._adversarial(model, frozen, images, labels)
    pairs = zip(images.split(1), labels.split(1), strict=True)
    slow = torch.cat([searched(model, frozen, image, label, method) for image, label in pairs])
    assert torch.allclose(found, slow, atol=1e-12)
    assert (found - images).abs().max() <= method.radius + 1e-12
    with torch.no_grad():
        ours, theirs = model(found).argmax(1), frozen(found).argmax(1)
    assert ((ours != labels) & (ours == theirs)).any()


def test_released_leaves_the_pixel_range_and_fixed_does_not():
    model, frozen, images, labels = pair()
    fixed, released = (SAU(variant=v)._adversarial(model, frozen, images, labels) for v in ("fixed", "released"))
    assert fixed.min() >= 0
    assert fixed.max() <= 1
    assert released.max() > 1


def test_search_ends_where_all_examples_are_shared():
    _, frozen, images, _ = pair()
    method = SAU(iterations=7)
    with torch.no_grad():
        never = (frozen((images + method.radius).clamp(0, 1)).argmax(1) + 1) % CLASSES
    passes = Passes(frozen)
    found = method._adversarial(frozen, frozen, images, never)
    assert passes.images == 2 * len(images)
    assert torch.equal(found, (images + method.radius).clamp(0, 1))


def test_jensen_shannon():
    one, other = 3 * torch.randn(2, 40, 5, dtype=torch.float64)
    found = _jensen_shannon(one, other)
    assert torch.allclose(found, divergence(one, other))
    assert torch.allclose(found, _jensen_shannon(other, one))
    assert torch.allclose(_jensen_shannon(one, one + 2), torch.zeros(40, dtype=torch.float64), atol=1e-12)
    far = torch.tensor([[1e4, 0.0]], requires_grad=True)
    most = _jensen_shannon(far, -far)
    assert float(most.detach()) == pytest.approx(math.log(2))
    assert torch.isfinite(torch.autograd.grad(most, far)[0]).all()


@pytest.mark.parametrize("sure", [math.inf, 0.999])
def test_shared_loss_is_the_published_one(sure):
    out, theirs, labels = 4 * torch.randn(30, 5, dtype=torch.float64), torch.arange(30) % 5, torch.arange(30) % 3
    total, most = 0.0, 0.0
    for row, their, label in zip(out.softmax(1).tolist(), theirs.tolist(), labels.tolist(), strict=True):
        if their != label:
            others = sum(value for place, value in enumerate(row) if place != their)
            most = max(most, others)
            total += math.log(1e-6 + min(others, sure)) + math.log(1 + 1e-6 - max(row[their], 1 - sure))
    assert most > 0.999
    assert float(_shared_loss(out, theirs, theirs != labels, sure)) == pytest.approx(-total / 60)
    assert float(_shared_loss(out, theirs, theirs != theirs, sure)) == 0


def test_released_counts_images_that_the_search_turned(clean):
    """Labels that are all wrong: the frozen copy is not fooled where it says what it said before."""
    net = train(build("batchnorm"), clean)
    with torch.no_grad():
        wrong = CleanSet(clean.images, (net(clean.floats()).argmax(1) + 1) % CLASSES)
    still = {"radius": 1e-6, "step_size": 1e-6, "lambda_1": 0, "epochs": 1}
    fixed, released = (
        SAU(variant=variant, **still).tune(copy.deepcopy(net), wrong, wrong, GIVEN, 0) for variant in VARIANTS
    )
    assert not same(fixed.state_dict(), net.state_dict())
    assert same(released.state_dict(), net.state_dict())


def test_released_lets_go_of_what_the_model_disagrees_with_for_good():
    out = torch.tensor([[9.0, 0, 0], [2.0, 0, 0]], requires_grad=True)
    theirs, fooled = torch.tensor([1, 1]), torch.tensor([True, True])
    for sure, pulls in ((math.inf, [True, True]), (0.999, [False, True])):
        (slope,) = torch.autograd.grad(_shared_loss(out, theirs, fooled, sure), out)
        assert (slope != 0).any(1).tolist() == pulls


@pytest.mark.parametrize("lambdas", [(1.0, 0.0, 1.0), (0.5, 0.3, 2.0)])
def test_training_written_out(clean, lambdas):
    net = train(build("batchnorm"), clean, epochs=5)
    fields = dict(zip(("lambda_1", "lambda_2", "lambda_3"), lambdas, strict=True))
    method = SAU(epochs=3, batch_size=10, lr=0.01, **fields)
    slow, frozen = copy.deepcopy(net), copy.deepcopy(net)
    adam = torch.optim.Adam(slow.parameters(), lr=0.01)
    generator = torch.Generator().manual_seed(4)
    for _ in range(3):
        for images, labels in method.batches(clean, generator):
            adversarial = method._adversarial(slow, frozen, images, labels)
            theirs = frozen(adversarial).argmax(1)
            loss = lambdas[0] * cross_entropy(slow(images), labels)
            loss = loss + lambdas[1] * cross_entropy(slow(adversarial), labels)
            loss = loss + lambdas[2] * _shared_loss(slow(adversarial), theirs, theirs != labels, math.inf)
            adam.zero_grad()
            loss.backward()
            adam.step()
    tuned = method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed=4)
    for name, value in slow.state_dict().items():
        assert torch.allclose(tuned.state_dict()[name], value, atol=1e-4), name
        if "running" in name:
            assert torch.equal(tuned.state_dict()[name], net.state_dict()[name])
    assert not same(tuned.state_dict(), net.state_dict())


def test_passes_equal_the_count(clean):
    """Nothing is fooled within a tiny radius: 5 steps through both networks, the label, and training on both.

    The released search asks both networks before, and the loss the frozen one.
    """
    net = train(build("batchnorm"), clean)
    with torch.no_grad():
        known = CleanSet(clean.images, net(clean.floats()).argmax(1))
    for variant, before in zip(VARIANTS, (0, 3), strict=True):
        passes = Passes(net)
        method = SAU(variant=variant, epochs=3, radius=1e-6, step_size=1e-6, lr=1e-9)
        method.tune(copy.deepcopy(net), known, known, GIVEN, 0)
        assert passes.images == 3 * 32 * (5 * 2 + 1 + 2 + before)


def test_what_was_shared_is_unlearned(clean):
    """After training, what fools the original fools the repaired network less often."""
    net = train(build("batchnorm"), clean)
    images, labels = clean.floats(), clean.labels
    found = SAU()._adversarial(net, net, images, labels)
    tuned = SAU(epochs=20, lr=0.01).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    with torch.no_grad():
        theirs, ours = net(found).argmax(1), tuned(found).argmax(1)
        assert (tuned(images).argmax(1) == labels).float().mean() > 0.9
    fooled = theirs != labels
    assert fooled.float().mean() > 0.5
    assert (ours[fooled] == theirs[fooled]).float().mean() < 0.5


@pytest.mark.parametrize("name", UNLIKE)
def test_divergence_does_not_crash(name, clean):
    repair = SAU(epochs=2, lr=1e30).repair(build(name), clean, GIVEN)
    assert all(torch.isfinite(value).all() for value in repair.model.state_dict().values())


@pytest.mark.parametrize(("count", "batch_size"), [(4, 256), (9, 8), (5, 2)])
def test_few_images_mean_a_step(count, batch_size):
    net, clean = build("batchnorm"), make_clean(count)
    tuned = SAU(epochs=1, batch_size=batch_size).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    assert not same(tuned.state_dict(), net.state_dict())


def test_a_network_without_normalization_or_convolution(clean):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    assert SAU(epochs=1).repair(net, clean, GIVEN).record.values_changed > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0},
        {"epochs": 0},
        {"radius": 0},
        {"step_size": 0},
        {"iterations": 0},
        {"beta_1": -1},
        {"beta_2": -1},
        {"lambda_1": -1},
        {"lambda_2": -1},
        {"lambda_3": -1},
        {"batch_size": 1},
        {"variant": "other"},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^sau: `{next(iter(fields))}`"):
        SAU(**fields)
