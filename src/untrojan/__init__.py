"""Find and remove backdoors in image classifiers that somebody else trained, from a handful of clean images.

::

    clean = untrojan.CleanSet.load("clean.parquet", samples=500)
    model = untrojan.load("model.safetensors", net="resnet18:classes=10")
    repair = untrojan.repair(model, clean)
    repair.save("runs/mine")
"""

import importlib
from typing import TYPE_CHECKING, TypeVar

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
    from untrojan.defenses.anp import ANP
    from untrojan.defenses.auto import Auto
    from untrojan.defenses.awm import AWM
    from untrojan.defenses.bnp import BNP
    from untrojan.defenses.clp import CLP
    from untrojan.defenses.defense import Defense, Repair
    from untrojan.defenses.fine_pruning import FinePruning
    from untrojan.defenses.fine_tuning import FineTuning
    from untrojan.defenses.fmp import FMP
    from untrojan.defenses.ft_sam import FTSAM
    from untrojan.defenses.ibau import IBAU
    from untrojan.defenses.nad import NAD
    from untrojan.defenses.neural_cleanse import NeuralCleanse
    from untrojan.defenses.nft import NFT
    from untrojan.defenses.npd import NPD
    from untrojan.defenses.rnp import RNP
    from untrojan.defenses.sau import SAU
    from untrojan.defenses.tsbd import TSBD
    from untrojan.defenses.ulrl import ULRL
    from untrojan.lab.evaluate import Scores, evaluate
    from untrojan.model import Normalize, check
    from untrojan.record import Diagnosis, Record, ScanRecord
    from untrojan.scanners.neural_cleanse import NeuralCleanseScanner
    from untrojan.scanners.samples import Screening, screen
    from untrojan.scanners.scanner import Scanner
    from untrojan.scanners.triggers import TriggerScanner
    from untrojan.scanners.unlearning import UnlearningScanner
    from untrojan.sources import load

T = TypeVar("T")

__version__ = "0.1.0"

_HOMES = {
    "ANP": "untrojan.defenses.anp",
    "AWM": "untrojan.defenses.awm",
    "Auto": "untrojan.defenses.auto",
    "BNP": "untrojan.defenses.bnp",
    "CLP": "untrojan.defenses.clp",
    "CleanSet": "untrojan.data",
    "Defense": "untrojan.defenses.defense",
    "Diagnosis": "untrojan.record",
    "FMP": "untrojan.defenses.fmp",
    "FTSAM": "untrojan.defenses.ft_sam",
    "FinePruning": "untrojan.defenses.fine_pruning",
    "FineTuning": "untrojan.defenses.fine_tuning",
    "IBAU": "untrojan.defenses.ibau",
    "NAD": "untrojan.defenses.nad",
    "NFT": "untrojan.defenses.nft",
    "NPD": "untrojan.defenses.npd",
    "NeuralCleanse": "untrojan.defenses.neural_cleanse",
    "NeuralCleanseScanner": "untrojan.scanners.neural_cleanse",
    "Normalize": "untrojan.model",
    "RNP": "untrojan.defenses.rnp",
    "Record": "untrojan.record",
    "Repair": "untrojan.defenses.defense",
    "SAU": "untrojan.defenses.sau",
    "ScanRecord": "untrojan.record",
    "Scores": "untrojan.lab.evaluate",
    "Screening": "untrojan.scanners.samples",
    "TSBD": "untrojan.defenses.tsbd",
    "TriggerScanner": "untrojan.scanners.triggers",
    "ULRL": "untrojan.defenses.ulrl",
    "UnlearningScanner": "untrojan.scanners.unlearning",
    "check": "untrojan.model",
    "evaluate": "untrojan.lab.evaluate",
    "load": "untrojan.sources",
    "screen": "untrojan.scanners.samples",
}

__all__ = [
    "ANP",
    "AWM",
    "Auto",
    "BNP",
    "CLP",
    "CleanSet",
    "ConfigError",
    "DataError",
    "Defense",
    "Diagnosis",
    "FMP",
    "FTSAM",
    "FinePruning",
    "FineTuning",
    "IBAU",
    "ModelError",
    "NAD",
    "NFT",
    "NPD",
    "NeuralCleanse",
    "NeuralCleanseScanner",
    "NoEffectWarning",
    "Normalize",
    "RNP",
    "Record",
    "RecordError",
    "Repair",
    "SAU",
    "ScanRecord",
    "Scores",
    "Screening",
    "TSBD",
    "TriggerScanner",
    "ULRL",
    "UnlearningScanner",
    "UnreliableWarning",
    "UnsafeFileError",
    "UntrojanError",
    "UntrojanWarning",
    "check",
    "evaluate",
    "load",
    "repair",
    "scan",
    "screen",
]


def repair(
    model: "nn.Module",
    clean: "CleanSet",
    *,
    method: "Defense | None" = None,
    diagnosis: "Diagnosis | None" = None,
    seed: int = 0,
) -> "Repair":
    """Repair a model.

    Args:
        model: Any network from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; it is not changed.
        clean: Clean images with their true labels, at least one of each class.
        method: How; by default :class:`untrojan.Auto`.
        diagnosis: What a scan found; without it the method looks for itself.
        seed: Same seed, same repair, on a GPU up to rounding.

    Returns:
        The repaired model with its record.

    Raises:
        ModelError: The model cannot be used.
        DataError: The images do not fit the model.
        ConfigError: `method` is no defense, or the seed is negative.

    Example:
        >>> import torch, untrojan
        >>> from untrojan.sources.nets import build
        >>> clean = untrojan.CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> method = untrojan.RNP(select="count", count=2, unlearn_epochs=1, recover_epochs=1)
        >>> suspicion = untrojan.Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> untrojan.repair(build("digits-cnn"), clean, method=method, diagnosis=suspicion).record.units_changed
        2
    """
    from untrojan.defenses.auto import Auto
    from untrojan.defenses.defense import Defense

    return _chosen(method, Defense, Auto).repair(model, clean, diagnosis, seed)


def scan(model: "nn.Module", clean: "CleanSet", *, method: "Scanner | None" = None, seed: int = 0) -> "ScanRecord":
    """Scan a model for a backdoor.

    Args:
        model: Any network from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; it is not changed.
        clean: Clean images with their true labels, at least one of each class.
        method: How; by default :class:`untrojan.TriggerScanner`.
        seed: Same seed, same verdict, on a GPU up to rounding.

    Returns:
        The record: its `diagnosis` has the verdict, the suspected labels and the evidence; `save` writes a report.

    Raises:
        ModelError: The model cannot be used.
        DataError: The images do not fit the model.
        ConfigError: `method` is no scanner, or the seed is negative.

    Example:
        >>> import torch, untrojan
        >>> from untrojan.sources.nets import build
        >>> clean = untrojan.CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> method = untrojan.UnlearningScanner(runs=1, unlearn_epochs=1)
        >>> untrojan.scan(build("digits-cnn"), clean, method=method).method.name
        'unlearning'
    """
    from untrojan.scanners.scanner import Scanner
    from untrojan.scanners.triggers import TriggerScanner

    return _chosen(method, Scanner, TriggerScanner).examine(model, clean, seed)


def _chosen(method: T | None, base: type[T], default: type[T]) -> T:
    if method is None:
        return default()
    if not isinstance(method, base):
        raise ConfigError(
            f"expected a {base.__name__} as method, such as untrojan.{default.__name__}(), got {method!r}"
        )
    return method


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'untrojan' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
