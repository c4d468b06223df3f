"""The record: one versioned JSON that says what was asked, what was chosen by which rule, and what came out.

Reports, tables and leaderboards are pure functions of records. Fractions are in [0, 1], sizes in bytes, times
in seconds.
"""

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from untrojan.errors import RecordError, labelled
from untrojan.writing import RECORD, REPORT, SARIF, staged, write_atomic

SCHEMA_VERSION = 1
EXPLAINED = "explained in the description of the method"
Verdict = Literal["found", "not_found", "inconclusive"]
ChangeKind = Literal["perturbation", "warp", "recoloring"]
TriggerKind = Literal["patch"] | ChangeKind
Status = Literal["repaired", "nothing_to_repair", "inconclusive", "failed"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Versioned(BaseModel):
    schema_version: int = 1


class Rate(_Part):
    """A share of `count` out of `total` with its 95 % Wilson interval; all `None` where `total` is 0.

    Example:
        >>> Rate.of(9, 10).value
        0.9
        >>> Rate.of(0, 0).value is None
        True
    """

    count: int
    total: int
    value: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, count: int, total: int) -> Self:
        """Build from whole numbers, 0 ≤ count ≤ total."""
        if total == 0:
            return cls(count=0, total=0, value=None, low=None, high=None)
        z = 1.959963984540054
        share = count / total
        center = (share + z * z / (2 * total)) / (1 + z * z / total)
        half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
        low, high = max(0.0, center - half), min(1.0, center + half)
        return cls(count=count, total=total, value=share, low=min(low, share), high=max(high, share))


class MethodInfo(_Part):
    """The method that ran: its name and every field, defaults included."""

    name: str
    fields: dict[str, Any]


class ModelInfo(_Part):
    """The network that came in, or went out.

    `sha256` is that of the file, `state_sha256` that of the tensors alone (names, types, shapes, values), so that
    the same weights are recognised in another container.
    """

    path: str | None = None
    sha256: str | None = None
    state_sha256: str
    net: str | None = None
    architecture: str
    parameters: int
    classes: int | None


class CleanInfo(_Part):
    """The clean images: where they came from and how many of each class, in label order."""

    path: str | None = None
    sha256: str
    images: int
    shape: tuple[int, int, int]
    per_class: list[int]
    class_names: list[str] | None = None


class Target(_Part):
    """A suspected target label and its score: the higher, the more suspicious.

    Where the evidence is unlearning runs, the score is the label's mean share of predictions at their ends, and how far
    triggers reach is added where that is known. Where it is masks, it is how many robust standard deviations the size
    of the label's mask lies below the median.
    """

    label: int
    score: float


class UnlearningPoint(_Part):
    """The network after one epoch of unlearning: its accuracy, and the share of predictions of each class."""

    epoch: int
    accuracy: float
    shares: list[float]


class UnlearningRun(_Part):
    """One unlearning run on its own seed and images; `view` is how they were shown.

    `reached` tells whether it came down to the floor, `label` which class had most predictions at its end.
    """

    seed: int
    view: str = "plain"
    images: int
    reached: bool
    label: int
    share: float
    trace: list[UnlearningPoint]


class Patch(_Part):
    """The smallest patch found that sends images of other classes to `label`.

    `size` is the l1 norm of its mask, in pixels; `success` the share of the other classes' images that it sends there;
    `index` how many robust standard deviations the size lies above the median, `None` where the search for it did not
    succeed; `too_small` whether the rule takes it for a trigger. `picture` is then a PNG in base64, the pattern with
    the mask as its opacity.
    """

    label: int
    size: float
    success: float
    index: float | None
    too_small: bool
    picture: str | None = None


class Reach(_Part):
    """How far small triggers reach into `label`, on images that the search for them did not see.

    Of the images that the model gives another label, the best patch of full opacity and at most `sizes[i]` pixels sends
    the share `shares[i]` there, and a perturbation of all pixels with the l2 norm `norm` sends `faint`. `far` says that
    in one number, and what slight warps do where they were searched: 1 or more is too far. Patches count as they are,
    perturbations and warps by how many fewer images they send to any other label, too.
    """

    label: int
    sizes: list[int]
    shares: list[float]
    norm: float
    faint: float
    far: float

    @property
    def mean(self) -> float:
        """The mean share of patches over the sizes."""
        return statistics.fmean(self.shares)


class Trigger(_Part):
    """What was recovered for `label`, a patch of full opacity or a change of the whole image; `what` says it in words.

    Where `label` is `None`, the backdoor is all-to-all: it sends images of each class to `targets[class]`, the class
    itself where it has no target. Else `targets` is empty. `success` is the share of images of another label than that
    which it sends there, on images that the search did not see. `picture` is a PNG in base64: a patch, transparent
    where images stay as they are; a perturbation, amplified around gray; a chessboard, warped; ramps of each channel
    and white, recolored. `examples` shows some clean images above the same with the trigger.
    """

    label: int | None
    kind: TriggerKind
    what: str
    success: Rate
    picture: str
    examples: str
    targets: list[int] = Field(default_factory=list)


class Comparison(_Part):
    """Share of images that the best change of a kind sends to `label`, and the most that any other label tried got."""

    label: int
    kind: ChangeKind
    share: float
    elsewhere: float

    @property
    def further(self) -> float:
        """How much further the label is reached than the others."""
        return self.share - self.elsewhere


class Calibration(_Part):
    """What the score of the scan means, by models that are known to be clean.

    The score of a model is that of the label which is reached furthest, in multiples of what is too far. `as_high`
    counts the clean models that score as high as this one, `false_alarms` those that are called `found`; both are of 0
    models where none was scanned with these settings.
    """

    score: float
    as_high: Rate
    false_alarms: Rate


class Diagnosis(_Part):
    """What the scan found: the verdict, the rule behind it, targets best first, and the evidence.

    The evidence is unlearning `runs`, Neural Cleanse's `patches`, or how far small triggers and whole-image changes
    reach and the `triggers` recovered, as the scanner has it. `accuracy` is that of the model on the clean images,
    where it was measured; `overruled` is the verdict of the evidence, where the accuracy left none.
    """

    verdict: Verdict
    rule: str
    targets: list[Target]
    runs: list[UnlearningRun]
    patches: list[Patch] = Field(default_factory=list)
    reaches: list[Reach] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    triggers: list[Trigger] = Field(default_factory=list)
    calibration: Calibration | None = None
    accuracy: Rate | None = None
    overruled: Verdict | None = None

    @property
    def cleared(self) -> bool:
        """Whether the evidence is against no label, be the accuracy what it may."""
        return "not_found" in (self.verdict, self.overruled)

    @property
    def found(self) -> list[int]:
        """The labels found: those with a trigger or a patch that is too small, or else the first."""
        if self.verdict != "found" or self.all_to_all:
            return []
        shown = {each.label for each in self.triggers} | {each.label for each in self.patches if each.too_small}
        labels = [target.label for target in self.targets]
        return [label for label in labels if label in shown] or labels[:1]

    @property
    def all_to_all(self) -> bool:
        """Whether the trigger found has no single target, but one for each class."""
        return any(each.label is None for each in self.triggers)

    @property
    def suspect(self) -> int | None:
        """The label that the scan puts first, unless it cleared the model, told no labels apart, or all are targets."""
        if self.cleared or self.all_to_all or not self.targets:
            return None
        return self.targets[0].label

    @property
    def suspects(self) -> list[int]:
        """The labels found, or else the one that the scan puts first."""
        return self.found or ([] if self.suspect is None else [self.suspect])


class CurvePoint(_Part):
    """One point of the pruning curve: what it costs to prune `pruned` units, the highest score among them `threshold`.

    `accuracy` is hold-out accuracy, cross-fitted where the rule is the budget; `drop` is the paired loss against
    the original on the same images, with its 95 % interval. `surrogate` is the share of the images that recovered
    triggers still send where they lead, where the rule asked for that.
    """

    threshold: float
    pruned: int
    accuracy: float
    drop: float
    drop_low: float
    drop_high: float
    surrogate: float | None = None


class Selection(_Part):
    """How much was pruned, by which rule, and what else could have been chosen.

    `chosen` is the index into `curve`, or `None` when no point was acceptable; `scores` says what is pruned by.
    """

    rule: str
    scores: str = EXPLAINED
    chosen: int | None
    curve: list[CurvePoint]


class Check(_Part):
    """One thing that a repaired model must satisfy before it is called repaired."""

    name: str
    passed: bool
    detail: str


class Layer(_Part):
    """The scores of one layer: its name, the score of every unit in order, and which units were changed."""

    name: str
    values: list[float]
    changed: list[int]


class Accuracy(_Part):
    """Accuracy on clean images; `held_out` tells whether nothing was fitted on them."""

    accuracy: Rate
    held_out: bool = True


class AnyRecord(_Part):
    """What every record has: its kind, and the version of the schema that it is written in."""

    schema_version: int = SCHEMA_VERSION
    kind: str

    def to_json(self) -> str:
        """The record as indented JSON in printable ASCII, with a newline at the end."""
        text = self.model_dump_json(indent=2)
        return re.sub(r"[^ -~\n]", lambda found: json.dumps(found[0])[1:-1], text) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record back.

        Raises:
            RecordError: The file is missing, is not a record of this kind, or was written by a newer untrojan.
        """
        try:
            data = Path(path).read_bytes()
            version = _Versioned.model_validate_json(data).schema_version
            if version > SCHEMA_VERSION:
                raise RecordError(
                    f"{path} was written by a newer untrojan: expected schema {SCHEMA_VERSION} or older, "
                    f"got {version}; update untrojan to read it"
                )
            return cls.model_validate_json(data)
        except OSError as error:
            raise RecordError(f"cannot read record {path}: {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise RecordError(f"{path} is not a record of schema {SCHEMA_VERSION}: {where}: {first['msg']}") from error


class RunRecord(AnyRecord):
    """What is known about every run of a method on a model, whatever its kind."""

    method: MethodInfo
    seed: int
    model: ModelInfo
    clean: CleanInfo
    diagnosis: Diagnosis
    seconds: dict[str, float]
    peak_memory_bytes: int
    environment: dict[str, str]
    command: str | None = None
    warnings: list[str] = Field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, in label order; none where nobody told."""
        return self.clean.class_names or []

    def label(self, label: int) -> str:
        """A label as a person reads it: its number, and its class name where the record knows one."""
        return labelled(label, self.class_names)


class Record(RunRecord):
    """Everything about one repair: one run of one method on one model.

    `status` is `repaired` when a backdoor was found and a model that passes every check came out, `inconclusive` when
    such a model came out but the scan was not sure, `nothing_to_repair` when no backdoor was found and the model is
    unchanged, and `failed` when the method could not deliver; `reason` says why in a sentence.
    `choices` holds what the method chose by itself, such as how many filters, by name.
    `units_changed` counts pruned units, of `units_total` that the method scored; `values_changed` counts the elements
    of the state dict that differ.
    """

    kind: Literal["repair"] = "repair"  # pyright: ignore[reportIncompatibleVariableOverride]
    status: Status
    reason: str
    choices: dict[str, JsonValue] = Field(default_factory=dict)
    selection: Selection | None
    before: Accuracy
    after: Accuracy
    checks: list[Check]
    units_changed: int
    units_total: int
    values_changed: int
    layers: list[Layer]
    repaired: ModelInfo


class ScanRecord(RunRecord):
    """Everything about one scan of one model; the verdict is in `diagnosis`."""

    kind: Literal["scan"] = "scan"  # pyright: ignore[reportIncompatibleVariableOverride]

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Write `report.html`, `findings.sarif` and `record.json`; the folder appears whole.

        Args:
            folder: Where to; made if it is not there.
            force: Replace these three files when the folder holds something already.

        Raises:
            ConfigError: The folder is not empty and `force` is not set.
            OSError: It cannot be written.
        """
        from untrojan.report import render
        from untrojan.report.sarif import sarif

        with staged(folder, force) as made:
            for name, text in ((REPORT, render(self)), (SARIF, sarif(self)), (RECORD, self.to_json())):
                write_atomic(made / name, text.encode())
