import contextlib
import copy
import random

import numpy as np
import pytest
import torch
from tiny import CLASSES, NETS, Snapshot, build, make_clean
from torch import nn

from untrojan import model as model_module
from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, ModelError
from untrojan.model import (
    Normalize,
    check,
    correct,
    faster,
    folded,
    lay_out,
    layout_of,
    logits,
    mode,
    require,
    seeded,
)


class Returns(nn.Module):
    """Gives whatever the function makes of the images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


def relabelled(clean, change):
    labels = clean.labels.clone()
    change(labels)
    return CleanSet(clean.images, labels)


def with_weight(value):
    net = build("batchnorm")
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = value
    return net


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))


def test_every_tiny_net_passes_and_stays_as_it_was(net, clean):
    next(net.children()).train()
    before = Snapshot(net)
    assert check(net, clean) == []
    require(net, clean)
    before.assert_same()


BAD = {
    "NaN weight": (lambda: with_weight(float("nan")), make_clean(), ModelError, r"NaN or infinity: 0\.weight$"),
    "infinite weight": (lambda: with_weight(float("inf")), make_clean(), ModelError, r"NaN or infinity: 0\.weight$"),
    "size": (
        linear,
        make_clean(shape=(3, 9, 9)),
        ModelError,
        "cannot take images of 3x9x9 .*height x width.: .*shapes",
    ),
    "channels": (
        lambda: build("plain"),
        make_clean(shape=(1, 8, 8)),
        ModelError,
        "cannot take images of 1x8x8 .*: .*3 ch",
    ),
    "label": (
        linear,
        relabelled(make_clean(), lambda y: y[:1].fill_(7)),
        DataError,
        "up to 7, .*4 classes, 0 to 3; labels count from 0$",
    ),
    "class": (linear, make_clean(classes=2), DataError, "no image of class 2, 3: expected at least one .* 4 classes"),
    "many classes": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 99)),
        make_clean(),
        DataError,
        "no image of class 4, 5, 6, 7, 8, 9, 10, 11, 12, 13 and 85 more: ",
    ),
    "one image": (linear, make_clean(1), DataError, "at least 2 clean images.*got 1; no image of class 1, 2, 3"),
    "tuple": (lambda: Returns(lambda x: (x, x)), make_clean(), ModelError, "expected .*logits of shape .* got tuple$"),
    "none": (lambda: Returns(lambda x: None), make_clean(), ModelError, "got NoneType$"),
    "maps": (lambda: Returns(lambda x: x), make_clean(), ModelError, r"got torch.float32 of \(2, 3, 8, 8\)$"),
    "vector": (lambda: Returns(lambda x: x.mean((1, 2, 3))), make_clean(), ModelError, r"got torch.float32 of \(2,\)$"),
    "rows": (lambda: Returns(lambda x: x.reshape(-1, 4)), make_clean(), ModelError, r"for 2 images, got .*\(96, 4\)$"),
    "whole numbers": (
        lambda: Returns(lambda x: x.flatten(1)[:, :4].long()),
        make_clean(),
        ModelError,
        r"got torch.int64 of \(2, 4\)$",
    ),
    "NaN logits": (lambda: Returns(lambda x: x.flatten(1)[:, :4] / 0), make_clean(), ModelError, "gives NaN or inf"),
    "silent error": (lambda: Returns(lambda x: 1 / 0 if x is None else [][0]), make_clean(), ModelError, "index out"),
    "wordless error": (lambda: Returns(lambda x: next(iter(()))), make_clean(), ModelError, "3x8x8 .*: StopIteration$"),
}


@pytest.mark.parametrize("name", BAD)
def test_problems(name):
    build_net, clean, error, text = BAD[name]
    net = build_net()
    before = Snapshot(net)
    assert check(net, clean)[0].error is error
    with pytest.raises(error, match=text):
        require(net, clean)
    assert before.shape == before._shape()


def test_all_problems_at_once():
    problems = check(with_weight(float("nan")), relabelled(make_clean(1), lambda labels: labels.fill_(9)))
    assert [problem.error for problem in problems] == [ModelError, DataError, DataError]
    with pytest.raises(ModelError, match=r"NaN.*; expected at least 2.*; labels go up to 9"):
        require(with_weight(float("nan")), relabelled(make_clean(1), lambda labels: labels.fill_(9)))


def test_extra_state_that_is_no_tensor():
    net = linear()
    net.get_extra_state = lambda: {"note": 1}
    net.set_extra_state = lambda state: None
    assert check(net, make_clean()) == []


@pytest.mark.parametrize("training", [False, True])
def test_mode_puts_every_flag_back(net, training):
    flags = [index % 2 == 0 for index, _ in enumerate(net.modules())]
    for module, flag in zip(net.modules(), flags, strict=True):
        module.training = flag
    with contextlib.suppress(KeyError), mode(net, training):
        assert {module.training for module in net.modules()} == {training}
        raise KeyError
    assert [module.training for module in net.modules()] == flags


def test_logits_do_not_depend_on_the_batch_size(net, clean):
    before = Snapshot(net.train())
    whole = logits(net, clean)
    assert whole.shape == (32, CLASSES)
    assert not whole.requires_grad
    assert torch.allclose(whole, logits(net, clean, batch_size=5), atol=1e-5)
    assert torch.equal(correct(net, clean), whole.argmax(1) == clean.labels)
    before.assert_same()


def test_logits_that_are_not_finite(clean):
    with pytest.raises(ModelError, match="expected finite logits"):
        logits(Returns(lambda x: x.flatten(1)[:, :4] / 0), clean)


def test_normalize():
    images = torch.rand(2, 3, 4, 4)
    net = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    expected = torch.stack([(images[:, 0] - 0.1) / 0.5, images[:, 1] - 0.2, (images[:, 2] - 0.3) / 2], 1)
    assert torch.allclose(net(images), expected)
    assert list(net.state_dict()) == list(net.parameters()) == []
    for mean, std in [((0.5,), (0.5, 0.5)), ((0.5,), (0.0,)), ((0.5,), (-1.0,)), ((0.5,), (float("nan"),))]:
        with pytest.raises(ModelError, match="expected as many deviations above 0 as means"):
            Normalize(mean, std)


def draws():
    return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002


def test_seeded_gives_the_same_numbers_and_leaves_the_callers():
    ahead = draws()
    with seeded(3):
        inside = draws()
    after = draws()
    with contextlib.suppress(KeyError), seeded(4):
        assert draws() != inside
        raise KeyError
    with seeded(3):
        assert draws() == inside
    rest = draws()
    torch.manual_seed(0)
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    assert [draws(), draws(), draws()] == [ahead, after, rest]


def test_the_table_of_tiny_nets_is_deterministic():
    for name in NETS:
        one, other = build(name).state_dict(), build(name).state_dict()
        assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_negative_seed_is_refused():
    with pytest.raises(ConfigError, match="expected a seed of at least 0, got -1"), seeded(-1):
        pass


@pytest.fixture
def bfloat16(monkeypatch):
    monkeypatch.setattr(model_module, "multiplies_bfloat16", lambda _: True)


@pytest.fixture
def float32(monkeypatch):
    monkeypatch.setattr(model_module, "multiplies_bfloat16", lambda _: False)


@pytest.mark.usefixtures("bfloat16")
def test_a_faster_network_gives_nearly_the_same_and_shares_the_weights(net):
    clean = make_clean()
    quick = faster(net, clean)
    with mode(net, training=False), torch.no_grad():
        assert torch.allclose(quick(clean.floats()).softmax(1), net(clean.floats()).softmax(1), atol=0.1)
    assert [id(each) for each in quick.parameters()] == [id(each) for each in net.parameters()]
    assert faster(quick, clean) is quick


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv2d(3, 2, 3), Returns(lambda out: out.view(len(out), -1))),
        Returns(lambda images: 1e4 * (images.flatten(1)[:, :1] @ torch.tensor([[1, 1.002]]))),
    ],
    ids=["views a convolution", "rounds to something else"],
)
def test_a_network_that_cannot_run_faster_is_given_back(net):
    assert faster(net, CleanSet(torch.full((4, 3, 4, 4), 0.3), torch.tensor([0, 1, 0, 1]))) is net


@pytest.mark.usefixtures("float32")
def test_without_bfloat16_in_the_processor_a_faster_network_has_the_channels_last_and_rounds_nothing():
    net, clean, seen = build("batchnorm").eval(), make_clean(), []
    quick = faster(net, clean)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.allclose(quick(clean.floats()), net(clean.floats()), atol=1e-6)
    assert [images.is_contiguous(memory_format=torch.channels_last) for images in seen] == [True, False]
    assert {images.dtype for images in seen} == {torch.float32}


def test_gradients_are_the_same_however_a_network_is_laid_out(net):
    # each alone, because torch's GroupNorm crashes with the channels last where it is not asked for all of its own
    images = make_clean().floats()
    laid = copy.deepcopy(net)
    lay_out(laid, layout_of(faster(laid, make_clean(), rounding=False)))
    for of in (None, *range(len(list(net.parameters())))):
        slopes = []
        for each in (net, laid):
            each.requires_grad_(False)
            shown = images.clone()
            asked = shown if of is None else list(each.parameters())[of]
            asked.requires_grad_()
            slopes.append(torch.autograd.grad(each(shown).square().sum(), asked)[0])
        assert torch.allclose(*slopes, rtol=1e-3, atol=1e-4)


@pytest.mark.usefixtures("float32")
def test_networks_with_group_norm_keep_their_layout():
    net, clean, seen = build("groupnorm"), make_clean(), []
    quick = faster(net, clean)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    quick(clean.floats())
    assert seen[0].is_contiguous()


def settled(*layers):
    """A network whose BatchNorm has seen images, in evaluation mode."""
    torch.manual_seed(0)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    for _ in range(9):
        net(make_clean().floats())
    return net.eval()


def norms(net):
    return sum(isinstance(each, nn.BatchNorm2d) for each in net.modules())


@pytest.mark.usefixtures("float32")
def test_a_folded_network_gives_the_same_and_the_network_is_left_alone(net):
    clean = make_clean()
    before = Snapshot(net)
    quick = folded(net, clean)
    before.assert_same()
    with mode(net, training=False), torch.no_grad():
        assert torch.allclose(quick(clean.floats()), net(clean.floats()), atol=1e-4)


@pytest.mark.usefixtures("float32")
def test_normalization_becomes_part_of_the_convolution_before_it():
    net = settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4, affine=False))
    quick = folded(net, make_clean())
    assert norms(net) == 2
    assert norms(quick) == 0
    assert torch.allclose(quick(make_clean().floats()), net(make_clean().floats()), atol=1e-5)


class Twice(nn.Module):
    """Needs the output of a convolution before normalization too, and calls another convolution twice."""

    def __init__(self):
        super().__init__()
        self.first, self.again = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, images):
        plain = self.first(images)
        out = plain + self.norms[0](plain)
        return self.norms[2](self.again(self.norms[1](self.again(out))))


@pytest.mark.usefixtures("float32")
def test_what_is_used_twice_is_not_folded():
    net = settled(Twice())
    quick = folded(net, make_clean())
    assert norms(quick) == 3
    assert torch.allclose(quick(make_clean().floats()), net(make_clean().floats()), atol=1e-5)


@pytest.mark.usefixtures("float32")
def test_a_network_that_cannot_be_traced_is_run_as_it_is():
    net = settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Returns(lambda out: out if out.sum() > 0 else -out))
    assert folded(net, make_clean()).model is net


@pytest.mark.usefixtures("bfloat16")
def test_a_folded_network_is_faster_too_and_is_not_folded_again():
    net = settled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    quick = folded(faster(net, make_clean()), make_clean())
    assert norms(quick) == 0
    assert faster(quick, make_clean()) is folded(quick, make_clean()) is quick
