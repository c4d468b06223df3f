"""Views of clean images, of which the original model tells what a repaired one should say."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from untrojan.augmentation import crop_flip
from untrojan.scanners.patches import box_masks

FEW_IMAGES = 100
LEAST_SIDE = 0.5
CONTRAST = 0.4
BRIGHTNESS = 0.15


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images `(n, C, H, W)` shifted by up to an eighth of their shorter side, half of them mirrored."""
    return crop_flip(images, generator, padding=math.ceil(min(images.shape[2:]) / 8))


def mixed(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images with up to half of another one blended in."""
    share = 0.5 * torch.rand(len(images), 1, 1, 1, generator=generator)
    share = share * (torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5)
    return torch.lerp(images, images[torch.randperm(len(images), generator=generator)], share)


def varied(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the images zoomed, half recolored, half with a window of another one."""
    for change in (_zoomed, _recolored, _pasted):
        which = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(which, change(images, generator), images)
    return images


def _zoomed(images: Tensor, generator: torch.Generator) -> Tensor:
    """A window of at least half of the side, anywhere, enlarged to the whole."""
    side = 1 - (1 - LEAST_SIDE) * torch.rand(len(images), 1, generator=generator)
    middle = (1 - side) * (2 * torch.rand(len(images), 2, generator=generator) - 1)
    maps = torch.cat([side[:, :, None] * torch.eye(2), middle[:, :, None]], 2)
    grid = functional.affine_grid(maps, list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _recolored(images: Tensor, generator: torch.Generator) -> Tensor:
    """Another contrast, and each channel a little brighter or darker."""
    contrast = 1 + CONTRAST * (2 * torch.rand(len(images), 1, 1, 1, generator=generator) - 1)
    shift = BRIGHTNESS * (2 * torch.rand(*images.shape[:2], 1, 1, generator=generator) - 1)
    return ((images - 0.5) * contrast + 0.5 + shift).clamp(0, 1)


def _pasted(images: Tensor, generator: torch.Generator) -> Tensor:
    """A window of another image at its place, with sides of a quarter to three quarters."""
    sides = torch.tensor(images.shape[2:])
    size = sides * (0.25 + 0.5 * torch.rand(len(images), 2, generator=generator))
    corner = (sides - size) * torch.rand(len(images), 2, generator=generator)
    masks = box_masks(torch.cat([size, corner], 1), *images.shape[2:])
    return torch.where(masks, images[torch.randperm(len(images), generator=generator)], images)
