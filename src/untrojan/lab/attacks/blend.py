"""Blend: a noise image, faintly over the whole image."""

from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from untrojan.lab.attack import Attack
from untrojan.lab.pattern import uniform
from untrojan.registry import config


@config
class Blend(Attack):
    """Mix the image with a fixed noise image: `(1 - alpha) x + alpha t`.

    As published: alpha is 0.2 in training and at test time, and a tenth of the images is poisoned.

    Attributes:
        alpha: Share of the noise image, in [0, 1].
        seed: Decides the noise image, at least 0.

    Example:
        >>> import torch
        >>> images = torch.full((1, 1, 1, 2), 0.5)
        >>> noise = Blend(alpha=1).trigger(images)
        >>> torch.allclose(Blend().trigger(images), 0.8 * images + 0.2 * noise)
        True

    Deviations:
        Published triggers are a cartoon or a file of Gaussian noise. Here it is uniform noise, drawn once from the
        seed for images of each size.

    References:
        Chen et al.: Targeted backdoor attacks on deep learning systems using data poisoning, 2017, arXiv:1712.05526.
        Wu et al.: BackdoorBench, NeurIPS 2022, arXiv:2206.12654.
    """

    name: ClassVar[str] = "blend"

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.2
    seed: Annotated[int, Field(ge=0)] = 0

    def _trigger(self, images: Tensor) -> Tensor:
        return images.lerp(uniform(tuple(images.shape[1:]), self.seed).to(images), self.alpha)
