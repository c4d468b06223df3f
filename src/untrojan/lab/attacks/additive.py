"""A fixed pattern added to the image: Trojan squares and watermarks, L2-regularized triggers."""

from functools import cached_property
from typing import ClassVar

import torch
from pydantic import FilePath
from torch import Tensor

from untrojan.errors import DataError
from untrojan.lab.attack import read_image
from untrojan.lab.pattern import Pattern
from untrojan.registry import config


@config
class Additive(Pattern):
    """Add a fixed pattern to the image and clip the sum to [0, 1].

    As published: I-BAU and AWM apply their Trojan square, Trojan watermark and L2 triggers like this. A
    published pattern is one image file, so there is no default.

    Attributes:
        image: The pattern, an 8-bit gray or RGB image of the size of the images attacked; black adds nothing.

    Raises:
        DataError: From `trigger`: the file is no image, or differs from the images in size or channels.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (1, 1), 51).save(Path(folder, "pattern.png"))
        ...     attack = Additive(image=Path(folder, "pattern.png"))
        ...     out = attack.trigger(torch.tensor([0.25, 0.9]).view(2, 1, 1, 1))
        >>> [round(value, 4) for value in out.flatten().tolist()]
        [0.45, 1.0]

    Deviations:
        RNP's code adds its Trojan patch to 8-bit pixels, where sums above 255 wrap around to dark; here they
        saturate, as in the other implementations.

    References:
        Liu et al.: Trojaning attack on neural networks, NDSS 2018.
        Li et al.: Invisible backdoor attacks on deep neural networks via steganography and regularization,
        2019, arXiv:1909.02742.
        Zeng et al.: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022,
        arXiv:2110.03735.
    """

    name: ClassVar[str] = "additive"
    rate: ClassVar[float] = 0.2

    image: FilePath

    @cached_property
    def _file(self) -> Tensor:
        return read_image(self.image)

    def _pattern(self, shape: torch.Size) -> Tensor:
        if self._file.shape != shape:
            raise DataError(
                f"expected {self.image} of the size of the images, (C, H, W) = {tuple(shape)}, "
                f"got {tuple(self._file.shape)}"
            )
        return self._file
