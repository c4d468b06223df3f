"""WaNet: a smooth warping of the image."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.errors import DataError
from untrojan.lab.attack import Attack, Target
from untrojan.lab.online import EachBatch, Online
from untrojan.lab.pattern import uniform
from untrojan.registry import config


@config
class WaNet(Attack):
    """Bend the image by a smooth, fixed field of shifts.

    Shifts are drawn on a coarse grid, divided by their mean size, enlarged by bicubic interpolation, and used to sample
    the image bilinearly. Images are poisoned anew in every batch. In noise mode, as published, twice as many cover
    samples as poisoned images get the same warp with a random shift added at each pixel and keep their label, so that
    the network learns this warp and no other.

    A faint warp is learned late. A small network that had seen GTSRB eight times had an attack success rate of 5 % at
    the published strength, poisoned once, with covers or without, and of 50 % at `s=2`, poisoned anew in every batch.

    Attributes:
        k: Rows and columns of the coarse grid, at least 1.
        s: Strength of the warp, at least 0: the mean shift in half pixels.
        covers: Cover samples for each poisoned image, at least 0; with none it is WaNet without noise mode.
        seed: Decides the warp, at least 0.

    Raises:
        DataError: From `trigger`: the images are a single pixel.

    Example:
        >>> import torch
        >>> images = torch.rand(2, 3, 32, 32)
        >>> torch.allclose(WaNet(s=0).trigger(images), images, atol=1e-5)
        True
        >>> torch.allclose(WaNet().trigger(images), images, atol=1e-5)
        False

    Deviations:
        * The warp is applied to images in [0, 1], not to normalized ones; as bilinear sampling is linear, that makes no
          difference by itself.
        * Where height and width differ, each direction is measured by its own.
        * RNP's code draws another warp for each call; here it is fixed by the seed.

    References:
        Nguyen, Tran: WaNet: Imperceptible warping-based backdoor attack, ICLR 2021, arXiv:2102.10369.
    """

    name: ClassVar[str] = "wanet"

    k: Annotated[int, Field(ge=1)] = 4
    s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    covers: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0  # pyright: ignore[reportIncompatibleVariableOverride]
    seed: Annotated[int, Field(ge=0)] = 0

    def _trigger(self, images: Tensor) -> Tensor:
        return _sample(images, self._grid(images.shape[2:]).expand(len(images), -1, -1, -1))

    def _cover(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        images = few.floats()
        height, width = images.shape[2:]
        shifts = rng.random((len(few), height, width, 2), dtype=np.float32) * 2 - 1
        return _sample(images, self._grid(images.shape[2:]) + torch.as_tensor(shifts) / torch.tensor([width, height]))

    def _online(self, clean: CleanSet, target: Target, rate: float) -> Online:
        return EachBatch(self, target, rate, clean)

    def _grid(self, size: torch.Size) -> Tensor:
        """Where each pixel of the warped image comes from: `(H, W, 2)`, x before y, from -1 to 1."""
        height, width = size
        if height == width == 1:
            raise DataError("expected larger images than 1x1: a warp would change nothing")
        noise = uniform((1, 2, self.k, self.k), self.seed) * 2 - 1
        shifts = functional.interpolate(noise / noise.abs().mean(), (height, width), mode="bicubic", align_corners=True)
        y, x = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
        return torch.stack((x, y), 2) + self.s * shifts[0].permute(1, 2, 0) / torch.tensor([width, height])


def _sample(images: Tensor, grid: Tensor) -> Tensor:
    sampled = functional.grid_sample(images, grid.clamp(-1, 1).to(images), align_corners=True)
    return sampled.clamp(0, 1)
