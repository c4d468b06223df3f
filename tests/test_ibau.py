"""I-BAU beyond the contract of every method."""

import copy

import pytest
import torch
from tiny import SHAPE, UNLIKE, backdoored, build, make_clean, train
from torch import nn
from torch.autograd.functional import jacobian
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from untrojan.defenses import ibau
from untrojan.defenses.ibau import IBAU, _Perturbation
from untrojan.errors import ConfigError, UnreliableWarning
from untrojan.record import Diagnosis, Target
from untrojan.run import choosing

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

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


class Problem:
    """Both problems of I-BAU on one batch each, as functions of flat vectors in double precision."""

    def __init__(self, net, shape, penalty):
        self.net, self.shape, self.penalty = net.double().requires_grad_(True), shape, penalty
        self.images, self.outer_images = torch.rand(2, 8, *shape, dtype=torch.float64)
        self.labels, self.outer_labels = torch.arange(16).remainder(3).view(2, 8)
        self.weights = nn.utils.parameters_to_vector(net.parameters()).detach()
        self.chosen = (torch.arange(8) < 3).double().view(-1, 1, 1, 1)

    def logits(self, weights, images):
        parts = weights.split([value.numel() for value in self.net.parameters()])
        named = zip(self.net.named_parameters(), parts, strict=True)
        return functional_call(self.net, {name: part.view_as(value) for (name, value), part in named}, (images,))

    def inner(self, delta, weights):
        out = self.logits(weights, self.images + delta.view(self.shape))
        return self.penalty * (delta**2).sum() - cross_entropy(out, self.labels)

    def outer(self, delta, weights):
        return cross_entropy(
            self.logits(weights, self.outer_images + self.chosen * delta.view(self.shape)), self.outer_labels
        )

    def slope(self, function, delta, weights, by):
        at = (delta.detach().requires_grad_(), weights.detach().requires_grad_())
        return torch.autograd.grad(function(*at), at[by])[0]

    def by_dense_jacobians(self, delta, step, most):
        """The direct gradient and the sum of the series with whole matrices, truncated after 1 to `most` terms."""

        def mapped(delta, weights):
            return delta - step * torch.autograd.grad(self.inner(delta, weights), delta, create_graph=True)[0]

        by_delta, by_weights = jacobian(mapped, (delta, self.weights))
        pull = self.slope(self.outer, delta, self.weights, 0)
        powers = [torch.linalg.matrix_power(by_delta.T, power) @ pull for power in range(most)]
        return self.slope(self.outer, delta, self.weights, 1) + torch.stack(powers).cumsum(0) @ by_weights

    def by_method(self, delta, method):
        values = delta.view(self.shape).detach().requires_grad_()
        outer = cross_entropy(self.net(self.outer_images + self.chosen * values), self.outer_labels)
        found = _Perturbation(values, self.images, self.labels)
        slopes = method._hypergradient(self.net, list(self.net.parameters()), outer, found)
        return torch.cat([slope.flatten() for slope in slopes])

    def solved(self, weights, delta):
        """The inner solution, by Newton's method from nearby."""
        for _ in range(20):
            slope = self.slope(self.inner, delta, weights, 0)
            if slope.abs().max() < 1e-13:
                break
            bend = jacobian(lambda at: torch.autograd.grad(self.inner(at, weights), at, create_graph=True)[0], delta)
            delta = delta - torch.linalg.solve(bend, slope)
        assert self.slope(self.inner, delta, weights, 0).abs().max() < 1e-12
        return delta


@pytest.mark.parametrize("name", ["batchnorm", "convnext", "vit"])
def test_hypergradient_against_dense_jacobians(name):
    problem = Problem(build(name), SHAPE, penalty=0.01)
    delta = 0.1 * torch.randn(192, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        after = dict(enumerate(problem.by_dense_jacobians(delta, 2.0, 6), 1))
    for iterations in (1, 2, 5):
        method = IBAU(penalty=0.01, iterations=iterations, contraction_lr=2.0)
        exact, more = after[iterations], after[iterations + 1]
        assert torch.allclose(problem.by_method(delta, method), exact, rtol=1e-8, atol=1e-10)
        assert (exact - more).norm() > 1e-5 * exact.norm()


def test_hypergradient_is_that_of_the_outer_loss_at_the_inner_solution():
    """At the fixed point, many iterations give the gradient of the outer loss where the perturbation follows."""
    problem = Problem(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), (3, 2, 2), penalty=0.5)
    delta = problem.solved(problem.weights, torch.zeros(12, dtype=torch.float64))
    found = problem.by_method(delta, IBAU(penalty=0.5, iterations=400, contraction_lr=0.1))
    nudges = 1e-5 * torch.eye(len(problem.weights), dtype=torch.float64)
    differences = [
        problem.outer(problem.solved(end, delta), end)
        for nudge in nudges
        for end in (problem.weights + nudge, problem.weights - nudge)
    ]
    exact = torch.stack(differences).view(-1, 2) @ torch.tensor([1.0, -1.0], dtype=torch.float64) / 2e-5
    assert torch.allclose(found, exact, atol=1e-7)
    assert (problem.slope(problem.outer, delta, problem.weights, 1) - exact).norm() > 0.01 * exact.norm()


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_rounds_written_out(clean, variant):
    net = train(build("batchnorm"), clean, epochs=5)
    method = IBAU(variant=variant, rounds=2, batch_size=10, share=0.3, perturb_lr=2.0, hold_out=0)
    slow = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(4)
    parameters = list(slow.parameters())
    adam = torch.optim.Adam(parameters, lr=0.001)
    for _ in range(2):
        delta = torch.zeros(SHAPE, requires_grad=True)
        batches = list(method.batches(clean, generator))
        predicted = [slow(images).argmax(1) for images, _ in batches]
        for (images, _), labels in zip(batches, predicted, strict=True):
            loss = -cross_entropy(slow(images + delta), labels) + 0.001 * delta.norm() ** 2
            delta = (delta - 2.0 * torch.autograd.grad(loss, delta)[0]).detach().requires_grad_()
        found = _Perturbation(delta, batches[0][0], predicted[0])
        for images, labels in method.batches(clean, generator):
            count = 0.3 * len(images)
            shown = torch.randperm(len(images), generator=generator)[
                : round(count) if variant == "fixed" else int(count)
            ]
            mixed = torch.stack([one + delta if place in shown else one for place, one in enumerate(images)])
            slopes = method._hypergradient(slow, parameters, cross_entropy(slow(mixed), labels), found)
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            adam.step()
    fast = IBAU(**{**vars(method), "budget": 0.99}).tune(copy.deepcopy(net), clean, clean, GIVEN, seed=4)
    for name, value in slow.state_dict().items():
        assert torch.allclose(fast.state_dict()[name], value, atol=1e-5), name
        if "running" in name:
            assert torch.equal(fast.state_dict()[name], net.state_dict()[name])
    assert not same(fast.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ([0.9, 0.89, 0.5], 2),
        ([0.9, 0.5, 0.88], 3),
        ([0.95, 0.99, 0.9], 3),
        ([0.5, 0.7, 0.6], 3),
        ([0.7, 0.6, 0.5], 3),
        ([0.0, 0.0, 0.0], 3),
        ([0.88, 0.87, 0.87], 1),
    ],
)
def test_which_round_is_delivered(monkeypatch, accuracies, chosen):
    """The latest within 2 % of the original's 90 %, or else the last."""
    rounds = iter(range(1, 4))

    def unlearn(self, model, *_):
        model.mark = next(rounds)
        return True

    def correct(model, held):
        share = accuracies[model.mark - 1] if hasattr(model, "mark") else 0.9
        return torch.arange(100) < 100 * share

    monkeypatch.setattr(IBAU, "_unlearn", unlearn)
    monkeypatch.setattr(ibau, "correct", correct)
    with choosing() as choices:
        assert IBAU(rounds=3).tune(build("plain"), make_clean(), make_clean(), GIVEN, 0).mark == chosen
    assert choices == {"round delivered": chosen}


def test_released_delivers_the_last_round_without_judging(monkeypatch):
    monkeypatch.setattr(ibau, "correct", None)
    net = build("plain")
    assert IBAU(variant="released", rounds=2).tune(net, make_clean(), make_clean(), GIVEN, 0) is net


@pytest.mark.parametrize(
    ("variant", "share", "count", "perturbed"),
    [
        ("fixed", 0.01, 100, 1),
        ("fixed", 0.01, 3, 1),
        ("fixed", 0.5, 5, 2),
        ("fixed", 1, 7, 7),
        ("released", 0.01, 100, 1),
        ("released", 0.01, 99, 0),
        ("released", 0.5, 5, 2),
        ("released", 1, 7, 7),
    ],
)
def test_share_of_perturbed_images(variant, share, count, perturbed):
    generator = torch.Generator().manual_seed(0)
    method = IBAU(variant=variant, share=share)
    draws = torch.stack([method._chosen(count, generator).flatten() for _ in range(200)])
    assert torch.equal(draws.sum(1), torch.full((200,), float(perturbed)))
    assert perturbed == 0 or draws.any(0).all() or count == 100


def test_passes_equal_the_count(clean):
    """Per round: predictions, perturbation, outer loss, and the first batch at every step; then the held-out images."""
    net = build("batchnorm")
    held = clean.take(range(6))
    for variant, judged in (("fixed", 6), ("released", 0)):
        passes = Passes(net)
        IBAU(variant=variant, rounds=3, batch_size=8).tune(copy.deepcopy(net), clean, held, GIVEN, 0)
        assert passes.images == 3 * (3 * 32 + 4 * 8 + judged) + judged


def test_a_trained_model_forgets_its_trigger():
    net, clean = backdoored(7)
    images = clean.floats()
    images[:, :, 6:, 6:] = 1
    others = clean.labels != 7
    repaired = IBAU(variant="released", lr=3e-4, share=0.1).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    with torch.no_grad():
        fooled, still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, repaired))
    assert fooled > 0.9
    assert still < 0.5


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("fields", [{"lr": 1e30}, {"perturb_lr": 1e38}, {"contraction_lr": 1e30}], ids=str)
def test_divergence_does_not_crash(name, fields, clean):
    repair = IBAU(rounds=2, **fields).repair(build(name), clean, GIVEN)
    assert all(torch.isfinite(value).all() for value in repair.model.state_dict().values())


def test_divergence_ends_at_the_last_finite_round(clean):
    net = build("batchnorm")
    with pytest.warns(UnreliableWarning, match="unlearn the perturbation: NaN or infinity at step"):
        tuned = IBAU(lr=1e30, rounds=3).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    assert same(tuned.state_dict(), net.state_dict())


@pytest.mark.parametrize(("count", "batch_size"), [(4, 100), (9, 8), (5, 2)])
def test_few_images_mean_a_step(count, batch_size):
    net, clean = build("batchnorm"), make_clean(count)
    tuned = IBAU(rounds=1, batch_size=batch_size).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    assert not same(tuned.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0},
        {"rounds": 0},
        {"perturb_lr": 0},
        {"penalty": -1},
        {"iterations": 0},
        {"contraction_lr": 0},
        {"share": 0},
        {"share": 1.1},
        {"batch_size": 1},
        {"variant": "other"},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^i-bau: `{next(iter(fields))}`"):
        IBAU(**fields)
