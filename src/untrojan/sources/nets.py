"""Architectures by name: the ones that published backdoored models use, and any of your own.

Every net here takes images `(N, channels, H, W)` and gives logits `(N, classes)`. Parameters have the names
under which such models are published, so that their checkpoints load.
"""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from untrojan.errors import ConfigError


class SmallVGG(nn.Sequential):
    """Six 3x3 convolutions with BatchNorm and ELU, and one linear layer, for 32x32 images.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    Example:
        >>> SmallVGG(classes=43)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 43])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        layers: list[nn.Module] = []
        before = channels
        for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
            for planes in (before, width):
                layers += [nn.Conv2d(planes, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
            layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
            before = width
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before * 4 * 4, classes)


class WRN16(nn.Module):
    """Wide residual network of depth 16 and width 1 (Zagoruyko and Komodakis), for images of 8x8 or more.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        Zagoruyko, Komodakis: Wide Residual Networks. arXiv 1605.07146.

    Example:
        >>> WRN16()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, 16)
        self.block1 = _WideStage(16, 16, stride=1)
        self.block2 = _WideStage(16, 32, stride=2)
        self.block3 = _WideStage(32, 64, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = self.block3(self.block2(self.block1(self.conv1(images))))
        return self.fc(torch.relu(self.bn1(maps)).mean(dim=(2, 3)))


class _WideStage(nn.Module):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.layer = nn.Sequential(_WideBlock(planes, width, stride), _WideBlock(width, width, 1))

    def forward(self, maps: Tensor) -> Tensor:
        return self.layer(maps)


class _WideBlock(nn.Module):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv1 = _conv3(planes, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width)
        self.convShortcut = None if planes == width else nn.Conv2d(planes, width, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        active = torch.relu(self.bn1(maps))
        around = maps if self.convShortcut is None else self.convShortcut(active)
        return around + self.conv2(torch.relu(self.bn2(self.conv1(active))))


class ResNet18(nn.Module):
    """ResNet-18 with the stem for small images: a 3x3 convolution and no pooling.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.
        width: Maps of the first stage, at least 1; each of the other three doubles them.

    References:
        He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition. arXiv 1512.03385.

    Example:
        >>> ResNet18()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(_Block, width)
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = torch.relu(self.bn1(self.conv1(images)))
        maps = self.layer4(self.layer3(self.layer2(self.layer1(maps))))
        return self.linear(maps.mean(dim=(2, 3)))


class PreActResNet18(nn.Module):
    """ResNet-18 with activation before convolution and, as in backdoor benchmarks, no BatchNorm at its end.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks. arXiv 1603.05027.

    Example:
        >>> PreActResNet18()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = _conv3(channels, 64)
        self.layer1, self.layer2, self.layer3, self.layer4 = _stages(_PreActBlock, 64)
        self.linear = nn.Linear(512, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to logits `(N, classes)`."""
        maps = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(images)))))
        return self.linear(maps.mean(dim=(2, 3)))


class _Block(nn.Module):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3(planes, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if planes != width:
            self.shortcut.extend([nn.Conv2d(planes, width, 1, stride, bias=False), nn.BatchNorm2d(width)])

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(maps)))))
        return torch.relu(inner + self.shortcut(maps))


class _PreActBlock(nn.Module):
    def __init__(self, planes: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv1 = _conv3(planes, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv3(width, width)
        self.shortcut = None if planes == width else nn.Sequential(nn.Conv2d(planes, width, 1, stride, bias=False))

    def forward(self, maps: Tensor) -> Tensor:
        active = torch.relu(self.bn1(maps))
        around = maps if self.shortcut is None else self.shortcut(active)
        return around + self.conv2(torch.relu(self.bn2(self.conv1(active))))


class VGG16(nn.Sequential):
    """VGG-16 with BatchNorm and a single linear layer, for images of 32x32 or more.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    References:
        Simonyan, Zisserman: Very Deep Convolutional Networks for Large-Scale Image Recognition.
        arXiv 1409.1556.

    Example:
        >>> VGG16().eval()(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        layers: list[nn.Module] = []
        before = channels
        for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for planes in (before, *[width] * (depth - 1)):
                layers += [nn.Conv2d(planes, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            layers.append(nn.MaxPool2d(2))
            before = width
        super().__init__()
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(before, classes)


class DigitsCNN(nn.Sequential):
    """Three small convolutions with BatchNorm, for 8x8 images of handwritten digits; trains in seconds.

    Args:
        classes: Number of logits, at least 1.
        channels: Channels of the images, at least 1.

    Example:
        >>> DigitsCNN()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, classes: int = 10, channels: int = 1) -> None:
        layers: list[nn.Module] = []
        for planes, width in ((channels, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(planes, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        super().__init__()
        self.features = nn.Sequential(*layers[:6], nn.MaxPool2d(2), *layers[6:])
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(64, classes)


def _conv3(planes: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(planes, width, 3, stride, padding=1, bias=False)


def _stages(block: Callable[[int, int, int], nn.Module], width: int) -> list[nn.Sequential]:
    shapes = ((width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2))
    return [nn.Sequential(block(*shape), block(shape[1], shape[1], 1)) for shape in shapes]


NETS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": DigitsCNN,
    "preactresnet18": PreActResNet18,
    "resnet18": ResNet18,
    "small-vgg": SmallVGG,
    "vgg16-bn": VGG16,
    "wrn-16-1": WRN16,
}


def build(spec: str) -> nn.Module:
    """Make a network, untrained, from a line of text.

    A custom callable is imported, that is run, with the current directory importable: name what you trust.

    Args:
        spec: `name`, `name:key=value,…`, `package.module:callable` or `package.module:callable:key=value,…`,
            where `name` is a key of :data:`NETS`. Values are numbers, `true`, `false` or text.

    Returns:
        The network as its callable makes it.

    Raises:
        ConfigError: There is no such net or argument, a value is of the wrong type, or the callable fails or
            makes something else.

    Example:
        >>> build("small-vgg:classes=43").classifier.out_features
        43
        >>> build("torch.nn:Linear:in_features=3,out_features=2")
        Linear(in_features=3, out_features=2, bias=True)
    """
    name, _, arguments = spec.partition(":")
    if name in NETS:
        return _call(name, NETS[name], _counts(name, _parse(name, NETS[name], arguments)))
    where, _, arguments = arguments.partition(":")
    if not name or not where:
        raise ConfigError(f"unknown net {spec!r}: expected one of {', '.join(NETS)}, or package.module:callable")
    with _current_directory_importable():
        path = f"{name}:{where}"
        factory = _import(name, where)
        return _call(path, factory, _parse(path, factory, arguments))


@contextlib.contextmanager
def _current_directory_importable() -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, str(Path.cwd()))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _import(module: str, where: str) -> Callable[..., object]:
    try:
        return attrgetter(where)(importlib.import_module(module))
    except Exception as error:
        raise ConfigError(
            f"cannot import {module}:{where}: {_cause(error)}; expected package.module:callable, "
            f"importable from {Path.cwd()}, or one of {', '.join(NETS)}"
        ) from error


def _call(name: str, factory: Callable[..., object], values: Mapping[str, Any]) -> nn.Module:
    try:
        net = factory(**values)
    except Exception as error:
        raise ConfigError(f"{name} could not be built: {_cause(error)}") from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"expected {name} to return a torch.nn.Module, got {type(net).__name__}")
    return net


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")


def _parse(name: str, factory: Callable[..., object], arguments: str) -> dict[str, Any]:
    """Check `key=value,…` against the signature of `factory`."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot tell the arguments of {name}: {_cause(error)}") from error
    values: dict[str, Any] = {}
    for part in arguments.split(",") if arguments else []:
        key, equals, text = (piece.strip() for piece in part.partition("="))
        if not key or not equals or key in values:
            raise ConfigError(f"expected key=value once per key, got {part!r}; {_usage(name, signature)}")
        values[key] = _value(key, text, signature, name)
    try:
        signature.bind(**values)
    except TypeError as error:
        raise ConfigError(f"{error}; {_usage(name, signature)}") from error
    return values


def _value(key: str, text: str, signature: inspect.Signature, name: str) -> object:
    parameter = signature.parameters.get(key)
    annotation = parameter.annotation if parameter else None
    wanted = getattr(annotation, "__name__", annotation)
    if wanted == "str":
        return text
    value = _literal(text)
    fits = {"int": (int,), "float": (int, float), "bool": (bool,)}.get(str(wanted))
    if fits and (not isinstance(value, fits) or isinstance(value, bool) != (wanted == "bool")):
        raise ConfigError(f"expected {key} to be {wanted}, got {text!r}; {_usage(name, signature)}")
    return value


def _literal(text: str) -> object:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _counts(name: str, values: dict[str, Any]) -> dict[str, Any]:
    for key, value in values.items():
        if value < 1:
            raise ConfigError(f"expected {key} of {name} to be at least 1, got {value}")
    return values


def _usage(name: str, signature: inspect.Signature) -> str:
    listed = ", ".join(str(parameter) for parameter in signature.parameters.values())
    return f"{name} takes {listed or 'no arguments'}"
