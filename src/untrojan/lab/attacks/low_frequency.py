"""Low-frequency: a smooth pattern of few cosine waves."""

import math
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from untrojan.lab.pattern import Pattern, require_shown
from untrojan.registry import config


@config
class LowFrequency(Pattern):
    """Add a pattern that holds low frequencies only.

    The pattern is a random sum of the lowest modes of the discrete cosine transform in each channel, the constant one
    left out, scaled to reach from 0 to `strength`. As published, it reaches from 0 to 51/255.

    Attributes:
        strength: Largest value of the pattern, in [0, 1].
        modes: Modes per direction, at least 2.
        seed: Decides the pattern, at least 0.

    Raises:
        DataError: From `trigger`: the images are a single gray pixel.

    Example:
        >>> import torch
        >>> pattern = LowFrequency().trigger(torch.zeros(1, 3, 32, 32))
        >>> round(pattern.min().item(), 4), round(pattern.max().item(), 4)
        (0.0, 0.2)

    Deviations:
        The published pattern is a universal adversarial perturbation of a clean network, smoothed by a wide Gaussian
        in each step. Here it is drawn from a seed, and knows no network.

    References:
        Zeng et al.: Rethinking the backdoor attacks' triggers: A frequency perspective, ICCV 2021, arXiv:2104.03413.
    """

    name: ClassVar[str] = "low-frequency"

    strength: Annotated[float, Field(ge=0, le=1)] = 0.2
    modes: Annotated[int, Field(ge=2)] = 3
    seed: Annotated[int, Field(ge=0)] = 0

    def _pattern(self, shape: torch.Size) -> Tensor:
        channels, height, width = shape
        weights = np.random.default_rng(self.seed).standard_normal((channels, self.modes, self.modes))
        weights[:, 0, 0] = 0
        rows, columns = (
            np.cos(math.pi * np.outer(np.arange(self.modes), (np.arange(size) + 0.5) / size))
            for size in (height, width)
        )
        waves = torch.as_tensor(rows.T @ weights @ columns)
        pattern = waves - waves.min()
        require_shown(pattern)
        return pattern / pattern.max() * self.strength
