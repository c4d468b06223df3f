"""Architectures by name: shapes, published parameter names, specs and their errors."""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from tiny import digits, make_clean
from torch import nn

from untrojan.errors import ConfigError
from untrojan.lab.victim import train
from untrojan.mask import products
from untrojan.model import correct
from untrojan.randomness import seeded
from untrojan.sources import load
from untrojan.sources.nets import NETS, build

SHARED = Path(__file__).parents[2] / "shared"
SIZES = {"digits-cnn": (1, 8)}


@pytest.mark.parametrize("name", NETS)
def test_defaults_take_the_images_they_are_made_for(name):
    channels, size = SIZES.get(name, (3, 32))
    assert build(name).eval()(torch.zeros(2, channels, size, size)).shape == (2, 10)


@pytest.mark.parametrize("name", NETS)
def test_classes_and_channels_are_arguments(name):
    _, size = SIZES.get(name, (3, 32))
    assert build(f"{name}:classes=7,channels=2").eval()(torch.zeros(2, 2, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "present", "absent", "parameters"),
    [
        (
            "small-vgg",
            ["features.0.bias", "features.20.running_var", "classifier.weight"],
            ["features.21.weight"],
            308_394,
        ),
        (
            "wrn-16-1",
            [
                "conv1.weight",
                "block2.layer.0.convShortcut.weight",
                "block3.layer.1.bn2.bias",
                "bn1.weight",
                "fc.bias",
            ],
            ["block1.layer.0.convShortcut.weight", "conv1.bias"],
            175_066,
        ),
        (
            "resnet18",
            [
                "conv1.weight",
                "bn1.weight",
                "layer2.0.shortcut.0.weight",
                "layer2.0.shortcut.1.running_var",
                "linear.bias",
            ],
            ["layer1.0.shortcut.0.weight", "layer2.1.shortcut.0.weight"],
            11_173_962,
        ),
        (
            "preactresnet18",
            ["conv1.weight", "layer1.0.bn1.weight", "layer4.0.shortcut.0.weight", "linear.bias"],
            ["bn1.weight", "layer4.0.shortcut.1.weight"],
            11_171_146,
        ),
        (
            "vgg16-bn",
            ["features.0.bias", "features.41.running_mean", "classifier.bias"],
            ["features.43.weight"],
            14_728_266,
        ),
        ("vgg19-bn", ["features.50.running_mean", "classifier.bias"], ["features.53.weight"], 20_040_522),
        ("resnet34", ["layer3.5.bn2.bias", "linear.bias"], ["layer3.6.conv1.weight"], 21_282_122),
        ("resnet20", ["layer3.2.bn2.bias", "linear.bias"], ["layer2.0.shortcut.0.weight", "layer4"], 269_722),
        (
            "mobilenetv2",
            ["layers.1.shortcut.1.bias", "layers.16.bn3.running_var", "conv2.weight", "linear.bias"],
            ["layers.3.shortcut.0.weight", "layers.2.shortcut.0.weight", "layers.17.conv1.weight"],
            2_296_922,
        ),
        (
            "digits-cnn",
            ["features.0.weight", "features.8.running_mean", "classifier.bias"],
            ["features.0.bias"],
            None,
        ),
    ],
)
def test_parameters_have_the_published_names(name, present, absent, parameters):
    net = build(name)
    keys = net.state_dict().keys()
    assert set(present) <= keys
    assert not set(absent) & keys
    if parameters:
        assert sum(parameter.numel() for parameter in net.parameters()) == parameters


def test_wide_residual_shortcut_sees_the_activated_input():
    torch.manual_seed(0)
    block = build("wrn-16-1").eval().block2.layer[0]
    nn.init.zeros_(block.conv2.weight)
    maps = torch.randn(1, 16, 8, 8)
    assert torch.allclose(block(maps), block.convShortcut(torch.relu(block.bn1(maps))))


def test_resnet20_pads_its_shortcuts_with_zeros():
    block = build("resnet20").eval().layer2[0]
    nn.init.zeros_(block.bn2.weight)
    maps = torch.rand(1, 16, 8, 8)
    out = block(maps)
    assert out.shape == (1, 32, 4, 4)
    assert torch.equal(out[:, 8:24], maps[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    block = build("small-vit").blocks[0]
    other = nn.MultiheadAttention(128, 4, batch_first=True)
    other.load_state_dict(
        {
            "in_proj_weight": block.qkv.weight,
            "in_proj_bias": block.qkv.bias,
            "out_proj.weight": block.proj.weight,
            "out_proj.bias": block.proj.bias,
        }
    )
    tokens = torch.randn(2, 5, 128)
    normed = block.norm1(tokens)
    attended = tokens + other(normed, normed, normed)[0]
    assert torch.allclose(block(tokens), attended + block.mlp(block.norm2(attended)), atol=1e-5)


def test_a_vision_transformer_knows_where_a_patch_is():
    torch.manual_seed(0)
    net = build("small-vit:size=8,patch=4,channels=1")
    images = torch.rand(1, 1, 8, 8)
    assert not torch.allclose(net(images), net(images.roll(4, dims=3)), atol=1e-6)


def test_a_convnext_block_written_out():
    torch.manual_seed(0)
    block = build("small-convnext").features[2]
    maps = torch.randn(1, 48, 5, 5)
    spread = block.dwconv(maps)
    pixel = spread[0, :, 1, 2]
    pixel = (pixel - pixel.mean()) / (pixel.var(correction=0) + 1e-5).sqrt()
    assert torch.allclose(block(maps)[0, :, 1, 2], maps[0, :, 1, 2] + block.mlp(pixel), atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_the_layer_that_gives_the_logits_comes_last(name):
    """Masks leave that layer alone, and find it by its place."""
    net = build(name)
    assert dict(net.named_modules())[products(net)[-1]].out_features == 10


@pytest.mark.parametrize(
    ("spec", "lr", "epochs"),
    [
        pytest.param("mobilenetv2:classes=4", 0.05, 8, marks=pytest.mark.slow),
        ("resnet20:classes=4", 0.05, 8),
        ("small-convnext:classes=4", 0.02, 8),
        ("small-vit:classes=4,size=8,patch=4", 0.01, 8),
    ],
)
def test_new_kinds_of_nets_learn(spec, lr, epochs):
    clean = make_clean(64)
    with seeded(0):
        trained = train(build(spec), clean, epochs, seed=0, lr=lr, batch_size=16)
    assert correct(trained, clean).float().mean() > 0.9


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("small-vit:size=30", "small-vit could not be built: ConfigError: .*size 30 and patch 4"),
        ("resnet99", r"unknown net 'resnet99'.*digits-cnn, .*wrn-16-1, or package\.module:callable"),
        ("", "unknown net ''"),
        (":x", "unknown net ':x'"),
        ("small-vgg:width=3", "argument 'width'; small-vgg takes classes: int = 10"),
        ("small-vgg:classes", "expected key=value once per key, got 'classes'; small-vgg takes classes"),
        ("small-vgg:classes=", "expected classes to be int, got ''"),
        ("small-vgg:=3", "expected key=value"),
        ("small-vgg:classes=3,classes=4", "once per key"),
        ("small-vgg:classes=ten", "expected classes to be int, got 'ten'; small-vgg takes classes: int = 10"),
        ("small-vgg:classes=2.5", "expected classes to be int, got '2.5'"),
        ("small-vgg:classes=true", "expected classes to be int, got 'true'"),
        ("small-vgg:classes=0", "expected classes of small-vgg to be at least 1, got 0"),
        ("small-vgg:channels=-1", "expected channels of small-vgg to be at least 1, got -1"),
        ("no_such_module_at_all:net", "cannot import no_such_module_at_all:net: ModuleNotFoundError"),
        ("torch.nn:Linearr", "cannot import torch.nn:Linearr: AttributeError"),
        (
            "torch.nn:Linear:in_features=3",
            "missing a required argument: 'out_features'; torch.nn:Linear takes in_features",
        ),
        ("torch.nn:Linear:in_features=3,out_features=-2", "torch.nn:Linear could not be built: RuntimeError"),
        ("math:pi", "cannot tell the arguments of math:pi: TypeError"),
        ("pathlib:Path", r"expected pathlib:Path to return a torch.nn.Module, got \w*Path"),
    ],
)
def test_spec_that_does_not_fit_says_what_would(spec, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build(spec)
    assert "\n" not in str(caught.value)


MINE = """
from __future__ import annotations
from torch import nn

def net(width: int = 4, name: str = "a", rate: float = 0.5, bias: bool = True, free=None):
    made = nn.Linear(width, 2, bias)
    made.given = (width, name, rate, bias, free)
    return made

def fails():
    raise RuntimeError("first\\nsecond")

class Factories:
    net = net
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_net.py").write_text(MINE)
    yield "my_own_net"
    sys.modules.pop("my_own_net", None)


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ("", (4, "a", 0.5, True, None)),
        (":width=2", (2, "a", 0.5, True, None)),
        (":name=3,rate=1,bias=false,free=x:y", (4, "3", 1, False, "x:y")),
        (": width = 3 , rate=1e-3,free=2.5", (3, "a", 1e-3, True, 2.5)),
    ],
)
def test_callable_in_the_current_directory(mine, arguments, given):
    before = list(sys.path)
    assert build(f"{mine}:net{arguments}").given == given
    assert sys.path == before


def test_callable_may_be_an_attribute_of_an_attribute(mine):
    assert isinstance(build(f"{mine}:Factories.net"), nn.Linear)


@pytest.mark.parametrize("text", ["rate=x", "bias=1", "width=1.5"])
def test_annotations_of_a_callable_are_held_to(mine, text):
    with pytest.raises(ConfigError, match=r"width: 'int' = 4, name: 'str' = 'a'"):
        build(f"{mine}:net:{text}")


def test_callable_that_fails_is_one_line(mine):
    with pytest.raises(ConfigError, match=r"my_own_net:fails could not be built: RuntimeError: first second$"):
        build(f"{mine}:fails")


def test_built_in_name_wins_over_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18.py").write_text("raise SystemExit")
    with pytest.raises(ConfigError, match="key=value"):
        build("resnet18:net")


def test_digits_net_learns_the_digits_in_seconds():
    images, labels = digits().images, digits().labels
    torch.manual_seed(0)
    net = build("digits-cnn").train()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(5):
        for batch in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = net.eval()(images[1200:]).argmax(1).eq(labels[1200:]).float().mean().item()
    assert accuracy > 0.9


def accuracy(net, file, rows):
    table = pyarrow.parquet.read_table(SHARED / "data" / file).slice(0, rows).to_pydict()
    pixels = [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"]]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        logits = torch.cat([net(batch) for batch in images.split(256)])
    return logits.argmax(1).eq(torch.tensor(table["label"])).float().mean().item()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared checkpoints are not beside this checkout")
@pytest.mark.parametrize(
    ("checkpoint", "net", "expected"),
    [
        pytest.param("ibau-gtsrb-badnets-t8.pth", "small-vgg:classes=43", 0.973, marks=pytest.mark.slow),
        pytest.param("ibau-gtsrb-trojan_wm-t2.pth", "small-vgg:classes=43", 0.973, marks=pytest.mark.slow),
        ("nad-cifar10-finetuned.tar", "wrn-16-1", 0.855),
    ],
)
def test_published_model_has_its_published_accuracy(checkpoint, net, expected):
    file = "gtsrb/test.parquet" if "gtsrb" in checkpoint else "cifar10/test-lossless.parquet"
    measured = accuracy(load(SHARED / "checkpoints" / checkpoint, net), file, rows=3000)
    assert measured == pytest.approx(expected, abs=0.001)


def test_a_narrow_resnet18_has_the_same_keys():
    wide, narrow = build("resnet18").state_dict(), build("resnet18:classes=43,width=16").state_dict()
    assert list(narrow) == list(wide)
    assert narrow["conv1.weight"].shape == (16, 3, 3, 3)
    assert narrow["linear.weight"].shape == (43, 128)
