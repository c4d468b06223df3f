"""Model sources: from a file and the name of an architecture to a network that takes images in [0, 1]."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from untrojan.errors import ConfigError
from untrojan.model import Normalize
from untrojan.sources.files import Checkpoint
from untrojan.sources.nets import build


def load(
    weights: str | Path | Checkpoint,
    net: str | nn.Module,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Module:
    """Read weights from a file, safely, into a network.

    Args:
        weights: A safetensors file, a torch file with a state dict, or one that was read already.
        net: A network by name (:func:`untrojan.sources.nets.build`), or an object, which is filled in place. How it was
            loaded before does not matter.
        mean: What is subtracted from images in [0, 1] per channel, where the network was trained that way.
        std: What they are divided by then, per channel; comes with `mean`.

    Returns:
        The network in evaluation mode. Normalization is a forward hook, so the state dict keeps its keys.

    Raises:
        ConfigError: The network's name or arguments do not fit, or `mean` and `std` do not fit each other.
        ModelError: The file cannot be read or does not fit the network.
        UnsafeFileError: The file would have to run code to be read.

    Example:
        >>> import tempfile
        >>> from untrojan.sources.files import save_state
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(Path(folder) / "net.safetensors", build("digits-cnn").state_dict())
        ...     net = load(Path(folder) / "net.safetensors", "digits-cnn", mean=(0.5,), std=(0.5,))
        >>> net.training
        False
    """
    if (mean is None) != (std is None):
        raise ConfigError("expected both mean and std or neither, got only one of them")
    normalize = Normalize(mean, std) if mean is not None and std is not None else None
    checkpoint = weights if isinstance(weights, Checkpoint) else Checkpoint.read(weights)
    filled = checkpoint.into(build(net) if isinstance(net, str) else net)
    for key, hook in [*filled._forward_pre_hooks.items()]:
        if isinstance(hook, partial) and hook.func is _normalize_first:
            del filled._forward_pre_hooks[key]
    if normalize is not None:
        filled.register_forward_pre_hook(partial(_normalize_first, normalize))
    return filled


def _normalize_first(normalize: Normalize, _: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *rest = arguments
    return normalize.to(images.device)(images), *rest
