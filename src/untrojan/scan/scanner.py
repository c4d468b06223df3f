"""The base of every scanner."""

import copy
from abc import ABC, abstractmethod
from typing import ClassVar, final

from torch import nn

from untrojan.data import CleanSet
from untrojan.model import require, seeded
from untrojan.record import Diagnosis


class Scanner(ABC):
    """Examines a model with clean images alone. A subclass is a frozen dataclass and writes `_scan`."""

    name: ClassVar[str]

    @final
    def scan(self, model: nn.Module, clean: CleanSet, seed: int = 0) -> Diagnosis:
        """Examine a model.

        Args:
            model: Any network from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; it is not changed.
            clean: Clean images with their true labels, at least one of each class.
            seed: Same seed, same diagnosis; the caller's random state is left alone.

        Returns:
            The verdict with the suspected targets, best first, and the evidence.

        Raises:
            ModelError: The model cannot be used.
            DataError: The images do not fit the model.
        """
        with seeded(seed):
            require(copy.deepcopy(model), clean)
            return self._scan(copy.deepcopy(model), clean, seed)

    @abstractmethod
    def _scan(self, model: nn.Module, clean: CleanSet, seed: int) -> Diagnosis:
        """Examine a copy of the model, with the random state seeded."""
