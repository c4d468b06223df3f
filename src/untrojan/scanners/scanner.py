"""The base of every scanner."""

from abc import ABC, abstractmethod
from typing import ClassVar, final

from torch import nn

from untrojan.data import CleanSet
from untrojan.device import device_of, running_on
from untrojan.model import accuracy_of, classes_of, copied, require, require_kinds
from untrojan.progress import timing
from untrojan.randomness import seeded
from untrojan.record import Diagnosis, MethodInfo, ScanRecord
from untrojan.registry import describe
from untrojan.run import clean_info, collected, environment, model_info, peak_memory, tensors_of
from untrojan.sources.files import Checkpoint


class Scanner(ABC):
    """Examines a model with clean images alone.

    A subclass is a :func:`~untrojan.registry.config` and writes `_scan`.
    """

    name: ClassVar[str]

    @final
    def scan(self, model: nn.Module, clean: CleanSet, seed: int = 0) -> Diagnosis:
        """Examine a model.

        Args:
            model: Any network from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; it is not changed.
            clean: Clean images with their true labels, at least one of each class.
            seed: Same seed, same diagnosis, on a GPU up to rounding; the caller's random state is left alone.

        Returns:
            The verdict with the suspected targets, best first, the evidence, and the accuracy on the clean images;
            where :func:`~untrojan.model.accuracy_of` doubts that, the verdict is inconclusive, whatever the evidence.

        Raises:
            ModelError: The model cannot be used.
            DataError: The images do not fit the model.
            ConfigError: The seed is negative.
        """
        require_kinds(model, clean)
        with running_on(device_of(model)), seeded(seed):
            require(copied(model), clean)
            clean = clean.to(device_of(model))
            accuracy, doubt = accuracy_of(copied(model), clean)
            diagnosis = self._scan(copied(model), clean, seed).model_copy(update={"accuracy": accuracy})
            if not doubt:
                return diagnosis
            verdict = diagnosis.verdict
            rule = f"inconclusive, because {doubt}; the evidence alone gives {verdict}, by this rule: {diagnosis.rule}"
            return diagnosis.model_copy(update={"verdict": "inconclusive", "rule": rule, "overruled": verdict})

    @final
    def examine(self, model: nn.Module, clean: CleanSet, seed: int = 0, source: Checkpoint | None = None) -> ScanRecord:
        """Examine a model as :meth:`scan` does, and keep the record.

        Args:
            model: As in :meth:`scan`.
            clean: As in :meth:`scan`.
            seed: As in :meth:`scan`.
            source: The file the model came from, for the record.

        Returns:
            The diagnosis with everything that it stands on.

        Raises:
            ModelError: The model cannot be used.
            DataError: The images do not fit the model.
            ConfigError: The seed is negative.
        """
        with collected() as caught, timing() as seconds, seeded(seed):
            diagnosis = self.scan(model, clean, seed)
            classes = classes_of(copied(model), clean)
        return ScanRecord(
            method=MethodInfo(name=self.name, fields=describe(self)),
            seed=seed,
            model=model_info(model, tensors_of(model, source), classes, source),
            clean=clean_info(clean, classes),
            diagnosis=diagnosis,
            seconds=seconds,
            peak_memory_bytes=peak_memory(device_of(model)),
            environment=environment(device_of(model)),
            warnings=caught,
        )

    @abstractmethod
    def _scan(self, model: nn.Module, clean: CleanSet, seed: int) -> Diagnosis:
        """Examine a copy of the model, with the random state seeded."""
