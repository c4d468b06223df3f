"""Trojan square: a patch of random saturated pixels, added."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from untrojan.errors import ConfigError, DataError
from untrojan.lab.pattern import Pattern
from untrojan.registry import config

_MARGIN = 2
_PUBLISHED_CHANNELS = 3


@config
class TrojanSquare(Pattern):
    """Add a square of random pixels near the corner at the bottom right.

    Values of the square are 1 or 0; so many are 1, one at least, that its norm is the published one. As published by
    I-BAU and AWM, it covers rows and columns 21 to 29 of a 32x32 image, and a fifth of the images are poisoned.

    Attributes:
        size: Height and width of the square in pixels, at least 1; it ends two pixels from the border.
        norm: L2 norm of the square where there are three channels, above 0; at most `size` times the root of 3. One
            channel has a third of its square.
        seed: Decides the square, at least 0.

    Raises:
        ConfigError: The norm is more than that of a white square.
        DataError: From `trigger`: the square does not fit into the images.

    Example:
        >>> import torch
        >>> square = TrojanSquare().trigger(torch.zeros(1, 3, 32, 32))
        >>> int(square.sum()), round(square.norm().item(), 2)
        (75, 8.66)

    Deviations:
        The published square excites neurons of a trained network. Here it is drawn from a seed, and knows no network.
        For the published one use the attack additive. Sums saturate; in RNP's code they wrap around to dark.

    References:
        Liu et al.: Trojaning attack on neural networks, NDSS 2018.
        Zeng et al.: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022, arXiv:2110.03735.
    """

    name: ClassVar[str] = "trojan-square"
    rate: ClassVar[float] = 0.2

    size: Annotated[int, Field(ge=1)] = 9
    norm: Annotated[float, Field(gt=0)] = 8.66
    seed: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        """Refuse a norm that no square of this size has."""
        if self.norm**2 > _PUBLISHED_CHANNELS * self.size**2:
            raise ConfigError(f"trojan-square: expected a norm of a square of size {self.size}, got {self.norm}")

    def _pattern(self, shape: torch.Size) -> Tensor:
        channels, height, width = shape
        if min(height, width) < self.size + _MARGIN:
            least = self.size + _MARGIN
            raise DataError(f"expected images of {least}x{least} or more, got {height}x{width}; change `size`")
        ones = max(1, round(self.norm**2 * channels / _PUBLISHED_CHANNELS))
        values = np.arange(channels * self.size**2) < ones
        square = np.random.default_rng(self.seed).permutation(values).reshape(channels, self.size, self.size)
        pattern = torch.zeros(shape)
        pattern[:, -self.size - _MARGIN : -_MARGIN, -self.size - _MARGIN : -_MARGIN] = torch.as_tensor(square)
        return pattern
