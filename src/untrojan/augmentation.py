"""Random crops and mirrorings of batches of images."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Augment = Callable[[Tensor, torch.Generator], Tensor]

_PADDING = 4


def crop(images: Tensor, generator: torch.Generator, padding: int = _PADDING) -> Tensor:
    """Pad each image by black pixels on every side and cut a random window of the old size.

    Args:
        images: Images (N, C, H, W).
        generator: Draws the windows.
        padding: How many pixels; 4 is usual for images of 32x32.

    Returns:
        New images of the same shape and type.

    Example:
        >>> crop(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])
    """
    count, channels, height, width = images.shape
    corners = torch.randint(2 * padding + 1, (2, count, 1), generator=generator, device=generator.device)
    top, left = corners.to(images.device)
    rows = top + torch.arange(height, device=images.device)
    columns = left + torch.arange(width, device=images.device)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    padded = functional.pad(images, (padding,) * 4)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def crop_flip(images: Tensor, generator: torch.Generator, padding: int = _PADDING) -> Tensor:
    """Cut a random window as :func:`crop` does, and mirror each image left to right with probability 1/2.

    Args:
        images: Images (N, C, H, W).
        generator: Draws the windows, then the flips.
        padding: As for :func:`crop`.

    Returns:
        New images of the same shape and type.

    Example:
        >>> crop_flip(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 32, 32])
    """
    windows = crop(images, generator, padding)
    mirrored = torch.rand(len(images), generator=generator, device=generator.device).to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], windows.flip(3), windows)


AUGMENTATIONS: dict[str, Augment | None] = {"none": None, "crop": crop, "crop-flip": crop_flip}
"""By the names that methods and recipes have for them."""
