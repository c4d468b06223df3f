"""ULRL beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import CLASSES, UNLIKE, Returns, backdoored, build, make_clean, train
from torch import nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.tuning import sgd_cosine
from untrojan.defenses.ulrl import ULRL
from untrojan.errors import ConfigError, ModelError, UnreliableWarning
from untrojan.record import Diagnosis, Target, UnlearningRun
from untrojan.scanners.unlearning import UnlearnedModel, Unlearning, UnlearningScanner

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
RUN = UnlearningRun(seed=0, images=32, reached=True, label=0, share=1, trace=[])


def linear(classes=10):
    torch.manual_seed(2)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU(), nn.Linear(6, classes))


def images_of(classes=10):
    return make_clean(4 * classes, classes)


@pytest.fixture
def moves(monkeypatch):
    """Let unlearning move the rows of the last layer by given amounts, and that of the others by a lot."""

    def set_(amounts):
        def unlearn(self, model, clean, seed, view, **_):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                for value in moved.parameters():
                    value.add_(100)
                *_, weight, _ = moved.parameters()
                *_, original, _ = model.parameters()
                signs = torch.tensor([1.0, -1.0]).repeat(len(original[0]) // 2)
                weight.copy_(original + torch.tensor(amounts)[:, None] * signs / len(signs))
            return UnlearnedModel(moved, RUN)

        monkeypatch.setattr(ULRL, "unlearn", unlearn)

    return set_


USUAL = [1.0, 1.1, 0.9, 1.2, 1.0, 0.8, 1.1, 0.95, 1.05, 1.0]


def amounts(**others):
    return [others.get(f"row{number}", usual) for number, usual in enumerate(USUAL)]


@pytest.mark.parametrize(
    ("moved", "fixed", "released"),
    [
        (amounts(row2=5.0, row5=9.0, row8=7.0), [5, 8], [2, 5]),
        (amounts(row3=4.0), [3], [3]),
        (amounts(row3=0.0, row4=0.01), [], []),
        (amounts(row3=0.0, row9=3.0), [9], [9]),
        (amounts(), [], []),
        ([0.0] * 9 + [1.0], [9], [9]),
        ([0.0] * 10, [], []),
        ([0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 8.0], [6], [4, 6]),  # no deviation: that of the mean stands in, or none
        ([1.0, 1.1, 1.2, 1.3, 1.8, 2.5], [5], [4, 5]),  # by the lower medians, 1.2 and 0.1
        ([1.0, 9.0], [], [1]),
    ],
)
def test_rows_that_move_too_far(moves, moved, fixed, released):
    moves(moved)
    net, clean = linear(len(moved)), images_of(len(moved))
    assert ULRL().suspicious(net, clean, 0) == fixed
    assert ULRL(variant="released").suspicious(net, clean, 0) == released


def test_released_clips_the_gradient_of_unlearning(monkeypatch):
    """One step of SGD at a learning rate of 1 is as long as the gradient."""
    net = nn.Sequential(Returns(lambda images: 100 * images.flatten(1)), nn.Linear(192, 4))
    steps = []

    def spy(self, model, *arguments, **fields):
        done = Unlearning.unlearn(self, model, *arguments, **fields)
        after, before = (nn.utils.parameters_to_vector(each.parameters()).detach() for each in (done.model, model))
        steps.append(float((after - before).norm()))
        return done

    monkeypatch.setattr(ULRL, "unlearn", spy)
    for variant in ("fixed", "released"):
        method = ULRL(variant=variant, unlearn_epochs=1, unlearn_lr=1, unlearn_weight_decay=0)
        method.suspicious(net, make_clean(8), 0)
    assert steps[0] > 100
    assert steps[1] == pytest.approx(20, rel=1e-3)


def test_the_threshold_is_the_modified_z(moves):
    """Median 1, median deviation 0.075 of these ten: a row 3.4 and one 3.6 deviations above."""
    usual = [1.0, 1.1, 0.9, 1.2, 0.8, 1.0, 1.05, 0.95, 1.0]
    for deviations, rows in ((3.4, []), (3.6, [9])):
        last = 1.025
        for _ in range(50):  # the row itself moves the median; find the value at which it is where it should be
            values = sorted([*usual, last])
            middle = (values[4] + values[5]) / 2
            away = sorted(abs(value - middle) for value in values)
            last = middle + deviations * 1.4826 * (away[4] + away[5]) / 2
        moves([*usual, last])
        assert ULRL().suspicious(linear(), images_of(), 0) == rows
        assert ULRL(z=3).suspicious(linear(), images_of(), 0) == [9]


def test_rows_after_real_unlearning():
    """The rows again, by a loop over the weights."""
    net, clean = backdoored(7)
    clean = clean.take(range(60))
    method = ULRL(z=0.5, unlearn_epochs=5)
    unlearned, _ = method.unlearn(net, clean, 4, "plain")
    scanned, _ = UnlearningScanner(unlearn_epochs=5).unlearn(net, clean, 4, "plain")
    assert all(torch.equal(a, b) for a, b in zip(unlearned.parameters(), scanned.parameters(), strict=True))
    moved = []
    for new, old in zip(unlearned.classifier.weight.tolist(), net.classifier.weight.tolist(), strict=True):
        moved.append(sum(abs(a - b) for a, b in zip(new, old, strict=True)))
    middle = sorted(moved)[4] / 2 + sorted(moved)[5] / 2
    away = sorted(abs(value - middle) for value in moved)
    scores = [(value - middle) / (1.4826 * (away[4] + away[5]) / 2) for value in moved]
    largest = sorted(range(10), key=lambda row: -scores[row])[:2]
    assert method.suspicious(net, clean, 4) == sorted(row for row in largest if scores[row] > 0.5)


@pytest.mark.parametrize("net", ["linear", "convolution", "no bias"])
def test_only_suspicious_rows_are_drawn_anew(net):
    heads = {"linear": nn.Linear(6, 5), "convolution": nn.Conv2d(3, 5, 4), "no bias": nn.Linear(6, 5, bias=False)}
    model = nn.Sequential(heads[net])
    before = copy.deepcopy(model.state_dict())
    ULRL()._reset(model[0], [1, 4], torch.Generator().manual_seed(0))
    weight = model[0].weight.detach()
    limit = math.sqrt(2 / weight[0].numel())
    assert torch.equal(weight[[0, 2, 3]], before["0.weight"][[0, 2, 3]])
    assert (weight[[1, 4]] != before["0.weight"][[1, 4]]).all()
    assert 0.7 * limit < weight[[1, 4]].abs().max() <= limit
    if net != "no bias":
        assert torch.equal(model[0].bias[[1, 4]], torch.zeros(2))
        assert torch.equal(model[0].bias[[0, 2, 3]], before["0.bias"][[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_rows_keep_their_type(dtype):
    model = nn.Sequential(nn.Linear(6, 5)).to(dtype)
    before = model[0].weight.detach().clone()
    ULRL()._reset(model[0], [1, 4], torch.Generator().manual_seed(0))
    assert model[0].weight.dtype == dtype
    assert (model[0].weight != before).any(1).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(("variant", "decay"), [("fixed", 5e-4), ("released", 0)])
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_relearning_written_out(moves, augment, variant, decay):
    moves(amounts(row2=5.0, row5=9.0))
    net, clean = linear(), images_of()
    method = ULRL(variant=variant, epochs=3, lr=0.05, batch_size=10, augment=augment)
    tuned = method.tune(copy.deepcopy(net), clean, clean, GIVEN, 6)

    slow, generator = copy.deepcopy(net).train(), torch.Generator().manual_seed(6)
    method._reset(slow[3], [2, 5], generator)
    optimizer = torch.optim.SGD(slow.parameters(), momentum=0.9, weight_decay=decay)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for images, labels in method.batches(clean, generator):
            loss = functional.cross_entropy(slow(images), labels)
            for row in (2, 5):
                new, old = slow[3].weight[row], net[3].weight[row].detach()
                loss = loss + 0.7 * new @ old / (new.norm() * old.norm())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, value in tuned.state_dict().items():
        assert torch.allclose(value, slow.state_dict()[name], atol=1e-5)


def test_new_rows_turn_away_from_the_old(moves):
    moves(amounts(row2=5.0, row5=9.0))
    net, clean = linear(), images_of()

    def cosines(alpha):
        tuned = ULRL(alpha=alpha, lr=0.1).tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
        return functional.cosine_similarity(tuned[3].weight[[2, 5]], net[3].weight[[2, 5]])

    assert (cosines(5) < cosines(0) - 0.2).all()


def test_without_a_suspicious_row_it_is_fine_tuning(moves):
    moves(amounts())
    net, clean = linear(), images_of()
    method = ULRL(epochs=2)
    with pytest.warns(UnreliableWarning, match=r"no row of the last layer moved more than 3\.5 deviations; nothing"):
        tuned = method.tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    plain, generator = copy.deepcopy(net).train(), torch.Generator().manual_seed(0)
    sgd_cosine(plain, lambda: method.batches(clean, generator), lr=0.005, epochs=2, weight_decay=5e-4)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), plain.parameters(), strict=True))


def test_a_floor_that_is_not_reached_warns(clean):
    net = train(build("plain"), clean)
    with pytest.warns(
        UnreliableWarning, match=r"unlearning ended at an accuracy of \d\.\d\d, not at the floor of 0\.20"
    ):
        ULRL(unlearn_epochs=1, unlearn_lr=1e-9).suspicious(net, clean, 0)


class HeadFirst(nn.Module):
    """Has the layer that gives the logits before another one."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(7, CLASSES)
        self.body = nn.Linear(192, 7)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).relu())


class NoLayer(nn.Module):
    """Has weights, but no layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES))

    def forward(self, images):
        return images.flatten(1)[:, :CLASSES] * self.scale


@pytest.mark.parametrize(("net", "text"), [(HeadFirst, "got body with 7 rows"), (NoLayer, "got none")])
def test_networks_without_a_row_per_class(net, text, clean):
    with pytest.raises(ModelError, match=f"a row for each class, {text}"):
        ULRL(unlearn_epochs=1).repair(net(), clean, GIVEN)


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize(("count", "batch_size"), [(4, 128), (9, 8), (7, 2)])
def test_few_images(name, count, batch_size):
    net, clean = build(name), make_clean(count)
    method = ULRL(z=0.1, batch_size=batch_size, unlearn_epochs=1, epochs=1)
    after = method.tune(copy.deepcopy(net), clean, clean, GIVEN, 0)
    assert any(not torch.equal(value, net.state_dict()[key]) for key, value in after.named_parameters())


@pytest.mark.parametrize("fields", [{"lr": 1e30}, {"unlearn_lr": 1e30}])
@pytest.mark.parametrize("name", ["batchnorm", "vit"])
def test_divergence_leaves_numbers(name, fields, clean):
    with pytest.warns(UnreliableWarning):
        after = ULRL(epochs=2, **fields).tune(build(name), clean, clean, GIVEN, 0)
    assert all(value.isfinite().all() for value in after.state_dict().values())


@pytest.mark.parametrize(
    "fields", [{"z": 0}, {"alpha": -1}, {"lr": 0}, {"epochs": 0}, {"variant": "other"}, {"floor": 1}, {"batch_size": 1}]
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^ulrl: `{next(iter(fields))}`"):
        ULRL(**fields)


def test_one_image_per_class():
    clean = CleanSet(make_clean(CLASSES).images, torch.arange(CLASSES))
    with pytest.warns(UnreliableWarning, match="too few images to hold any out"):
        repair = ULRL(unlearn_epochs=1, epochs=1).repair(build("batchnorm"), clean, GIVEN)
    assert not repair.record.after.held_out
