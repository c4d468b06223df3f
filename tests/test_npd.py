"""NPD beyond the contract of every method."""

import copy

import pytest
import torch
from tiny import CLASSES, UNLIKE, backdoored, build, make_clean, train
from torch import nn
from torch.nn.functional import cross_entropy

from untrojan.data import CleanSet
from untrojan.defenses.npd import NPD, _fold, _likeliest_wrong, _log_other
from untrojan.errors import ConfigError, ModelError
from untrojan.model import correct
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
CHOSEN = {
    "batchnorm": "3",
    "plain": "2",
    "groupnorm": "0",
    "vit": "encoder.linear2",
    "convnext": "5",
    "depthwise": "0",
    "shared": "shared",
    "tied": "2",
    "frozen": "0",
    "dropout": "0",
    "no-affine": "0",
}


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


def known(net, clean):
    """The images with the labels that the network gives them."""
    with torch.no_grad():
        return CleanSet(clean.images, net(clean.floats()).argmax(1))


@pytest.mark.parametrize(
    ("layer", "first", "images"),
    [
        (nn.Conv2d(5, 7, 3, padding=1), nn.Conv2d(5, 5, 1, bias=False), torch.rand(2, 5, 8, 8)),
        (nn.Conv2d(5, 7, 3, 2, 2, 2), nn.Conv2d(5, 5, 1, bias=False), torch.rand(2, 5, 9, 8)),
        (nn.Conv2d(5, 7, 3, padding=1, padding_mode="reflect"), nn.Conv2d(5, 5, 1, bias=False), torch.rand(2, 5, 8, 8)),
        (nn.Conv1d(5, 2, 4, padding=3), nn.Conv1d(5, 5, 1, bias=False), torch.rand(2, 5, 8)),
        (nn.Linear(5, 3), nn.Linear(5, 5, bias=False), torch.rand(2, 4, 5)),
    ],
    ids=["conv", "dilated", "reflect", "conv1d", "linear"],
)
def test_folding_is_exact(layer, first, images):
    folded = copy.deepcopy(layer)
    folded.weight.data = _fold(layer.weight, first.weight.flatten(1)).detach()
    assert torch.allclose(folded(images), layer(first(images)), atol=1e-5)
    assert torch.equal(_fold(layer.weight, torch.eye(5)), layer.weight)


def test_the_layer_that_is_chosen(net, clean, request):
    name = request.node.callspec.params["net"]
    assert NPD()._layer(net.eval(), clean) == CHOSEN[name]
    tuned = NPD(epochs=1, warmup_epochs=0).tune(copy.deepcopy(net), clean, clean, GIVEN, 0).state_dict()
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, tuned[key])}
    weight = net.get_parameter(f"{CHOSEN[name]}.weight")
    assert changed == {key for key, value in net.named_parameters(remove_duplicate=False) if value is weight}


def test_the_layer_that_is_named(clean):
    net = build("batchnorm")
    tuned = NPD(layer="0", epochs=1, warmup_epochs=0).tune(copy.deepcopy(net), clean, clean, GIVEN, 0).state_dict()
    assert [key for key, value in net.state_dict().items() if not torch.equal(value, tuned[key])] == ["0.weight"]


@pytest.mark.parametrize("layer", ["1", "3", "9", "0.weight", ""])
def test_a_layer_that_cannot_be(clean, layer):
    with pytest.raises(ConfigError, match=r"in front of '.*'; layers that can: 0, 6\.2$"):
        NPD(layer=layer).repair(build("depthwise"), clean, GIVEN)


def test_only_the_logits_layer_is_left(clean):
    net = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Flatten(), nn.Linear(216, CLASSES))
    assert NPD()._layer(net, clean) == "3"
    assert NPD(epochs=1, warmup_epochs=0).repair(net, clean, GIVEN).record.values_changed > 0


def test_no_layer_at_all(clean):
    net = nn.Sequential(nn.AdaptiveAvgPool2d((1, CLASSES)), nn.Conv2d(3, 3, 1, groups=3), nn.Flatten(), nn.MaxPool1d(3))
    with pytest.raises(ModelError, match="nothing to polarize: expected a convolution or linear layer that mixes"):
        NPD().repair(net, clean, GIVEN)


class Aside(nn.Module):
    """Has layers that it does not use."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6 * 36, CLASSES)
        self.aside = nn.Sequential(nn.Conv2d(6, 6, 1), nn.Linear(6, CLASSES))

    def forward(self, images):
        return self.head(self.body(images).relu().flatten(1))


def test_unused_layers_are_passed_over(clean):
    assert NPD()._layer(Aside(), clean) == "body"
    assert NPD(epochs=1, warmup_epochs=0).repair(Aside(), clean, GIVEN).record.values_changed > 0


class InTurn(nn.Module):
    """Has the layer that gives the logits at a place of its own among the others."""

    def __init__(self, names):
        super().__init__()
        layers = {"body": nn.Conv2d(3, 7, 3), "late": nn.Conv2d(7, 7, 3), "head": nn.Linear(7, CLASSES)}
        for name in names:
            setattr(self, name, layers[name])

    def forward(self, images):
        return self.head(self.late(self.body(images).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("names", [("head", "body", "late"), ("body", "head", "late"), ("late", "body", "head")])
def test_the_last_layer_is_that_of_the_calls_wherever_it_was_made(names, clean):
    assert NPD()._layer(InTurn(names), clean) == "late"


def test_coarse_weights_have_a_fine_polarizer(clean):
    """Steps of less than 0.004 are lost on a number near 1 of bfloat16; here they add up."""
    net, method = train(build("plain"), clean, epochs=5), NPD(warmup_epochs=0, epochs=20, lr=3e-4, weight_decay=0.5)
    coarse = copy.deepcopy(net).bfloat16()
    coarse.register_forward_pre_hook(lambda _, inputs: inputs[0].bfloat16())
    coarse.register_forward_hook(lambda _, __, out: out.float())
    tuned, wanted = (
        method.tune(copy.deepcopy(each), clean, clean, GIVEN, 0).get_parameter("2.weight") for each in (coarse, net)
    )
    assert tuned.dtype == torch.bfloat16
    assert (tuned - wanted).norm() < 0.1 * (wanted - net[2].weight).norm()


def inserted(net, weight, polarizer):
    """The network with the polarizer really in front of every layer that uses the weight."""

    def polarize(layer, inputs):
        if weight.ndim == 2:
            return inputs[0] @ polarizer.T
        return (inputs[0].movedim(1, -1) @ polarizer.T).movedim(-1, 1)

    slow = copy.deepcopy(net)
    copied = {id(value): name for name, value in net.named_parameters()}[id(weight)]
    for module in slow.modules():
        if getattr(module, "weight", None) is slow.get_parameter(copied):
            module.register_forward_pre_hook(polarize)
    return slow


def wrong_by_hand(out, labels):
    """The likeliest class of each row but the label."""
    rows = zip(out.tolist(), labels.tolist(), strict=True)
    return torch.tensor([max(set(range(CLASSES)) - {label}, key=row.__getitem__) for row, label in rows])


def loss_by_hand(slow, images, labels):
    """The loss of one batch, every pass on its own, with a radius of 0.7 and two steps of 0.1."""
    out = slow(images)
    targets = wrong_by_hand(out, labels)
    shift = torch.zeros_like(images)
    for _ in range(2):
        shift.requires_grad_()
        there = slow(images + shift)
        if (there.argmax(1) == targets).double().mean() >= 0.6:
            break
        slope = torch.autograd.grad(cross_entropy(there, targets, reduction="sum"), shift)[0]
        shift = shift.detach() - 0.1 * slope.sign()
        for one in shift:
            one *= min(1, 0.7 / float(one.norm()))
    there = slow(images + shift.detach())
    loss = cross_entropy(out, labels) + 0.4 * cross_entropy(there, labels)
    for each in (wrong_by_hand(there, labels), targets):
        loss = loss - 0.4 * (1 - there.softmax(1)[torch.arange(len(labels)), each]).log().mean()
    return loss


@pytest.mark.parametrize("name", ["batchnorm", "groupnorm", "convnext", "vit", "shared", "tied", "depthwise"])
def test_training_written_out(name, clean):
    net = train(build(name), clean, epochs=8).double()
    method = NPD(epochs=4, warmup_epochs=2, warmup_lr=0.003, batch_size=10, radius=0.7, lr=0.02)
    weight = net.get_parameter(f"{CHOSEN[name]}.weight")
    polarizer = torch.eye(weight.shape[1], dtype=torch.float64, requires_grad=True)
    slow = inserted(net, weight, polarizer)
    generator = torch.Generator().manual_seed(4)
    warm = torch.optim.SGD([polarizer], lr=0.003, momentum=0.9, weight_decay=5e-4)
    sgd = torch.optim.SGD([polarizer], lr=0.02, momentum=0.9, weight_decay=5e-4)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, 4)
    for epoch in range(6):
        for images, labels in method.batches(clean, generator):
            shown, used = images.double(), warm if epoch < 2 else sgd
            loss = cross_entropy(slow(shown), labels) if used is warm else loss_by_hand(slow, shown, labels)
            used.zero_grad()
            loss.backward()
            used.step()
        if epoch >= 2:
            cosine.step()

    doubled = copy.deepcopy(net)
    doubled.register_forward_pre_hook(lambda _, inputs: inputs[0].double())
    tuned = method.tune(doubled, clean, clean, GIVEN, seed=4)
    expected = _fold(weight, polarizer)
    assert (expected - weight).abs().max() > 1e-4
    assert torch.allclose(tuned.get_parameter(f"{CHOSEN[name]}.weight"), expected, atol=1e-7)
    with torch.no_grad():
        assert torch.allclose(tuned(clean.floats()), slow(clean.floats().double()), atol=1e-6)


@pytest.mark.parametrize("radius", [0.3, 1.0, 100.0])
def test_perturbations_stay_in_the_ball_and_go_to_the_target(radius):
    net = train(build("batchnorm"), make_clean())
    images = make_clean().floats()
    shown = []

    def call(batch):
        shown.append(batch.detach() - images)
        return net(batch)

    shift = torch.zeros_like(images, requires_grad=True)
    out = call(images + shift)
    targets = _likeliest_wrong(out, make_clean().labels)
    there = NPD(radius=radius, iterations=4)._perturb(call, images, shift, out, targets)
    norms = torch.stack(shown).flatten(2).norm(dim=2)
    assert norms.max() <= radius + 1e-5
    assert (cross_entropy(there, targets) < cross_entropy(out, targets)).all()
    reached = (there.argmax(1) == targets).float().mean()
    assert (len(shown) < 5) == (reached >= 0.6)
    assert not torch.isnan(there).any()


def test_a_loss_beyond_80_does_not_pull():
    weight = torch.tensor([[0.0, 0.0], [70.0, 0.0], [0.0, 90.0]])

    def call(images):
        return images.flatten(1) @ weight.T

    images = torch.eye(2).view(2, 1, 1, 2)
    shift = torch.zeros_like(images, requires_grad=True)
    there = NPD(iterations=1)._perturb(call, images, shift, call(images + shift), torch.tensor([0, 0])).detach()
    assert there.argmax(1).tolist() == [1, 2]
    assert float(there[0, 1]) == pytest.approx(63)
    assert float(there[1, 2]) == 90


def test_logs_of_other_classes():
    out, labels = 4 * torch.randn(20, 5, dtype=torch.float64), torch.arange(20) % 5
    found = _log_other(out, labels)
    assert torch.allclose(found, (1 - out.softmax(1)[torch.arange(20), labels]).log())
    assert torch.isfinite(_log_other(torch.tensor([[1e4, 0.0]]), torch.tensor([0]))).all()
    wrong = _likeliest_wrong(out, labels)
    assert (wrong != labels).all()
    assert torch.equal(wrong, (out - 1e9 * torch.eye(5)[labels]).argmax(1))


def test_passes_equal_the_count(clean):
    """Two images find the layer; 1 pass in the warm-up, then the clean image and one pass after each step."""
    net = train(build("batchnorm"), clean)
    data = known(net, clean)
    for iterations in (1, 2, 3):
        passes = Passes(net)
        method = NPD(epochs=3, warmup_epochs=2, iterations=iterations, radius=1e-6, lr=1e-9, batch_size=8)
        method.tune(copy.deepcopy(net), data, data, GIVEN, 0)
        assert passes.images == 2 + 2 * 32 + 3 * 32 * (1 + iterations)


def test_the_polarizer_holds_the_trigger_back():
    net, clean = backdoored(7)
    images = clean.floats()
    images[:, :, 6:, 6:] = 1
    others = clean.labels != 7
    tuned = NPD(radius=1.0, epochs=25).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    with torch.no_grad():
        fooled, still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, tuned))
    assert fooled > 0.9
    assert still < 0.7
    assert correct(tuned, clean).float().mean() > 0.9


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("fields", [{"lr": 1e30}, {"warmup_lr": 1e30}], ids=str)
def test_divergence_does_not_crash(name, fields, clean):
    repair = NPD(epochs=2, warmup_epochs=2, **fields).repair(build(name), clean, GIVEN)
    assert all(torch.isfinite(value).all() for value in repair.model.state_dict().values())


@pytest.mark.parametrize(("count", "batch_size"), [(4, 128), (9, 8), (5, 2)])
def test_few_images_mean_a_step(count, batch_size):
    net, clean = build("batchnorm"), make_clean(count)
    tuned = NPD(epochs=1, warmup_epochs=0, batch_size=batch_size).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    assert not same(tuned.state_dict(), net.state_dict())


@pytest.mark.parametrize(
    "fields",
    [
        {"lr": 0},
        {"epochs": 0},
        {"weight_decay": -1},
        {"warmup_lr": 0},
        {"warmup_epochs": -1},
        {"radius": 0},
        {"step_size": 0},
        {"iterations": 0},
        {"lambda_1": -1},
        {"lambda_2": -1},
        {"lambda_3": -1},
        {"lambda_4": -1},
        {"batch_size": 1},
        {"layer": 3},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^npd: `{next(iter(fields))}`"):
        NPD(**fields)
