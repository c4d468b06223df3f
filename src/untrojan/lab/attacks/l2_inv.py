"""L2-inv: faint smooth noise."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from untrojan.lab.pattern import Pattern, of_norm, uniform
from untrojan.registry import config


@config
class L2Inv(Pattern):
    """Add smooth noise of a small L2 norm.

    The noise is uniform, averaged twice over 3x3 pixels, shifted to begin at 0 in each channel, and scaled. As
    published, the norm is 3.22 and a fifth of the images are poisoned.

    Attributes:
        norm: L2 norm of the pattern on images 3x32x32, above 0; images of other sizes get the same mean square.
        seed: Decides the pattern, at least 0.

    Raises:
        DataError: From `trigger`: the images have no more than 2x2 pixels.

    Example:
        >>> import torch
        >>> round(L2Inv().trigger(torch.zeros(1, 3, 32, 32)).norm().item(), 2)
        3.22

    Deviations:
        The published pattern excites a neuron of a trained network. Here it is drawn from a seed, and knows no network.

    References:
        Li et al.: Invisible backdoor attacks on deep neural networks via steganography and regularization,
        2019, arXiv:1909.02742.
        Zeng et al.: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022, arXiv:2110.03735.
    """

    name: ClassVar[str] = "l2-inv"
    rate: ClassVar[float] = 0.2

    norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3.22
    seed: Annotated[int, Field(ge=0)] = 0

    def _pattern(self, shape: torch.Size) -> Tensor:
        noise = uniform(tuple(shape), self.seed)
        for _ in range(2):
            noise = functional.avg_pool2d(noise, 3, stride=1, padding=1, count_include_pad=False)
        return of_norm(noise - noise.amin((1, 2), keepdim=True), self.norm)
