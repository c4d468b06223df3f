"""The base of every detector of poisoned samples."""

from abc import ABC, abstractmethod
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.device import device_of, running_on
from untrojan.errors import DataError, ModelError
from untrojan.model import copied, require
from untrojan.randomness import seeded
from untrojan.record import Diagnosis
from untrojan.scanners.suspects import Suspects


class Detector(ABC):
    """Tells how suspicious each sample of a training set is. A subclass is a frozen dataclass and writes `_score`."""

    name: ClassVar[str]

    @final
    def score(
        self, model: nn.Module, clean: CleanSet, suspects: Suspects, diagnosis: Diagnosis, seed: int = 0
    ) -> Tensor:
        """Score every sample.

        Args:
            model: The network that was trained on the samples, from images `(N, C, H, W)` in [0, 1] to logits
                `(N, K)`; it is not changed.
            clean: Clean images with their true labels, at least one of each class.
            suspects: The samples, with the labels that the training set gives them.
            diagnosis: What a scan of the model found.
            seed: Same seed, same scores; the caller's random state is left alone.

        Returns:
            Finite float `(N,)` on the CPU, the more suspicious the higher. Scores of different detectors are on
            different scales.

        Raises:
            ModelError: The model cannot be used, or a score is NaN or infinite.
            DataError: The clean images or the samples do not fit the model.
            ConfigError: The seed is negative.
        """
        with running_on(device_of(model)), seeded(seed):
            clean = clean.to(device_of(model))
            require_fit(model, clean, suspects)
            frozen = copied(model).eval().requires_grad_(False)
            scores = self._score(frozen, clean, suspects, diagnosis, seed).float().cpu()
        if scores.shape != suspects.labels.shape:
            raise ModelError(f"{self.name}: expected {len(suspects)} scores, got a tensor {tuple(scores.shape)}")
        if not torch.isfinite(scores).all():
            raise ModelError(f"{self.name}: the model gives NaN or infinity on the samples")
        return scores

    @abstractmethod
    def _score(self, model: nn.Module, clean: CleanSet, suspects: Suspects, diagnosis: Diagnosis, seed: int) -> Tensor:
        """Score every sample with a copy of the model that may be changed, the random state seeded."""


def require_fit(model: nn.Module, clean: CleanSet, suspects: Suspects) -> int:
    """Raise unless the clean images fit the model, and the samples fit both; give the model's number of classes."""
    require(copied(model), clean)
    if suspects.shape != clean.shape:
        sizes = ["x".join(map(str, shape)) for shape in (clean.shape, suspects.shape)]
        raise DataError(
            f"expected samples of the size of the clean images, {sizes[0]}, got {sizes[1]} "
            "(channels x height x width); resize or convert them first"
        )
    if clean.class_names and suspects.class_names and clean.class_names != suspects.class_names:
        raise DataError(
            "the clean images and the samples name their classes differently; expected one order of classes"
        )
    highest = int(suspects.labels.max())
    classes = int(clean.labels.max()) + 1  # require found at least one clean image of each class of the model
    if highest >= classes:
        raise DataError(
            f"labels of the samples go up to {highest}, but the model has {classes} classes, 0 to {classes - 1}; "
            "labels count from 0"
        )
    return classes
