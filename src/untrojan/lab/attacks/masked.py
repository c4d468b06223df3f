"""A fixed pattern that replaces the image inside of a mask: L0-regularized triggers."""

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from pydantic import FilePath
from torch import Tensor

from untrojan.errors import DataError, cause
from untrojan.lab.attack import read_image
from untrojan.lab.attacks.additive import Additive
from untrojan.registry import config


@config
class Masked(Additive):
    """Fade the image out where the mask is set, add a fixed pattern and clip: `x (1 - mask) + pattern`.

    As published: I-BAU and AWM apply their L0 trigger like this, 9 pixels at the right of the bottom row. A
    published trigger is two files, so there are no defaults.

    Attributes:
        mask: Where the pattern replaces the image, in [0, 1]: an image file like `image`, or a .npy array of
            layout HW, CHW or HWC.

    Raises:
        DataError: From `trigger`: a file cannot be read, differs from the images in size or channels, or the
            mask leaves [0, 1].

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pattern, mask = Path(folder, "pattern.png"), Path(folder, "mask.npy")
        ...     Image.new("L", (2, 1), 51).save(pattern)
        ...     np.save(mask, np.array([[0.0, 1.0]]))
        ...     out = Masked(image=pattern, mask=mask).trigger(torch.full((1, 1, 1, 2), 0.5))
        >>> [round(value, 4) for value in out.flatten().tolist()]
        [0.7, 0.2]

    Deviations:
        None.

    References:
        Li et al.: Invisible backdoor attacks on deep neural networks via steganography and regularization,
        2019, arXiv:1909.02742.
        Zeng et al.: Adversarial unlearning of backdoors via implicit hypergradient, ICLR 2022,
        arXiv:2110.03735.
    """

    name: ClassVar[str] = "masked"

    mask: FilePath

    @cached_property
    def _mask(self) -> Tensor:
        return _read_mask(self.mask)

    def _trigger(self, images: Tensor) -> Tensor:
        return super()._trigger(images * (1 - self._fitted_mask(images.shape[1:]).to(images)))

    def _fitted_mask(self, shape: torch.Size) -> Tensor:
        channels, height, width = shape
        if self._mask.shape in (shape, (1, height, width), (height, width)):
            return self._mask.expand(shape)
        if self._mask.shape == (height, width, channels):
            return self._mask.permute(2, 0, 1)
        raise DataError(
            f"expected {self.mask} of layout HW, CHW or HWC for images of (C, H, W) = {tuple(shape)}, "
            f"got {tuple(self._mask.shape)}"
        )


def _read_mask(path: Path) -> Tensor:
    if path.suffix != ".npy":
        return read_image(path)
    try:
        with path.open("rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # numpy may raise anything on a hostile header
        raise DataError(f"expected an array of numbers in {path}, got {cause(error)}") from error
    if values.dtype.kind not in "fbiu" or not ((values >= 0) & (values <= 1)).all():
        raise DataError(f"expected a mask of numbers in [0, 1] in {path}, got {values.dtype} values that are not")
    return torch.as_tensor(values.astype(np.float32))
