"""Adaptive blend: half of a blended image in training, all of it at test time."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from untrojan.data import CleanSet
from untrojan.lab.attacks.blend import Blend
from untrojan.registry import config


@config
class AdaptiveBlend(Blend):
    """Blend only a random half of the trigger in training, few times, and as often with the true label.

    The trigger is cut into 4x4 pieces. Every poisoned image gets its own random half of them. As many cover samples get
    the same and keep their label. Poisoned and clean images then do not come apart in feature space. At test time the
    trigger is whole. As published, 0.3 % of the images are poisoned and 0.3 % are cover samples.

    Attributes:
        pieces: Rows and columns of pieces, at least 1.
        kept: Share of the pieces that an image gets in training, above 0 and up to 1; rounded, at least one piece.

    Example:
        >>> import torch
        >>> from untrojan.lab.victim import poison
        >>> clean = CleanSet(torch.full((500, 1, 8, 8), 0.5), torch.arange(500) % 2)
        >>> changed = poison(clean, AdaptiveBlend(), target=0).images != 0.5
        >>> changed.flatten(1).sum(1).unique().tolist()
        [0, 32]

    Deviations:
        The noise image is that of blend. Poisoned images and cover samples are drawn from all classes but the target;
        published code draws from all. Pieces are as equal as whole pixels allow.

    References:
        Qi et al.: Revisiting the assumption of latent separability for backdoor defenses, ICLR 2023,
        arXiv:2205.13613.
    """

    name: ClassVar[str] = "adaptive-blend"
    rate: ClassVar[float] = 0.003
    covers: ClassVar[float] = 1.0

    pieces: Annotated[int, Field(ge=1)] = 4
    kept: Annotated[float, Field(gt=0, le=1)] = 0.5

    def _poisoned(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        total = self.pieces**2
        order = rng.permuted(np.tile(np.arange(total), (len(few), 1)), axis=1)
        shown = torch.as_tensor(order < max(1, round(self.kept * total))).view(-1, 1, self.pieces, self.pieces)
        height, width = few.shape[1:]
        rows, columns = (torch.arange(size) * self.pieces // size for size in (height, width))
        images = few.floats()
        return torch.where(shown[:, :, rows[:, None], columns], self._trigger(images), images)
