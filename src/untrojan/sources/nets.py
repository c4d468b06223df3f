"""Networks by name: from a line of text to one of ours, or of your own."""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from untrojan.errors import ConfigError, cause
from untrojan.sources.architectures import (
    VGG16,
    VGG19,
    WRN16,
    DigitsCNN,
    MobileNetV2,
    PreActResNet18,
    ResNet18,
    ResNet20,
    ResNet34,
    SmallConvNeXt,
    SmallVGG,
    SmallViT,
)

NETS: dict[str, Callable[..., nn.Module]] = {
    "digits-cnn": DigitsCNN,
    "mobilenetv2": MobileNetV2,
    "preactresnet18": PreActResNet18,
    "resnet18": ResNet18,
    "resnet20": ResNet20,
    "resnet34": ResNet34,
    "small-convnext": SmallConvNeXt,
    "small-vgg": SmallVGG,
    "small-vit": SmallViT,
    "vgg16-bn": VGG16,
    "vgg19-bn": VGG19,
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
    path = f"{name}:{where}"
    try:
        with _current_directory_importable():
            factory = _import(name, where)
            return _call(path, factory, _parse(path, factory, arguments))
    except SystemExit as error:
        text = f"{path} ended the program with sys.exit; name a callable that only builds the network"
        raise ConfigError(text) from error


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
            f"cannot import {module}:{where}: {cause(error)}; expected package.module:callable, "
            f"importable from {Path.cwd()}, or one of {', '.join(NETS)}"
        ) from error


def _call(name: str, factory: Callable[..., object], values: Mapping[str, Any]) -> nn.Module:
    try:
        net = factory(**values)
    except Exception as error:
        raise ConfigError(f"{name} could not be built: {cause(error)}") from error
    if not isinstance(net, nn.Module):
        raise ConfigError(f"expected {name} to return a torch.nn.Module, got {type(net).__name__}")
    return net


def _parse(name: str, factory: Callable[..., object], arguments: str) -> dict[str, Any]:
    """Check `key=value,…` against the signature of `factory`."""
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot tell the arguments of {name}: {cause(error)}") from error
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
