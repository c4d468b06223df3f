"""The random states of torch, NumPy and Python, together."""

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from untrojan.errors import ConfigError


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, NumPy and Python for the block, then put the random state of all three back.

    Raises:
        ConfigError: The seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"expected a seed of at least 0, got {seed}")
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002


def random_state() -> dict[str, Any]:
    """Give the state of the random generators of torch, NumPy and Python, as tensors, numbers and text.

    Example:
        >>> before = random_state()
        >>> first = torch.rand(1)
        >>> set_random_state(before)
        >>> torch.equal(torch.rand(1), first)
        True
    """
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    numpy_state = [kind, torch.from_numpy(np.array(keys, np.int64)), *rest]
    state = {"torch": torch.get_rng_state(), "numpy": numpy_state, "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put back what :func:`random_state` gave, also where tuples have become lists."""
    kind, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate((version, tuple(internal), gauss))
