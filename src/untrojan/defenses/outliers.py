"""The base of the prunings that look for channels which stand out of their layer."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.pruning import Pruning
from untrojan.mask import Mask
from untrojan.registry import config


@config
class Outliers(Pruning):
    """Base of the prunings by the z-value of a channel within its layer; authors write :meth:`measure`.

    A score is minus the z-value, so that the channels which stand out most are pruned first. Among n channels no
    z-value exceeds (n - 1) / sqrt(n): a layer of ten channels or fewer holds none above 3.

    Attributes:
        threshold: Prune channels whose value is this many standard deviations or more above the mean of their layer,
            the papers' u, above 0, for `threshold`.
    """

    thresholds: ClassVar[tuple[float, ...]] = tuple(-step / 2 for step in range(12, 1, -1))

    threshold: float = Field(default=3.0, gt=0)

    @abstractmethod
    def measure(self, model: nn.Module, clean: CleanSet, seed: int) -> Mapping[str, Tensor]:
        """Measure what is high in channels that carry a backdoor.

        Args:
            model: The network; it is not changed.
            clean: The images to measure on.
            seed: Decides everything random.

        Returns:
            By parameter name one value per unit of :class:`~untrojan.mask.Mask`, float `(units,)`; layers that cannot
            be measured are missing, and their units get the score 0.
        """

    def score(self, model: nn.Module, clean: CleanSet, seed: int, detail: str = "") -> Mask:
        """Score every unit by minus the z-value of its measure among those of its layer."""
        ones = Mask.ones(model, self.unit)
        measured = self.measure(model, clean, seed)
        return Mask(
            {
                name: -_standardized(measured[name]) if name in measured else torch.zeros_like(one)
                for name, one in ones.values.items()
            },
            self.unit,
        )

    def _level(self) -> float:
        return -self.threshold


def _standardized(values: Tensor) -> Tensor:
    """The z-values, with the unbiased deviation; all 0 where the values are alike or not finite."""
    if len(values) < 2:
        return torch.zeros_like(values)
    exact = values.double()
    return ((exact - exact.mean()) / exact.std()).nan_to_num(0.0).float()
