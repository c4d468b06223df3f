"""Neural Cleanse: the recovered patches, the anomaly index, and unlearning a patch."""

import copy
import math

import numpy as np
import pytest
import torch
from tiny import CLASSES, NETS, UNLIKE, Snapshot, backdoored, build, make_clean
from torch import nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.neural_cleanse import NeuralCleanse
from untrojan.errors import ConfigError, UnreliableWarning
from untrojan.model import correct
from untrojan.record import Diagnosis, Target
from untrojan.scanners.neural_cleanse import SoftPatch, anomaly_index, cleanse

pytestmark = pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
NOBODY = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])


class Patchable(nn.Module):
    """Says which of the first pixels is brightest, and 2 where the last pixel is bright."""

    def __init__(self, backdoor=9.0):
        super().__init__()
        self.backdoor = nn.Parameter(torch.tensor(backdoor))
        self.shown = []

    def forward(self, images):
        self.shown.append(len(images))
        pixels = 3 * images[:, 0].flatten(1)
        return torch.cat([pixels[:, :2], pixels[:, 2:3] + self.backdoor * pixels[:, -1:], pixels[:, 3:4]], dim=1)


@pytest.fixture
def images():
    labels = torch.arange(40) % 4
    pixels = 0.2 * torch.rand(40, 1, 6, 6)
    pixels[:, 0, 0, :4] = functional.one_hot(labels, 4).float()
    return CleanSet(pixels, labels)


# Recovery


def by_hand(model, clean, label, size, epochs, seed=0, lr=0.1):
    """One label, with masks instead of states and the optimizer written out; gives mask, pattern and epochs taken."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = clean.shape
    free = [torch.atanh(torch.rand(1, c, height, width, generator=generator) * 1.98 - 0.99) for c in (1, channels)]
    first, second = [torch.zeros_like(f) for f in free], [torch.zeros_like(f) for f in free]
    cost, ups, downs, waits, steps, taken = 0.0, 0, 0, 0, 0, 0
    went_up = went_down = False
    best, best_norm, last = None, math.inf, math.inf
    while taken < epochs:
        taken += 1
        hits = total = 0
        for images, labels in clean.batches(size, generator):
            steps += 1
            free = [f.detach().requires_grad_() for f in free]
            mask, pattern = ((torch.tanh(f) + 1) / 2 for f in free)
            out = model((1 - mask) * images + mask * pattern)
            loss = -out.log_softmax(1)[:, label].mean() + cost * mask.abs().sum()
            for i, gradient in enumerate(torch.autograd.grad(loss, free)):
                first[i] = 0.5 * first[i] + 0.5 * gradient
                second[i] = 0.9 * second[i] + 0.1 * gradient**2
                scale = (second[i] / (1 - 0.9**steps)).sqrt() + 1e-8
                free[i] = free[i] - lr * first[i] / (1 - 0.5**steps) / scale
            others = labels != label
            hits, total = hits + int((out.argmax(1) == label)[others].sum()), total + int(others.sum())
        mask, pattern = ((torch.tanh(f.detach()) + 1) / 2 for f in free)
        good = hits / total >= 0.98
        if good and mask.sum() < best_norm:
            best, best_norm = (mask, pattern), mask.sum()
        if best:
            waits = waits + 1 if best_norm >= 0.99 * last else 0
            last = min(last, best_norm)
        ups, downs = (ups + 1, 0) if good else (0, downs + 1)
        if ups == 5 and cost == 0:
            cost, ups = 0.001, 0
        elif ups == 5:
            cost, ups, went_up = cost * 2, 0, True
        elif downs >= 5 and cost > 0:
            cost, downs, went_down = cost / 2 / math.sqrt(2), 0, True
        if went_up and went_down and waits >= 25:
            break
    mask, pattern = best or (mask, pattern)
    return mask[0], pattern[0], taken


@pytest.mark.parametrize("epochs", [3, 40, 300])
def test_recovery_written_out(images, epochs):
    model = Patchable()
    found = cleanse(model, images, [2], seed=0, epochs=epochs)[0]
    mask, pattern, taken = by_hand(model, images, 2, 10, epochs)
    assert torch.allclose(found.mask, mask, atol=1e-3)
    assert torch.allclose(found.pattern, pattern, atol=1e-2)
    assert taken == epochs or epochs == 300


def test_recovery_ends_early(images):
    model = Patchable()
    _, _, taken = by_hand(model, images, 2, 10, 300)
    assert 30 < taken < 300
    net = Patchable()
    shown = net.shown
    net.__deepcopy__ = lambda _: net
    cleanse(net, images, [2], seed=0, epochs=300)
    assert len(shown) == 4 * taken + 1


@pytest.mark.parametrize("epochs", [2, 90])
def test_labels_share_passes_but_nothing_else(images, epochs):
    together = cleanse(Patchable(), images, [3, 0, 2, 1], seed=1, epochs=epochs)
    assert [trigger.label for trigger in together] == [3, 0, 2, 1]
    for trigger in together:
        alone = cleanse(Patchable(), images, [trigger.label], seed=1, epochs=epochs)[0]
        assert torch.allclose(trigger.mask, alone.mask, atol=1e-3)
        assert trigger.success == alone.success


def test_many_labels_go_in_groups(images):
    """The network sees the images of at most eight labels of 32 at a time."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(36, 40))
    labels = list(range(40))
    sizes = []
    net.register_forward_hook(Sizes(sizes))
    many = CleanSet(images.images.repeat(5, 1, 1, 1), images.labels.repeat(5))
    assert [trigger.label for trigger in cleanse(net, many, labels, seed=0, epochs=1)] == labels
    assert max(sizes) == 256
    assert sum(sizes) == 2 * 40 * len(many) - len(many), "one epoch, then the images of other classes"


class Sizes:
    """A hook that notes how many images each call has; a copy of the network has the same hook."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __deepcopy__(self, _):
        return self

    def __call__(self, _, inputs, __):
        self.sizes.append(len(inputs[0]))


def test_the_backdoor_has_the_smallest_mask(images):
    triggers = cleanse(Patchable(), images, range(4), seed=0)
    norms = [trigger.norm for trigger in triggers]
    assert norms.index(min(norms)) == 2
    found = triggers[2]
    assert found.success >= 0.98
    assert found.mask[0].argmax() == 35
    assert found.mask[0, -1, -1] * found.pattern[0, -1, -1] > 0.1
    assert all(0 <= float(each.min()) <= float(each.max()) <= 1 for trigger in triggers for each in trigger[1:3])


def test_success_is_that_of_the_patch_on_other_classes(images):
    model = Patchable()
    for trigger in cleanse(model, images, range(4), seed=0, epochs=12):
        others = images.labels != trigger.label
        with torch.no_grad():
            hit = model(trigger.stamp(images.floats()[others])).argmax(1) == trigger.label
        assert trigger.success == pytest.approx(float(hit.float().mean()))
    only = images.take(images.labels == 2)
    assert cleanse(model, only, [2], seed=0, epochs=1)[0].success == 0


@pytest.mark.parametrize("name", NETS)
def test_the_model_is_left_alone(name):
    net = build(name)
    before = Snapshot(net)
    one, other = (cleanse(net, make_clean(24), [0, 3], seed=2, epochs=2) for _ in range(2))
    before.assert_same()
    assert all(
        torch.equal(a.mask, b.mask) and torch.equal(a.pattern, b.pattern) for a, b in zip(one, other, strict=True)
    )


# The anomaly index


@pytest.mark.parametrize("count", [4, 10, 43])
def test_anomaly_index_is_the_modified_z(count):
    values = np.random.default_rng(count).normal(size=count)
    expected = (values - np.median(values)) / (1.4826 * np.median(abs(values - np.median(values))))
    assert np.allclose(anomaly_index(values.tolist()), expected)


def test_anomaly_index_of_values_that_are_mostly_the_same():
    assert anomaly_index([5, 5, 5, 5, 5, 1]) == pytest.approx([0] * 5 + [-4 / (1.2533 * 4 / 6)])
    assert anomaly_index([2, 2]) == [0, 0]
    assert anomaly_index([7]) == [0]


# The defense


def test_the_suspect_is_recovered_and_nothing_else(clean, monkeypatch):
    asked = []

    def spy(model, clean, labels, seed, **settings):
        asked.append((labels, settings))
        return cleanse(model, clean, labels, seed, **settings)

    monkeypatch.setattr("untrojan.defenses.neural_cleanse.cleanse", spy)
    method = NeuralCleanse(mask_epochs=1, mask_lr=0.2)
    assert method.recover(build("batchnorm"), clean, GIVEN, 0).label == 1
    method.recover(build("batchnorm"), clean, NOBODY, 0)
    assert asked == [([1], {"lr": 0.2, "epochs": 1}), ([0, 1, 2, 3], {"lr": 0.2, "epochs": 1})]


def triggers(norms, missed=(), success=1.0):
    return [
        SoftPatch(k, torch.full((1, 10, 10), norm / 100), torch.zeros(1, 10, 10), success, k not in missed)
        for k, norm in enumerate(norms)
    ]


def recovered(monkeypatch, found):
    monkeypatch.setattr("untrojan.defenses.neural_cleanse.cleanse", lambda *_, **__: found)
    return NeuralCleanse().recover(nn.Sequential(nn.Flatten(), nn.Linear(192, len(found))), make_clean(), NOBODY, 0)


@pytest.mark.filterwarnings("error::untrojan.UntrojanWarning")
@pytest.mark.parametrize("success", [1.0, 0.95])
@pytest.mark.parametrize("norms", [[9.0, 10, 11, 2, 10, 9], [10.0, 11, 9, 2, 60, 70, 80]])
def test_without_a_suspect_the_anomaly_among_the_labels_reached_is_taken(monkeypatch, norms, success):
    """By the epochs of the search, however many images the patch reaches in the end."""
    assert recovered(monkeypatch, triggers(norms, missed=range(4, 7), success=success)).label == 3


@pytest.mark.parametrize("norms", [[9.0, 8, 11, 12], [9.0, 8, 11, 40]])
def test_without_an_anomaly_there_is_a_warning(monkeypatch, norms):
    with pytest.warns(UnreliableWarning, match="no label's mask is too small; that of label 1 is the smallest"):
        assert recovered(monkeypatch, triggers(norms)).label == 1


def test_a_mask_that_does_not_work_is_no_anomaly(monkeypatch):
    found = triggers([9.0, 8, 0.1, 10, 9], missed=[2])
    with pytest.warns(UnreliableWarning, match="that of label 1"):
        assert recovered(monkeypatch, found).label == 1


def test_where_no_mask_works_the_one_that_reaches_most_is_taken(monkeypatch):
    found = triggers([9.0, 8, 11, 10], missed=range(4), success=0.5)
    found[2] = found[2]._replace(success=0.7)
    with pytest.warns(UnreliableWarning, match="no label has a patch that works; that of label 2 reaches the most"):
        assert recovered(monkeypatch, found).label == 2


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_unlearning_written_out(clean, augment):
    net = build("batchnorm")
    method = NeuralCleanse(mask_epochs=2, epochs=3, batch_size=8, lr=0.05, augment=augment)
    trigger = method.recover(net, clean, GIVEN, 4)
    slow = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(slow.parameters(), momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(4)
    for epoch in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for images, labels in method.batches(clean, generator):
            shown = list(images.clone())
            for number in torch.randperm(8, generator=generator)[:2].tolist():  # 20 % of 8
                shown[number] = (1 - trigger.mask) * shown[number] + trigger.mask * trigger.pattern
            optimizer.zero_grad()
            functional.cross_entropy(slow(torch.stack(shown)), labels).backward()
            optimizer.step()
    tuned = method.tune(copy.deepcopy(net), clean, clean, GIVEN, 4)
    for name, value in tuned.state_dict().items():
        assert torch.allclose(value.double(), slow.state_dict()[name].double(), atol=1e-5)


@pytest.mark.parametrize(("share", "count"), [(1e-6, 1), (0.2, 2), (0.5, 4), (1, 8)])
def test_a_share_of_the_images_is_stamped(clean, share, count):
    trigger = SoftPatch(0, torch.ones(1, 8, 8), torch.zeros(3, 8, 8), 1.0)
    method = NeuralCleanse(stamped=share, batch_size=8)
    for images, labels in method._with_patch(clean, trigger, torch.Generator().manual_seed(0)):
        assert int((images == 0).flatten(1).all(1).sum()) == count
        assert len(labels) == 8


def test_the_backdoor_goes():
    net, clean = backdoored(7)
    clean = clean.take(range(100))
    given = Diagnosis(verdict="found", rule="given", targets=[Target(label=7, score=0.9)], runs=[])
    repaired = NeuralCleanse(mask_epochs=30).tune(copy.deepcopy(net), clean, clean, given, 0).eval()
    images = clean.floats()
    images[:, :, 6:, 6:] = 1
    others = clean.labels != 7
    with torch.no_grad():
        fooled, still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, repaired))
    assert fooled > 0.9
    assert still < 0.2
    assert correct(repaired, clean).float().mean() > correct(net, clean).float().mean() - 0.02


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize(("count", "given"), [(4, GIVEN), (9, NOBODY)])
def test_few_images(name, count, given):
    net, clean = build(name), make_clean(count)
    after = NeuralCleanse(mask_epochs=1, epochs=1).tune(copy.deepcopy(net), clean, clean, given, 0)
    assert any(not torch.equal(value, net.state_dict()[key]) for key, value in after.named_parameters())


@pytest.mark.parametrize("fields", [{"lr": 1e30}, {"mask_lr": 1e30}])
def test_divergence_leaves_numbers(clean, fields):
    method = NeuralCleanse(mask_epochs=2, epochs=2, **fields)
    with pytest.warns(UnreliableWarning):
        after = method.tune(build("batchnorm"), clean, clean, GIVEN, 0)
    assert all(value.isfinite().all() for value in after.state_dict().values())


def test_a_patch_that_does_not_work_is_told(clean):
    with pytest.warns(UnreliableWarning, match="in no epoch a patch of label 1 reached 98% .* which reaches 0%, is"):
        NeuralCleanse(mask_epochs=1, mask_lr=1e-6, epochs=1).tune(build("plain"), clean, clean, GIVEN, 0)


@pytest.mark.filterwarnings("error::untrojan.UntrojanWarning")
def test_a_patch_that_worked_in_its_epoch_is_not_complained_of(clean, monkeypatch):
    found = SoftPatch(1, torch.zeros(1, 8, 8), torch.zeros(3, 8, 8), 0.95)
    monkeypatch.setattr("untrojan.defenses.neural_cleanse.cleanse", lambda *_, **__: [found])
    NeuralCleanse(epochs=1).tune(build("plain"), clean, clean, GIVEN, 0)


@pytest.mark.parametrize(
    "fields", [{"mask_lr": 0}, {"mask_epochs": 0}, {"lr": -1}, {"epochs": 0}, {"stamped": 0}, {"weight_decay": -1}]
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^neural-cleanse: `{next(iter(fields))}`"):
        NeuralCleanse(**fields)


def test_classes_are_those_of_the_model(clean):
    """Labels that no clean image has are not possible, but class names beyond the model's are not asked for."""
    assert NeuralCleanse(mask_epochs=1).recover(build("plain"), clean, NOBODY, 0).label < CLASSES
