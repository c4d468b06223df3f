"""What every run tells its record: model, images, choices of the method, warnings, the machine, and its memory."""

import contextlib
import platform
import re
import resource
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

import torch
from pydantic import JsonValue
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.errors import UntrojanWarning, utf8
from untrojan.record import CleanInfo, ModelInfo
from untrojan.sources.files import Checkpoint, state_sha256

_choices: ContextVar[dict[str, JsonValue] | None] = ContextVar("choices", default=None)


@contextlib.contextmanager
def choosing() -> Iterator[dict[str, JsonValue]]:
    """Collect for the record what a method chooses by itself inside the block."""
    choices: dict[str, JsonValue] = {}
    token = _choices.set(choices)
    try:
        yield choices
    finally:
        _choices.reset(token)


def chose(name: str, value: JsonValue) -> None:
    """Tell the record what a method chose by itself; where nothing is recorded this does nothing.

    Args:
        name: What was to be chosen, in a few words.
        value: What was chosen, as JSON has it.

    Example:
        >>> with choosing() as choices:
        ...     chose("rows reset", [7])
        >>> choices
        {'rows reset': [7]}
    """
    choices = _choices.get()
    if choices is not None:
        choices[name] = value


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Collect what untrojan warns of for the record, and give them to the caller in the end, also where it raises."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UntrojanWarning)
            ours: list[str] = []
            yield ours
            texts = (str(warning.message) for warning in caught if issubclass(warning.category, UntrojanWarning))
            ours.extend(dict.fromkeys(texts))
    finally:
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def tensors_of(model: nn.Module, source: Checkpoint | None = None) -> dict[str, Tensor]:
    """Give the state dict of a network, or that of the file which it came from."""
    if source is not None:
        return source.tensors
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def model_info(
    model: nn.Module, state: Mapping[str, Tensor], classes: int | None, source: Checkpoint | None
) -> ModelInfo:
    """Tell about a network for the record.

    Args:
        model: The network.
        state: Its state dict, as it is or will be in a file.
        classes: How many logits it has, where that is known.
        source: The file that it came from, if any.
    """
    return ModelInfo(
        path=utf8(source.path) if source else None,
        sha256=source.sha256 if source else None,
        state_sha256=state_sha256(state),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=classes,
    )


def clean_info(clean: CleanSet, classes: int | None) -> CleanInfo:
    """Tell about clean images for the record; classes without images count too, where their number is known."""
    return CleanInfo(
        path=clean.path,
        sha256=clean.sha256,
        images=len(clean),
        shape=clean.shape,
        per_class=torch.bincount(clean.labels, minlength=classes or 0).tolist(),
        class_names=list(clean.class_names) if clean.class_names else None,
    )


def environment(device: torch.device | None = None) -> dict[str, str]:
    """Versions and hardware that a result may depend on; without a device, of the CPU."""
    from untrojan import __version__

    return {
        "untrojan": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name(device) if device and device.type == "cuda" else str(device or "cpu"),
    }


def forget_peak_memory() -> None:
    """Let :func:`peak_memory` count from now on; where that is not Linux, it still counts from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: torch.device | None = None) -> int:
    """Largest resident size of this process so far, in bytes; on a GPU, the most memory of it that torch has held.

    On Linux the resource usage of a process begins with the size of the one that started it, so the kernel's own
    account of this process is read there.
    """
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE):
            return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
