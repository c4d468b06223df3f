"""BppAttack: fewer bits per pixel."""

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.lab.attack import Attack
from untrojan.registry import config


@config
class BppAttack(Attack):
    """Quantize colors to few levels, with or without dithering.

    Dithering is that of Floyd and Steinberg: what rounding takes from a pixel goes to its neighbors to the right and
    below. As many cover samples as poisoned images, the negative samples of the paper, get what quantizing does to
    another training image added and keep their label. As published, there are 8 levels (3 bits) and no dithering.

    Attributes:
        levels: Levels per channel, at least 2.
        dither: Whether to spread the rounding error.

    Example:
        >>> import torch
        >>> BppAttack(levels=2).trigger(torch.tensor([0.2, 0.4, 0.6]).view(1, 1, 1, 3)).flatten().tolist()
        [0.0, 0.0, 1.0]
        >>> BppAttack(levels=2, dither=True).trigger(torch.tensor([0.2, 0.45, 0.4]).view(1, 1, 1, 3)).flatten().tolist()
        [0.0, 1.0, 0.0]

    Deviations:
        Images are poisoned once, before training, not anew in every batch. Contrastive training with adversarial
        examples, which the paper adds to the negative samples, is left out, as in BackdoorBench.

    References:
        Wang, Zhai, Ma: BppAttack: Stealthy and efficient trojan attacks against deep neural networks via image
        quantization and contrastive adversarial learning, CVPR 2022, arXiv:2205.13383.
    """

    name: ClassVar[str] = "bpp"
    covers: ClassVar[float] = 1.0

    levels: Annotated[int, Field(ge=2)] = 8
    dither: bool = False

    def _trigger(self, images: Tensor) -> Tensor:
        return self._dithered(images) if self.dither else self._rounded(images)

    def _cover(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        others = clean.take(rng.integers(len(clean), size=len(few))).floats()
        return (few.floats() + self._trigger(others.clone()) - others).clamp(0, 1)

    def _rounded(self, images: Tensor) -> Tensor:
        return (images * (self.levels - 1)).round() / (self.levels - 1)

    def _dithered(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        spread = functional.pad(images, (1, 1, 0, 1))
        for i in range(height):
            for j in range(1, width + 1):
                old = spread[:, :, i, j].clone()
                spread[:, :, i, j] = self._rounded(old)
                error = old - spread[:, :, i, j]
                for row, column, share in ((i, j + 1, 7), (i + 1, j - 1, 3), (i + 1, j, 5), (i + 1, j + 1, 1)):
                    spread[:, :, row, column] += error * (share / 16)
        return spread[:, :, :height, 1:-1].clamp(0, 1)
