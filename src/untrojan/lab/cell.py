"""The record of one cell of a grid."""

import re
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from untrojan.errors import RecordError, utf8
from untrojan.lab.attack import Target
from untrojan.lab.evaluate import Scores
from untrojan.lab.grid import Cell
from untrojan.record import AnyRecord, Check, CleanInfo, Status, Verdict
from untrojan.registry import spec


class Flag(BaseModel):
    """A reason not to rely on a result: the name of the rule, and what it saw."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    detail: str


class Outcome(BaseModel):
    """What a defense made of a model, and what the known trigger says about it.

    Attributes:
        verdict: Of the scan.
        suspect: The label that the scan put first.
        status: What the defense says of its own result.
        reason: Why, in a sentence.
        checks: What the result had to satisfy.
        units_changed: How many units were pruned, of `units_total`.
        units_total: How many units the method scored.
        values_changed: How many elements of the state dict differ.
        before: Scores of the model as it came.
        after: Scores of the repaired model, with DER.
        clean: The clean images.
        test: The test images.
        clean_in_test: How many of the clean images are test images too, pixel for pixel.
        stages: Seconds of each stage of the repair.
        repair_seconds: Seconds of the repair with its checks, without the scan.
        measure_seconds: Seconds of measuring ACC, ASR and RA.
        scan_seconds: Seconds of the scan, which other cells share.
        total_seconds: Seconds of the whole cell, reading files and measuring included, without the scan.
        peak_memory_bytes: Of the process, from the start of the cell to the end of the repair.
        environment: Versions and hardware.
        warnings: What the defense warned of.
        flags: Reasons not to rely on the result; see :mod:`untrojan.lab.flags`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    verdict: Verdict
    suspect: int | None
    status: Status
    reason: str
    checks: list[Check]
    units_changed: int
    units_total: int
    values_changed: int
    before: Scores
    after: Scores
    clean: CleanInfo
    test: CleanInfo
    clean_in_test: int
    stages: dict[str, float]
    repair_seconds: float
    measure_seconds: float
    scan_seconds: float
    total_seconds: float
    peak_memory_bytes: int
    environment: dict[str, str]
    warnings: list[str]
    flags: list[Flag] = Field(default_factory=list)


class CellRecord(AnyRecord):
    """One cell of a grid: what was asked, and what came out.

    Attributes:
        key: Hash of `inputs`.
        scan: Key of the scan that the cell used.
        setup: Hash of the inputs without defense and seed.
        inputs: All that decides the result.
        model: What the grid calls the model.
        attack: The attack that was planted in it, if any.
        target: What the attacker wants.
        method: The defense by its registered name.
        defense: The same with the fields that differ from its defaults.
        setting: How many clean images there were, in words.
        seed: The seed.
        outcome: What came out, or `None` where the cell failed.
        error: The traceback of a cell that failed.
    """

    kind: Literal["cell"] = "cell"  # pyright: ignore[reportIncompatibleVariableOverride]
    key: str
    scan: str
    setup: str
    inputs: dict[str, Any]
    model: str
    attack: str | None
    target: Target | None
    method: str
    defense: str
    setting: str
    seed: int
    outcome: Outcome | None = None
    error: str | None = None

    @classmethod
    def of(cls, cell: Cell, outcome: Outcome | None = None, error: str | None = None) -> Self:
        """Build the record of a cell that ended with an outcome, or with an error.

        Raises:
            RecordError: Both or neither were given.
        """
        if (outcome is None) == (error is None):
            raise RecordError("expected an outcome or an error of a cell, got both or neither")
        return cls(
            key=cell.key,
            scan=cell.scan_key,
            setup=cell.setup,
            inputs=cell.inputs,
            model=cell.model,
            attack=spec(cell.attack) if cell.attack else None,
            target=cell.case.target,
            method=cell.method.name,
            defense=spec(cell.method),
            setting=str(cell.setting),
            seed=cell.seed,
            outcome=outcome,
            error=None if error is None else utf8(error),
        )

    @property
    def why(self) -> str:
        """Why the cell failed: the last line of the traceback that names an error, or else the last."""
        lines = (self.error or "").strip().split("\n")
        return next((line for line in reversed(lines) if re.match(r"[\w.]+(Error|Exception|Exit)\b", line)), lines[-1])

    def to_json(self) -> str:
        """The record as JSON in one line, for there are many."""
        return self.model_dump_json() + "\n"
