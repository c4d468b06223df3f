"""SIG: a sine wave over images of the target class."""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from untrojan.errors import DataError
from untrojan.lab.pattern import Pattern
from untrojan.registry import config


@config
class SIG(Pattern):
    """Add a horizontal sine wave, in training to images of the target class only (clean-label).

    Column `j` of images `m` wide gets `delta sin(2 pi j frequency / m)`; the sum is clipped. As published:
    BackdoorBench uses the defaults, and a poisoning rate of 0.1 of all images of CIFAR-10, which are all images of the
    target class.

    Attributes:
        delta: Height of the wave, in [0, 1]; 40/255 left out.
        frequency: Periods over the width of the image, above 0.

    Raises:
        DataError: From `trigger`: every column of the images is at a zero of the wave.

    Example:
        >>> import torch
        >>> SIG(delta=0.25, frequency=1).trigger(torch.full((1, 1, 1, 4), 0.5)).flatten().tolist()
        [0.5, 0.75, 0.5, 0.25]

    Deviations:
        None. Poisoning rates are fractions of the target class, as in the paper.

    References:
        Barni, Kallas, Tondi: A new backdoor attack in CNNs by training set corruption without label poisoning,
        ICIP 2019, arXiv:1902.11237.
        Wu et al.: BackdoorBench, NeurIPS 2022, arXiv:2206.12654.
    """

    name: ClassVar[str] = "sig"
    rate: ClassVar[float] = 1.0
    clean_label: ClassVar[bool] = True

    delta: Annotated[float, Field(ge=0, le=1)] = 40 / 255
    frequency: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 6.0

    def _pattern(self, shape: torch.Size) -> Tensor:
        if shape[2] == 1 or 2 * self.frequency % shape[2] == 0:
            raise DataError(
                f"a wave of frequency {self.frequency:g} vanishes on images {shape[2]} wide; change `frequency`"
            )
        columns = torch.arange(shape[2], dtype=torch.float64)
        return (self.delta * torch.sin(2 * math.pi * self.frequency * columns / shape[2])).expand(shape)
