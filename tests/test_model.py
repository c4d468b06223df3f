import contextlib
import random
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import CLASSES, NETS, Returns, Snapshot, build, make_clean
from torch import nn

import untrojan
from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, ModelError, UnreliableWarning
from untrojan.model import Normalize, accuracy_of, check, copied, correct, evaluating, logits, require, tapped
from untrojan.randomness import seeded
from untrojan.record import Rate


def relabelled(clean, change):
    labels = clean.labels.clone()
    change(labels)
    return CleanSet(clean.images, labels)


def with_weight(value):
    net = build("batchnorm")
    with torch.no_grad():
        net[0].weight[0, 0, 0, 0] = value
    return net


def with_buffer(name, value):
    net = build("batchnorm")
    net.register_buffer(name, torch.tensor([0.0, value]))
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
    "NaN constant": (
        lambda: with_buffer("mask", float("nan")),
        make_clean(),
        ModelError,
        "NaN or infinity: mask$",
    ),
    "infinite statistic": (
        lambda: with_buffer("running_var", float("inf")),
        make_clean(),
        ModelError,
        "NaN or infinity: running_var$",
    ),
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
        "cannot take images of 1x8x8 .*: expected 3 channels, got 1; convert the images$",
    ),
    "label": (
        linear,
        relabelled(make_clean(), lambda y: y[:1].fill_(7)),
        DataError,
        "up to 7, .*4 classes, 0 to 3; labels count from 0$",
    ),
    "class": (linear, make_clean(classes=2), DataError, "no image of class 2, 3: expected at least one .* 4 classes"),
    "named class": (
        linear,
        replace(make_clean(classes=2), class_names=("ant", "bee", "cat", "dog")),
        DataError,
        r"no image of class 2 \(cat\), 3 \(dog\): .* 4 classes of the model$",
    ),
    "class that no folder is of": (
        linear,
        replace(make_clean(classes=3), class_names=("ant", "bee", "dog")),
        DataError,
        "no image of class 3: .*; the classes of the images are ant, bee, dog$",
    ),
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


@pytest.mark.parametrize(
    "call",
    [
        untrojan.check,
        untrojan.scan,
        untrojan.repair,
        partial(untrojan.repair, method=untrojan.CLP()),
        lambda model, clean: untrojan.screen(model, clean, make_clean()),
    ],
    ids=["check", "scan", "repair", "data-free repair", "screen"],
)
@pytest.mark.parametrize(
    ("model", "clean", "error", "text"),
    [
        (
            "a.pt",
            make_clean(),
            ModelError,
            "expected a network, a torch.nn.Module, got str; untrojan.load opens a file",
        ),
        (Path("a.pt"), make_clean(), ModelError, "got PosixPath; untrojan.load"),
        (
            build("plain"),
            "images",
            DataError,
            "expected clean images as a CleanSet, got str; CleanSet.load reads files",
        ),
        (build("plain"), Path("images"), DataError, "got PosixPath; CleanSet.load"),
        (
            build("plain"),
            (make_clean().images, make_clean().labels),
            DataError,
            "got tuple; .* CleanSet.of takes a pair",
        ),
    ],
)
def test_what_is_no_network_and_no_clean_set(call, model, clean, error, text):
    with pytest.raises(error, match=text):
        call(model, clean)


@pytest.mark.parametrize(
    ("call", "method", "text"),
    [
        (untrojan.repair, "rnp", r"expected a Defense as method, such as untrojan.Auto\(\), got 'rnp'"),
        (untrojan.repair, untrojan.RNP, "expected a Defense as method"),
        (untrojan.repair, untrojan.TriggerScanner(), r"got TriggerScanner\("),
        (untrojan.scan, "", r"expected a Scanner as method, such as untrojan.TriggerScanner\(\), got ''"),
        (untrojan.scan, untrojan.RNP(), r"expected a Scanner as method, .* got RNP\("),
    ],
)
def test_what_is_no_method(call, method, text):
    with pytest.raises(ConfigError, match=text):
        call(build("plain"), make_clean(), method=method)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_constant_may_be_infinite(persistent):
    net = build("batchnorm")
    net.register_buffer("mask", torch.tensor([0.0, -torch.inf]), persistent)
    assert check(net, make_clean()) == []


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


def test_evaluating_puts_every_flag_back(net):
    flags = [index % 2 == 0 for index, _ in enumerate(net.modules())]
    for module, flag in zip(net.modules(), flags, strict=True):
        module.training = flag
    with contextlib.suppress(KeyError), evaluating(net):
        assert {module.training for module in net.modules()} == {False}
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


@pytest.mark.parametrize("side", ["input", "output"])
def test_layers_are_read_also_where_they_are_called_by_keyword(side):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    images = make_clean().floats()
    by_keyword = Returns(lambda images: net[1](input=net[0](images)))
    by_keyword.net = net
    with tapped(by_keyword, ["net.1"], side) as seen:
        out = by_keyword(images)
    assert torch.equal(seen["net.1"][0], images.flatten(1) if side == "input" else out)
    assert not net[1]._forward_hooks


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_network_that_cannot_be_copied_is_told():
    with pytest.raises(ModelError, match=r"parametrizations\.weight_norm, or call torch\.nn\.utils\.remove_weight"):
        copied(nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(192, CLASSES))))
    net = build("batchnorm")
    assert copied(net) is not net
    net.__deepcopy__ = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        copied(net)


def test_as_many_channels_as_means():
    gray = torch.rand(2, 1, 4, 4)
    with pytest.raises(ModelError, match="expected images of 3 channels, as many as means, got 1"):
        Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))(gray)
    assert Normalize((0.5,), (0.5,))(gray.expand(-1, 3, -1, -1)).shape == (2, 3, 4, 4)


def test_normalize():
    images = torch.rand(2, 3, 4, 4)
    net = Normalize((0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    expected = torch.stack([(images[:, 0] - 0.1) / 0.5, images[:, 1] - 0.2, (images[:, 2] - 0.3) / 2], 1)
    assert torch.allclose(net(images), expected)
    assert list(net.state_dict()) == list(net.parameters()) == []
    nan, inf = float("nan"), float("inf")
    for mean, std in [(0.5, (0.5, 0.5)), (0.5, (0.0,)), (0.5, (-1.0,)), (0.5, (nan,)), (0.5, (inf,)), (nan, (0.5,))]:
        with pytest.raises(ConfigError, match="expected as many finite deviations above 0 as finite means"):
            Normalize((mean,), std)


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


@pytest.mark.parametrize(
    ("classes", "right", "doubted"),
    [
        *((4, right, doubted) for right, doubted in ((0, True), (15, True), (17, False), (40, False))),
        *((20, right, doubted) for right, doubted in ((13, True), (14, False))),
        *((2, right, doubted) for right, doubted in ((20, True), (27, False))),
    ],
)
def test_a_model_that_is_right_on_less_than_half_or_maybe_by_chance_is_doubted(classes, right, doubted):
    said = torch.arange(40) % classes
    images = nn.functional.one_hot(said, classes).float().view(40, classes, 1, 1)
    clean = CleanSet(images, torch.where(torch.arange(40) < right, said, (said + 1) % classes))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        accuracy, doubt = accuracy_of(nn.Flatten(), clean)
    assert accuracy == Rate.of(right, 40)
    assert [each.category for each in told] == [UnreliableWarning] * doubted
    assert bool(doubt) == doubted
    for each in told:
        assert f"the model is right on {right} of 40 clean images" in doubt
        assert str(each.message).startswith(f"{doubt}: check ")
        assert all(cause in str(each.message) for cause in ("--mean and --std", "the order of its classes"))


@pytest.mark.parametrize("most", [7, 1])
def test_logits_where_the_memory_does_not_suffice(most):
    net, clean, sizes = build("batchnorm").eval(), make_clean(33), []

    class Short(nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            if len(images) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return net(images)

    with pytest.warns(
        UnreliableWarning, match="out of memory: images go through the network 50 at a time now, not 100"
    ):
        out = logits(Short(), clean)
    assert torch.allclose(out, logits(net, clean), atol=1e-6)
    assert max(sizes[-4:]) <= most


def test_logits_of_an_image_too_large_for_the_memory():
    def short(images):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UnreliableWarning), pytest.raises(torch.OutOfMemoryError):
        logits(Returns(short), make_clean(3))


def test_no_single_image_is_left_over_for_a_network_that_takes_none():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192, track_running_stats=False)).eval()
    assert logits(net, make_clean(101)).shape == (101, 192)
