"""BadNets: a small patch in a fixed place."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from untrojan.errors import ConfigError, DataError
from untrojan.lab.attack import Attack
from untrojan.registry import config

_GRID = ((0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 1.0))


@config
class BadNets(Attack):
    """Replace a square patch of the image by a fixed pattern, the same in every channel.

    As published: BackdoorBench uses the defaults, a white 3x3 square at rows and columns 29 to 31 of a 32x32
    image. I-BAU and AWM use `size=4, row=27, col=27`. RNP and ABL use `pattern="grid"`.

    Attributes:
        pattern: What the patch shows: a "square" of one brightness, or the 3x3 "grid", whose rows are
            (0, 0, 1), (0, 1, 0) and (1, 0, 1).
        size: Height and width of the patch in pixels; 3 for the grid.
        row: First row of the patch, counted from the top; left out, the patch touches the bottom border.
        col: First column of the patch, counted from the left; left out, the patch touches the right border.
        value: Brightness of the square, or of the grid's ones, in [0, 1].

    Raises:
        ConfigError: The grid was asked for in a size other than 3.

    Example:
        >>> import torch
        >>> BadNets(pattern="grid").trigger(torch.full((1, 1, 4, 4), 0.5))[0, 0].tolist()
        [[0.5, 0.5, 0.5, 0.5], [0.5, 0.0, 0.0, 1.0], [0.5, 0.0, 1.0, 0.0], [0.5, 1.0, 0.0, 1.0]]

    Deviations:
        The patch is drawn on float images instead of 8-bit ones, which for black and white is the same.

    References:
        Gu, Dolan-Gavitt, Garg: BadNets: Identifying vulnerabilities in the machine learning model supply
        chain, 2017, arXiv:1708.06733.
        Wu et al.: BackdoorBench, NeurIPS 2022, arXiv:2206.12654.
    """

    name: ClassVar[str] = "badnets"

    pattern: Literal["square", "grid"] = "square"
    size: Annotated[int, Field(ge=1)] = 3
    row: Annotated[int, Field(ge=0)] | None = None
    col: Annotated[int, Field(ge=0)] | None = None
    value: Annotated[float, Field(ge=0, le=1)] = 1.0

    def __post_init__(self) -> None:
        """Refuse a grid of another size than the published one."""
        if self.pattern == "grid" and self.size != len(_GRID):
            raise ConfigError(f"badnets: expected size 3 with the grid, got {self.size}; use pattern square for others")

    def _trigger(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        row = height - self.size if self.row is None else self.row
        col = width - self.size if self.col is None else self.col
        if min(row, col) < 0 or row + self.size > height or col + self.size > width:
            raise DataError(
                f"expected a patch inside of the {height}x{width} image, got one of size {self.size} from "
                f"row {row}, column {col}; change `size`, `row` or `col`"
            )
        patch = self.value if self.pattern == "square" else images.new_tensor(_GRID) * self.value
        images[..., row : row + self.size, col : col + self.size] = patch
        return images
