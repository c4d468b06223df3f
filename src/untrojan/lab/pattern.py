"""Attacks that add one fixed pattern to every image."""

from abc import abstractmethod

import numpy as np
import torch
from torch import Tensor

from untrojan.errors import DataError
from untrojan.lab.attack import Attack

_PUBLISHED_VALUES = 3 * 32 * 32


class Pattern(Attack):
    """Base of attacks that add the same pattern to every image and clip the sum to [0, 1].

    Authors write :meth:`_pattern`.
    """

    @abstractmethod
    def _pattern(self, shape: torch.Size) -> Tensor:
        """Return what is added to images of `shape`, (C, H, W): float, of that shape, in [-1, 1]."""

    def _trigger(self, images: Tensor) -> Tensor:
        return (images + self._pattern(images.shape[1:]).to(images)).clamp(0, 1)


def uniform(shape: tuple[int, ...], seed: int) -> Tensor:
    """Draw numbers that are the same on every machine.

    Args:
        shape: How many.
        seed: Decides the numbers.

    Returns:
        Float32 in [0, 1).

    Example:
        >>> uniform((2,), seed=0).tolist() == uniform((2, 1), seed=0).flatten().tolist()
        True
    """
    return torch.as_tensor(np.random.default_rng(seed).random(shape, dtype=np.float32))


def of_norm(pattern: Tensor, norm: float) -> Tensor:
    """Scale a pattern to the strength that a published one has on images 3x32x32.

    Args:
        pattern: The pattern (C, H, W), at least 0.
        norm: Its L2 norm were it of size 3x32x32; on images with fewer or more values it is less or more, so that the
            mean square stays.

    Returns:
        The pattern scaled, and clipped to 1.

    Raises:
        DataError: The pattern is 0 everywhere.

    Example:
        >>> round(of_norm(torch.ones(1, 32, 32), norm=3.0).norm().item() ** 2, 4)
        3.0
    """
    require_shown(pattern)
    return (pattern * (norm * (pattern.numel() / _PUBLISHED_VALUES) ** 0.5 / pattern.norm())).clamp(max=1)


def require_shown(pattern: Tensor) -> None:
    """Refuse a pattern (C, H, W) that is 0 everywhere, as smooth ones are on images of few pixels.

    Raises:
        DataError: It is.

    Example:
        >>> require_shown(torch.eye(2)[None])
    """
    if not pattern.any():
        raise DataError(f"expected larger images than {'x'.join(map(str, pattern.shape))}: the trigger would be empty")
