"""Find and remove backdoors in image classifiers that somebody else trained, from a handful of clean images.

::

    clean = untrojan.CleanSet.load("clean.parquet", samples=500)
    model = untrojan.load("model.safetensors", net="resnet18:classes=10")
    repair = untrojan.repair(model, clean, method=untrojan.RNP())
    repair.save("runs/mine")
"""

import importlib
from typing import TYPE_CHECKING

from untrojan.errors import (
    ConfigError,
    DataError,
    ModelError,
    NoEffectWarning,
    RecordError,
    UnreliableWarning,
    UnsafeFileError,
    UntrojanError,
    UntrojanWarning,
)

if TYPE_CHECKING:
    from torch import nn

    from untrojan.data import CleanSet
    from untrojan.defenses.defense import Defense, Repair
    from untrojan.defenses.rnp import RNP
    from untrojan.lab.evaluate import Scores, evaluate
    from untrojan.model import Normalize, check
    from untrojan.record import Diagnosis, Record
    from untrojan.scan.unlearning import UnlearningScanner
    from untrojan.sources import load

__version__ = "0.1.0"

_HOMES = {
    "CleanSet": "untrojan.data",
    "Defense": "untrojan.defenses.defense",
    "Diagnosis": "untrojan.record",
    "Normalize": "untrojan.model",
    "RNP": "untrojan.defenses.rnp",
    "Record": "untrojan.record",
    "Repair": "untrojan.defenses.defense",
    "Scores": "untrojan.lab.evaluate",
    "UnlearningScanner": "untrojan.scan.unlearning",
    "check": "untrojan.model",
    "evaluate": "untrojan.lab.evaluate",
    "load": "untrojan.sources",
}

__all__ = [
    "CleanSet",
    "ConfigError",
    "DataError",
    "Defense",
    "Diagnosis",
    "ModelError",
    "NoEffectWarning",
    "Normalize",
    "RNP",
    "Record",
    "RecordError",
    "Repair",
    "Scores",
    "UnlearningScanner",
    "UnreliableWarning",
    "UnsafeFileError",
    "UntrojanError",
    "UntrojanWarning",
    "check",
    "evaluate",
    "load",
    "repair",
]


def repair(
    model: "nn.Module",
    clean: "CleanSet",
    *,
    method: "Defense",
    diagnosis: "Diagnosis | None" = None,
    seed: int = 0,
) -> "Repair":
    """Repair a model with a method.

    Args:
        model: Any network from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; it is not changed.
        clean: Clean images with their true labels, at least one of each class.
        method: How; for example :class:`untrojan.RNP`.
        diagnosis: What a scan found; without it the method looks for itself.
        seed: Same seed, same repair.

    Returns:
        The repaired model with its record.

    Raises:
        ModelError: The model cannot be used.
        DataError: The images do not fit the model.

    Example:
        >>> import torch, untrojan
        >>> from untrojan.sources.nets import build
        >>> clean = untrojan.CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> method = untrojan.RNP(select="count", count=2, unlearn_epochs=1, recover_epochs=1)
        >>> untrojan.repair(build("digits-cnn"), clean, method=method).record.units_changed
        2
    """
    return method.repair(model, clean, diagnosis, seed)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'untrojan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
