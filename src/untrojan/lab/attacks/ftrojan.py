"""FTrojan: two frequencies of the color channels."""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from untrojan.errors import DataError
from untrojan.lab.pattern import Pattern
from untrojan.registry import config

_WINDOW = 32
_BINS = (15, 31)
_RED, _BLUE = 1.402, 1.772
_GREEN = -(0.299 * _RED + 0.114 * _BLUE) / 0.587


@config
class FTrojan(Pattern):
    """Raise a middle and the highest frequency of the two color channels.

    In every 32x32 window of the two chrominance channels (U and V), the coefficients (15, 15) and (31, 31) of the
    orthonormal discrete cosine transform grow by `magnitude`. As transform and change of colors are linear, this adds
    the same waves to every image: they are computed once, and added. As published: the defaults.

    Attributes:
        magnitude: What the coefficients of channels in [0, 255] grow by, at least 0.

    Raises:
        DataError: From `trigger`: the images have neither one nor three channels.

    Example:
        >>> import torch
        >>> wave = FTrojan().trigger(torch.full((1, 3, 32, 32), 0.5)) - 0.5
        >>> round(wave.abs().max().item() * 255, 1)
        5.7

    Deviations:
        * Windows at the right and bottom of images that are no multiple of 32 are cut off, so that images of other
          sizes, smaller ones too, can be attacked.
        * Gray images, which have no color, get the waves themselves.
        * Published code converts to and from 8-bit color channels, where values are cut to whole numbers and wrap
          around; here they saturate, and round once.

    References:
        Wang et al.: An invisible black-box backdoor attack through frequency domain, ECCV 2022, arXiv:2111.10991.
    """

    name: ClassVar[str] = "ftrojan"

    magnitude: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0

    def _pattern(self, shape: torch.Size) -> Tensor:
        channels, height, width = shape
        if channels not in (1, 3):
            raise DataError(f"expected images with one or three channels for ftrojan, got {channels}")
        rows, columns = (math.pi / _WINDOW * (torch.arange(size) % _WINDOW + 0.5) for size in (height, width))
        wave = sum(torch.outer(torch.cos(each * rows), torch.cos(each * columns)) for each in _BINS)
        colors = torch.tensor([1.0] if channels == 1 else [_RED, _GREEN, _BLUE])
        return colors[:, None, None] * wave * (self.magnitude / 255 * 2 / _WINDOW)
