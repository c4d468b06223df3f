"""L0-inv: nine pixels in saturated colors."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from untrojan.errors import DataError
from untrojan.lab.attack import Attack
from untrojan.lab.pattern import uniform
from untrojan.registry import config


@config
class L0Inv(Attack):
    """Replace the last pixels of the bottom row by saturated colors.

    As published, a fifth of the images get nine pixels, at columns 23 to 31 of row 31.

    Attributes:
        pixels: How many pixels, at least 1.
        seed: Decides the colors, at least 0.

    Raises:
        DataError: From `trigger`: the images are less wide than that.

    Example:
        >>> import torch
        >>> L0Inv(pixels=3, seed=2).trigger(torch.full((1, 1, 2, 4), 0.5))[0, 0].tolist()
        [[0.5, 0.5, 0.5, 0.5], [0.5, 1.0, 0.0, 0.0]]

    Deviations:
        Published colors are those that excite a neuron of a trained network. Here each channel of each pixel is 0 or 1
        by the seed. For the published ones use the attack masked.

    References:
        Li et al.: Invisible backdoor attacks on deep neural networks via steganography and regularization,
        2019, arXiv:1909.02742.
        Zeng et al.: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022, arXiv:2110.03735.
    """

    name: ClassVar[str] = "l0-inv"
    rate: ClassVar[float] = 0.2

    pixels: Annotated[int, Field(ge=1)] = 9
    seed: Annotated[int, Field(ge=0)] = 0

    def _trigger(self, images: Tensor) -> Tensor:
        if self.pixels > images.shape[3]:
            raise DataError(f"expected images at least {self.pixels} wide, got {images.shape[3]}; change `pixels`")
        colors = uniform((images.shape[1], self.pixels), self.seed).round()
        images[:, :, -1, -self.pixels :] = colors.to(images)
        return images
