"""DFST: the image in the colors of a sunset."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from untrojan.errors import DataError
from untrojan.lab.attack import Attack
from untrojan.registry import config

_GAMMA = 1.25
_COLORS = ((0.80, 0.25, 0.05), (0.20, 0.60, 0.05), (0.15, 0.15, 0.50))
_SKY, _HORIZON = (0.30, 0.10, 0.35), (0.95, 0.50, 0.15)
_GLOW = 0.35


@config
class DFST(Attack):
    """Show the image in the style of a sunset: darker, warmer, and with a glow that grows towards the bottom.

    Colors are raised to the power 1.25 and mixed by a fixed matrix, which favors red. This is mixed with a gradient
    from violet at the top to orange at the bottom, and the result, by `alpha`, with the image. As published, alpha is
    0.6 and 5 % of the images are poisoned.

    Attributes:
        alpha: Share of the styled image, in [0, 1].

    Raises:
        DataError: From `trigger`: the images have neither one nor three channels.

    Example:
        >>> import torch
        >>> warm = DFST().trigger(torch.full((1, 3, 32, 32), 0.5)).mean((0, 2, 3))
        >>> bool(warm[0] > warm[1] > warm[2])
        True

    Deviations:
        * The published style is that of a CycleGAN trained on photographs, and follows the content of the image. Here
          it is a fixed formula.
        * Detoxification, the rounds of training that unlearn simple features of the trigger, is left out.
        * Gray images are styled as if they had color and turned gray again.

    References:
        Cheng, Liu, Ma, Zhang: Deep feature space trojan attack of neural networks by controlled detoxification,
        AAAI 2021, arXiv:2012.11212.
    """

    name: ClassVar[str] = "dfst"
    rate: ClassVar[float] = 0.05

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.6

    def _trigger(self, images: Tensor) -> Tensor:
        channels = images.shape[1]
        if channels not in (1, 3):
            raise DataError(f"expected images with one or three channels for dfst, got {channels}")
        styled = _sunset(images.expand(-1, 3, -1, -1))
        return images.lerp(styled if channels == 3 else styled.mean(1, keepdim=True), self.alpha).clamp(0, 1)


def _sunset(images: Tensor) -> Tensor:
    colors, sky, horizon = (images.new_tensor(each) for each in (_COLORS, _SKY, _HORIZON))
    mixed = (images.pow(_GAMMA)[:, None] * colors[:, :, None, None]).sum(2)
    glow = torch.lerp(sky[:, None], horizon[:, None], torch.linspace(0, 1, images.shape[2]).to(images))
    return mixed.lerp(glow[:, :, None].expand_as(mixed), _GLOW).clamp(0, 1)
