"""Where a run happens: on the device that the model is on.

Methods do not speak of devices. While one runs, :func:`running_on` has torch make its tensors there, the clean images
are there (:meth:`untrojan.CleanSet.to`), and so are the generators of :func:`new_generator`.

On a CPU numbers below 1e-38 take many times as long as others, and the gradients of a network that is sure of what it
sees are full of them. They count as zero in a run. Whatever the caller has set, a run has gradients, and its tensors
are float32.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from untrojan.errors import ConfigError, UnreliableWarning, cause

T = TypeVar("T")

AUTO = "auto"


def chosen(name: str = AUTO) -> torch.device:
    """Give the device of that name.

    Args:
        name: As torch names them, such as `cpu` or `cuda:1`, also in capitals; `auto` is `cuda` where torch can use
            one, else `cpu`.

    Raises:
        ConfigError: There is no such device, or torch cannot use it.

    Example:
        >>> chosen("cpu")
        device(type='cpu')
    """
    if name.lower() == AUTO:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name.lower())
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # a torch that was built without CUDA asserts
        accelerator = torch.accelerator
        there = [AUTO, "cpu", *(f"{accelerator.current_accelerator()}:{i}" for i in range(accelerator.device_count()))]
        why = f": {cause(error)}" if any(each.startswith(name.lower()) for each in there) else ""
        raise ConfigError(f"expected one of {', '.join(there)} as device, got {name!r}{why}") from error
    return device


def out_of_memory(error: RuntimeError) -> bool:
    """Tell whether torch raised because the memory did not suffice.

    Example:
        >>> out_of_memory(torch.OutOfMemoryError()), out_of_memory(RuntimeError("shapes differ"))
        (True, False)
    """
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def halving(call: Callable[[int], T], size: int) -> T:
    """Call with a batch size, and with half of it, down to 1, where the memory does not suffice, which a warning says.

    Raises:
        torch.OutOfMemoryError: A single image is too much.

    Example:
        >>> halving(lambda size: [size] * 2, 100)
        [100, 100]
    """
    while True:
        try:
            return call(size)
        except RuntimeError as error:
            if not out_of_memory(error) or size == 1:
                raise
        text = f"out of memory: images go through the network {size // 2} at a time now, not {size}"
        warnings.warn(UnreliableWarning(text), stacklevel=3)
        size //= 2


def device_of(model: nn.Module) -> torch.device:
    """Give the device that the first parameter or buffer of a network is on; a network without any is on the CPU.

    Example:
        >>> device_of(nn.Flatten())
        device(type='cpu')
    """
    tensor = next(model.parameters(), next(model.buffers(), None))
    return torch.device("cpu") if tensor is None else tensor.device


@contextlib.contextmanager
def running_on(device: torch.device) -> Iterator[None]:
    """Make tensors on a device for the block, float32 where nothing else is said, and let numbers below 1e-38 be zero.

    Gradients are on, also inside `torch.no_grad` and `torch.inference_mode`.

    Threads of torch that are there already go on as they did. A process that calls `torch.set_flush_denormal(True)`
    before any other work, as the command line does, has it in all of them.

    Example:
        >>> with running_on(torch.device("meta")):
        ...     torch.zeros(2).device
        device(type='meta')
    """
    before, dtype = flushes(), torch.get_default_dtype()
    torch.set_flush_denormal(True)
    torch.set_default_dtype(torch.float32)
    try:
        there = contextlib.nullcontext() if device == torch.get_default_device() else device
        with there, torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_flush_denormal(before)
        torch.set_default_dtype(dtype)


def flushes() -> bool:
    """Tell whether numbers below 1e-38 are zero in this thread."""
    return not torch.full((), 2e-38, dtype=torch.float32, device="cpu").mul(0.1)


def new_generator(seed: int) -> torch.Generator:
    """Give a generator of random numbers on the device that tensors are made on.

    Args:
        seed: Same seed, same numbers, on devices of the same kind.

    Example:
        >>> bool((torch.rand(3, generator=new_generator(0)) == torch.rand(3, generator=new_generator(0))).all())
        True
    """
    return torch.Generator(torch.get_default_device()).manual_seed(seed)
