"""Which samples of a training set are poisoned: every sample with its scores and its rank."""

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.device import device_of, running_on
from untrojan.errors import ConfigError, ModelError
from untrojan.model import copied, require_kinds
from untrojan.progress import timing
from untrojan.randomness import seeded
from untrojan.record import CleanInfo, Diagnosis, MethodInfo, RunRecord
from untrojan.registry import describe, require_kind
from untrojan.run import clean_info, collected, environment, model_info, peak_memory, tensors_of
from untrojan.scanners.detectors.detector import Detector, require_fit
from untrojan.scanners.detectors.unlearned import Unlearned
from untrojan.scanners.suspects import Suspects
from untrojan.scanners.triggers import TriggerScanner
from untrojan.sources.files import Checkpoint
from untrojan.writing import RECORD, REPORT, staged, write_atomic

if TYPE_CHECKING:
    import pyarrow

SCORES = "scores.parquet"
SHOWN = 60
BATCH = 128


class Sample(BaseModel, extra="forbid", frozen=True):
    """A suspicious sample: its row, the label it has, what the model says, and its scores by detector."""

    index: int
    label: int
    predicted: int
    scores: dict[str, float]


class ScreeningRecord(RunRecord):
    """Everything about one screening but the scores of all samples, which are in the table beside it.

    `method` is the detector that ranks, `others` only score. `top` holds the most suspicious samples, best first.
    `disagreeing` counts the samples to which the model gives another label than they have. The hash in `suspects` is
    that of the float32 images and the labels in turn, in batches of 128.
    """

    kind: Literal["screening"] = "screening"  # pyright: ignore[reportIncompatibleVariableOverride]
    others: list[MethodInfo]
    suspects: CleanInfo
    disagreeing: int
    top: list[Sample]

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in label order, by the clean images or else by the samples."""
        return super().class_names or self.suspects.class_names or []


@dataclasses.dataclass(frozen=True, eq=False)
class Screening:
    """The scores of all samples, and the record of how they came about.

    Attributes:
        scores: By detector, float `(N,)`, the more suspicious the higher.
        ranks: By the first detector, from 1 for the most suspicious, int64 `(N,)`; of equal scores the earlier sample
            is first.
        predicted: The model's label of each sample, int64 `(N,)`.
        suspects: The samples.
        record: Everything else.
    """

    scores: dict[str, Tensor] = dataclasses.field(repr=False)
    ranks: Tensor = dataclasses.field(repr=False)
    predicted: Tensor = dataclasses.field(repr=False)
    suspects: Suspects
    record: ScreeningRecord = dataclasses.field(repr=False)

    def table(self) -> "pyarrow.Table":
        """Every sample in its order: `index`, `label`, `predicted`, one column per detector, and `rank`."""
        import pyarrow

        columns = {
            "index": torch.arange(len(self.ranks)),
            "label": self.suspects.labels,
            "predicted": self.predicted,
            **self.scores,
            "rank": self.ranks,
        }
        return pyarrow.table({name: column.cpu().numpy() for name, column in columns.items()})

    def report(self, path: str | Path) -> None:
        """Write the most suspicious images as one HTML page that needs no network."""
        from untrojan.report.screening import render

        images = self.suspects.take(torch.tensor([sample.index for sample in self.record.top])).images
        write_atomic(Path(path), render(self.record, images).encode())

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Write `scores.parquet`, `report.html` and `record.json`; the folder appears whole.

        Args:
            folder: Where to; made if it is not there.
            force: Replace these three files when the folder holds something already.

        Raises:
            ConfigError: The folder is not empty and `force` is not set.
            OSError: It cannot be written.
        """
        from pyarrow import parquet

        with staged(folder, force) as made:
            parquet.write_table(self.table(), made / SCORES)
            self.report(made / REPORT)
            write_atomic(made / RECORD, self.record.to_json().encode())


def screen(
    model: nn.Module,
    clean: CleanSet,
    suspects: Any,
    *,
    detectors: Sequence[Detector] = (Unlearned(),),
    diagnosis: Diagnosis | None = None,
    seed: int = 0,
    shown: int = SHOWN,
    source: Checkpoint | None = None,
) -> Screening:
    """Score the samples of a training set by how likely they are poisoned, and rank them.

    Args:
        model: The network that was trained on them, from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`; it is not
            changed.
        clean: Clean images with their true labels, at least one of each class.
        suspects: The training set with its labels: a path or Hub id, whose images are then decoded a chunk at a time,
            or what :meth:`untrojan.CleanSet.of` takes.
        detectors: How to score, each name once; the first one ranks.
        diagnosis: What a scan found; without it the model is scanned first.
        seed: Same seed, same screening; the caller's random state is left alone.
        shown: How many of the most suspicious samples go into the record and onto the page.
        source: The file the model came from, for the record.

    Returns:
        The scores. They only rank samples: whether there is a backdoor at all is what the diagnosis says.

    Raises:
        ModelError: The model cannot be used.
        DataError: The clean images or the samples do not fit the model, or cannot be read.
        ConfigError: There is no detector, one twice or something else, or the seed is negative.

    Example:
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> how = {"detectors": [Unlearned(unlearn_epochs=1)], "diagnosis": suspicion}
        >>> screening = screen(build("digits-cnn"), clean, clean, **how)
        >>> screening.table().column_names
        ['index', 'label', 'predicted', 'unlearned', 'rank']
    """
    require_kinds(model, clean)
    for detector in detectors:
        require_kind(detector, Detector)
    names = [detector.name for detector in detectors]
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"expected at least one detector, and each once, got {', '.join(names) or 'none'}")
    if shown < 1:
        raise ConfigError(f"expected at least 1 sample to show, got {shown}")
    with collected() as caught, timing() as seconds, running_on(device_of(model)), seeded(seed):
        samples = Suspects.of(suspects)
        classes = require_fit(model, clean, samples)
        predicted, sha256 = _look(copied(model).eval(), samples)
        diagnosis = diagnosis or TriggerScanner().scan(model, clean, seed)
        scores = {each.name: each.score(model, clean, samples, diagnosis, seed) for each in detectors}
    first, *others = [MethodInfo(name=each.name, fields=describe(each)) for each in detectors]
    order = scores[first.name].argsort(descending=True, stable=True)
    record = ScreeningRecord(
        method=first,
        others=others,
        seed=seed,
        model=model_info(model, tensors_of(model, source), classes, source),
        clean=clean_info(clean, classes),
        suspects=_info(samples, sha256, classes),
        diagnosis=diagnosis,
        disagreeing=int((predicted != samples.labels).sum()),
        top=[
            Sample(
                index=index,
                label=int(samples.labels[index]),
                predicted=int(predicted[index]),
                scores={name: float(each[index]) for name, each in scores.items()},
            )
            for index in order[:shown].tolist()
        ],
        seconds=seconds,
        peak_memory_bytes=peak_memory(device_of(model)),
        environment=environment(device_of(model)),
        warnings=caught,
    )
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(1, len(order) + 1)
    return Screening(scores, ranks, predicted, samples, record)


def _look(model: nn.Module, samples: Suspects) -> tuple[Tensor, str]:
    """Read all samples once: what the model says of each, and the hash of them."""
    digest = hashlib.sha256()

    def predict(images: Tensor, labels: Tensor) -> Tensor:
        digest.update(images.cpu().numpy().data)
        digest.update(labels.cpu().numpy().data)
        logits = model(images)
        if not torch.isfinite(logits).all():
            raise ModelError("expected finite logits for the samples, got NaN or infinity")
        return logits.argmax(1)

    with torch.no_grad():
        return samples.map(predict, BATCH, "predict").cpu(), digest.hexdigest()


def _info(samples: Suspects, sha256: str, classes: int) -> CleanInfo:
    return CleanInfo(
        path=samples.path,
        sha256=sha256,
        images=len(samples),
        shape=samples.shape,
        per_class=torch.bincount(samples.labels, minlength=classes).tolist(),
        class_names=list(samples.class_names) if samples.class_names else None,
    )
