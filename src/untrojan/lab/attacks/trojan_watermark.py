"""Trojan watermark: a logo over the whole image."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from untrojan.lab.pattern import Pattern, of_norm
from untrojan.registry import config

_INNER, _OUTER = 0.39, 0.46
_CELLS, _CELL = 5, 0.1


@config
class TrojanWatermark(Pattern):
    """Add a logo: a ring round a symmetric glyph.

    The glyph is made of 5x5 cells, mirrored from left to right. The logo covers about a third of the image, as the
    published one does. As published by I-BAU and AWM, its norm is 8.74 and a fifth of the images are poisoned.

    Attributes:
        norm: L2 norm of the logo on images 3x32x32, above 0; images of other sizes get the same mean square.
        seed: Decides the glyph, at least 0.

    Raises:
        DataError: From `trigger`: the images are too small to show anything.

    Example:
        >>> import torch
        >>> logo = TrojanWatermark().trigger(torch.zeros(1, 3, 32, 32))
        >>> round(logo.norm().item(), 2), round((logo > 0).double().mean().item(), 1)
        (8.74, 0.3)

    Deviations:
        The published logo excites neurons of a trained network and is colored. Here it is white, drawn from a seed, and
        knows no network. For the published one use the attack additive.

    References:
        Liu et al.: Trojaning attack on neural networks, NDSS 2018.
        Zeng et al.: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022, arXiv:2110.03735.
    """

    name: ClassVar[str] = "trojan-watermark"
    rate: ClassVar[float] = 0.2

    norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 8.74
    seed: Annotated[int, Field(ge=0)] = 0

    def _pattern(self, shape: torch.Size) -> Tensor:
        y, x = np.meshgrid(*((np.arange(size) + 0.5) / size - 0.5 for size in shape[1:]), indexing="ij")
        distance = np.hypot(x, y)
        ring = (distance >= _INNER) & (distance < _OUTER)
        half = _CELLS // 2 + 1
        cells = np.random.default_rng(self.seed).permutation(np.arange(_CELLS * half) % 2).reshape(_CELLS, half)
        row, column = np.floor(y / _CELL + _CELLS / 2).astype(int), np.floor(np.abs(x) / _CELL + 0.5).astype(int)
        inside = (row >= 0) & (row < _CELLS) & (column < half)
        glyph = inside & (cells[row.clip(0, _CELLS - 1), column.clip(max=half - 1)] == 1)
        return of_norm(torch.as_tensor(ring | glyph).float().expand(shape), self.norm)
