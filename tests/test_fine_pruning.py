"""Fine-Pruning beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import CLASSES, UNLIKE, Returns, backdoored, build, make_clean, train
from torch import nn
from torch.nn import functional

from untrojan.defenses.fine_pruning import FinePruning, _activations
from untrojan.errors import ConfigError, ModelError, UnreliableWarning
from untrojan.model import correct, logits
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
STILL = {"epochs": 1, "lr": 1e-12, "weight_decay": 0}


def tuned(method, net, clean, held=None, seed=0):
    torch.manual_seed(seed)
    return method.tune(copy.deepcopy(net), clean, held or clean, GIVEN, seed).eval()


def zero_columns(layer):
    return (layer.weight == 0).flatten(2).all(2).all(0) if layer.weight.ndim > 2 else (layer.weight == 0).all(0)


def test_lowest_activations_go_as_long_as_accuracy_holds():
    """Everything again, one feature at a time, on 64 features that go into the last layer."""
    net, clean = backdoored(7)
    clean, held = clean.split(0.4, 0)
    *_, head = (module for module in net.modules() if isinstance(module, nn.Linear))
    seen = []
    hook = head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    logits(net, clean)
    hook.remove()
    order = sorted(range(head.in_features), key=lambda feature: float(torch.cat(seen)[:, feature].abs().mean()))
    step = math.ceil(head.in_features / 100)
    before = correct(net, held)
    for drop in (0.02, 0.3):
        pruned = 0
        for count in range(step, head.in_features, step):
            tried = copy.deepcopy(net)
            *_, last = (module for module in tried.modules() if isinstance(module, nn.Linear))
            last.weight.data[:, order[:count]] = 0
            if (before.float() - correct(tried, held).float()).mean() > drop + 1e-6:
                break
            pruned = count
        after = tuned(FinePruning(prune_budget=drop, **STILL), net, clean, held)
        *_, last = (module for module in after.modules() if isinstance(module, nn.Linear))
        assert 0 < pruned < head.in_features
        assert zero_columns(last).nonzero().flatten().tolist() == sorted(order[:pruned])


def test_fine_tuning_written_out(clean):
    """Weights that were pruned are put back to 0 after every step; all else descends as usual."""
    net = train(build("batchnorm"), clean, epochs=4)
    method = FinePruning(prune_budget=0.3, lr=0.05, epochs=3, weight_decay=0.01, batch_size=8)
    keep = ~zero_columns(tuned(FinePruning(**STILL | {"prune_budget": 0.3}), net, clean)[-1][-1])
    assert 0 < keep.sum() < len(keep)
    slow = copy.deepcopy(net).train()
    slow[-1][-1].weight.data *= keep
    speeds = [torch.zeros_like(weight) for weight in slow.parameters()]
    generator = torch.Generator().manual_seed(0)
    for epoch in range(3):
        rate = 0.05 * (1 + math.cos(math.pi * epoch / 3)) / 2
        for images, labels in method.batches(clean, generator):
            slow.zero_grad()
            functional.cross_entropy(slow(images), labels).backward()
            with torch.no_grad():
                for weight, speed in zip(slow.parameters(), speeds, strict=True):
                    speed.mul_(0.9).add_(weight.grad + 0.01 * weight)
                    weight.sub_(rate * speed)
                slow[-1][-1].weight *= keep
    after = tuned(method, net, clean)
    assert torch.equal(zero_columns(after[-1][-1]), ~keep)
    for key, value in slow.state_dict().items():
        assert torch.allclose(after.state_dict()[key], value, atol=1e-5), key


class Tokens(nn.Module):
    """Gives logits per position, and their mean."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images):
        return self.head(self.inner(images.flatten(1, 2)).relu()).mean(1)


def spatial(groups):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(8, CLASSES, 3, groups=groups, padding=1),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    )


@pytest.mark.parametrize(
    ("make_net", "head", "dims"),
    [
        (lambda: spatial(1), "2", (0, 2, 3)),
        (lambda: spatial(2), "2", (0, 2, 3)),
        (lambda: spatial(4), "2", (0, 2, 3)),
        (Tokens, "head", (0, 1)),
    ],
    ids=["convolution", "two groups", "four groups", "tokens"],
)
def test_pruning_silences_the_feature(clean, make_net, head, dims):
    """Zeroing the weights that read a feature does what zeroing the feature does, wherever it is read."""
    net = train(make_net(), clean, epochs=5)
    after = tuned(FinePruning(prune_budget=0.5, **STILL), net, clean)
    seen = []
    hook = net.get_submodule(head).register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    logits(net, clean)
    hook.remove()
    sizes = seen[0].abs().mean(dims)
    for count in range(1, len(sizes)):
        silent = sizes.argsort()[:count]
        channel = 1 if len(dims) == 3 else 2

        def silence(module, inputs, silent=silent, channel=channel):
            return inputs[0].index_fill(channel, silent, 0)

        hook = net.get_submodule(head).register_forward_pre_hook(silence)
        expected = logits(net, clean)
        hook.remove()
        if torch.allclose(logits(after, clean), expected, atol=1e-5):
            return
    pytest.fail("no number of silenced features gives what came out")


def test_only_the_head_is_pruned(clean):
    net = train(build("batchnorm"), clean, epochs=4)
    after = tuned(FinePruning(prune_budget=0.3, **STILL), net, clean)
    changed = [
        key for key, value in net.named_parameters() if not torch.allclose(after.get_parameter(key), value, atol=1e-6)
    ]
    assert changed == ["6.2.weight"]


def test_nothing_can_be_pruned(clean):
    """With a single feature the mildest pruning takes everything."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1), nn.Linear(1, CLASSES))
    train(net, clean, epochs=30, lr=0.01)
    assert correct(net, clean).float().mean() > 0.4
    with pytest.warns(UnreliableWarning, match=r"even the mildest pruning costs more clean accuracy than .* 10\.0%"):
        after = tuned(FinePruning(**STILL), net, clean)
    assert torch.allclose(after[2].weight, net[2].weight)


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(192, CLASSES))

    def forward(self, images):
        return images.flatten(1) @ self.weight


def test_no_layer_to_prune(clean):
    with pytest.raises(ModelError, match="nothing to prune: expected a convolution or linear layer that gives the log"):
        FinePruning(epochs=1).repair(Bare(), clean, GIVEN)


def test_the_last_layer_is_not_used(clean):
    unused = nn.Module()
    unused.net, unused.spare = build("batchnorm"), nn.Linear(3, 3)
    unused.forward = unused.net.forward
    with pytest.raises(ModelError, match="nothing to prune: the last layer with weights, spare, is not used"):
        FinePruning(epochs=1).tune(unused, clean, clean, GIVEN, 0)


@pytest.mark.parametrize("how", ["computed", "shared"])
def test_the_last_layer_has_no_weight_of_its_own(how, clean):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES), nn.Linear(CLASSES, CLASSES), nn.Linear(CLASSES, CLASSES))
    if how == "computed":
        nn.utils.parametrizations.spectral_norm(net[3])
    else:
        net[3].weight = net[2].weight
    with pytest.raises(ModelError, match="expected the last layer, 3, to have a weight of its own, not one that"):
        tuned(FinePruning(epochs=1), net, clean)


def test_features_are_read_also_where_the_last_layer_is_called_by_keyword(clean):
    net = build("batchnorm")
    by_keyword = Returns(lambda images: net[6][2](input=net[6][:2](net[:6](images))))
    by_keyword.net = net
    assert torch.equal(_activations(by_keyword, "net.6.2", clean), _activations(net, "6.2", clean))


def test_pruning_and_tuning_weaken_the_backdoor():
    net, clean = backdoored(7)
    images = clean.floats()
    images[:, :, 6:, 6:] = 1
    others = clean.labels != 7
    rest, held = clean.split(0.4, 0)
    after = tuned(FinePruning(epochs=20), net, rest, held)
    with torch.no_grad():
        fooled, still = ((model(images).argmax(1)[others] == 7).float().mean() for model in (net, after))
    assert fooled > 0.9
    assert still < 0.6
    assert correct(after, held).float().mean() > 0.95


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("count", [4, 5, 9, 17])
def test_few_images(name, count):
    net, clean = build(name), make_clean(count)
    after = tuned(FinePruning(epochs=1, batch_size=8), net, clean).state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(value, after[key]) for key, value in net.named_parameters())


@pytest.mark.parametrize("name", UNLIKE)
def test_divergence_ends_finite(name, clean):
    with pytest.warns(UnreliableWarning, match="fine-tune: NaN or infinity"):
        after = tuned(FinePruning(epochs=8, lr=1e30), build(name), clean)
    assert all(torch.isfinite(value).all() for value in after.state_dict().values())


@pytest.mark.parametrize(
    "fields",
    [{"prune_budget": 0}, {"prune_budget": 1}, {"lr": 0}, {"epochs": 0}, {"weight_decay": -1}, {"color": "red"}],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^fine-pruning: `{next(iter(fields))}`"):
        FinePruning(**fields)
