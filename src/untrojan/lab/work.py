"""What a worker does with one cell of a grid: scan the model, or repair it and measure the result with its trigger.

A worker writes nothing. What cells have in common is kept from one to the next.
"""

import json
import time
import traceback
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from untrojan.data import CleanSet
from untrojan.device import chosen
from untrojan.errors import DataError, ModelError
from untrojan.lab.attack import Attack
from untrojan.lab.cell import CellRecord, Outcome
from untrojan.lab.evaluate import Scores, evaluate
from untrojan.lab.flags import raised
from untrojan.lab.grid import Case, Cell, Setting
from untrojan.readers import fingerprint
from untrojan.record import ScanRecord
from untrojan.registry import identity
from untrojan.run import clean_info, forget_peak_memory
from untrojan.sources import load
from untrojan.sources.files import Checkpoint

_IMAGES_AT_A_TIME = 1000


class Job(NamedTuple):
    """Something to do for a cell: repair with the scan at hand, or make that scan where there is none.

    Attributes:
        cell: The cell.
        scan: The record of the scan, as JSON.
    """

    cell: Cell
    scan: str | None


class Answer(NamedTuple):
    """What a worker sends back: a record as JSON, or the traceback of what went wrong."""

    text: str | None
    error: str | None = None


def work(job: Job) -> Answer:
    """Do a job; whatever goes wrong inside of it is part of the answer."""
    try:
        return Answer(_scan(job.cell) if job.scan is None else _repair(job.cell, job.scan))
    except (Exception, SystemExit):  # a network of the user's own may do anything
        return Answer(None, traceback.format_exc())


def shared_images(clean: CleanSet, test: CleanSet) -> int:
    """Count the clean images that are test images too, pixel for pixel.

    Args:
        clean: The clean images.
        test: The test images.

    Example:
        >>> test = CleanSet(torch.tensor([0, 1, 2], dtype=torch.uint8).view(3, 1, 1, 1), torch.tensor([0, 1, 1]))
        >>> shared_images(test.take([0, 2]), test), shared_images(test, test.take([1]))
        (2, 1)
    """
    seen = set(_octets(test)) if clean.shape == test.shape else set()
    return sum(each in seen for each in _octets(clean))


def _scan(cell: Cell) -> str:
    source, clean = _source(cell), _clean(cell.case.clean, cell.inputs["clean"], cell.setting, cell.seed)
    return cell.scanner.examine(_model(source, cell.case), clean, cell.seed, source).to_json()


def _repair(cell: Cell, scan: str) -> str:
    start = time.perf_counter()
    forget_peak_memory()
    found = ScanRecord.model_validate_json(scan)
    source, clean = _source(cell), _clean(cell.case.clean, cell.inputs["clean"], cell.setting, cell.seed)
    test = _test(cell.case.test, cell.inputs["test"], cell.case.test_images)
    model = _model(source, cell.case)
    begun = time.perf_counter()
    repair = cell.method.repair(model, clean, found.diagnosis, cell.seed, source)
    repaired = time.perf_counter()
    told = repair.record
    known = json.dumps(cell.inputs["attack"])
    before = _before(source, cell.case, cell.attack, known, test)
    after = _measured(repair.model, cell.case, cell.attack, known, test, before)
    measured = time.perf_counter()
    outcome = Outcome(
        verdict=found.diagnosis.verdict,
        suspect=found.diagnosis.suspect,
        status=told.status,
        reason=told.reason,
        checks=told.checks,
        units_changed=told.units_changed,
        units_total=told.units_total,
        values_changed=told.values_changed,
        before=before,
        after=after,
        clean=told.clean,
        test=clean_info(test, len(after.predicted)),
        clean_in_test=_shared(clean, test),
        stages=told.seconds,
        repair_seconds=repaired - begun,
        measure_seconds=measured - repaired,
        scan_seconds=sum(found.seconds.values()),
        total_seconds=time.perf_counter() - start,
        peak_memory_bytes=told.peak_memory_bytes,
        environment=told.environment,
        warnings=told.warnings,
    )
    flags = raised(outcome, cell.attack, cell.case.target)
    return CellRecord.of(cell, outcome.model_copy(update={"flags": flags})).to_json()


def _source(cell: Cell) -> Checkpoint:
    source = _read(cell.case.file, cell.inputs["model"]["sha256"])
    if source.sha256 != cell.inputs["model"]["sha256"]:
        raise ModelError(f"{cell.case.file} has changed since the grid was started; start it again")
    return source


@lru_cache(maxsize=2)
def _read(path: str, sha256: str) -> Checkpoint:
    return Checkpoint.read(path)


def _model(source: Checkpoint, case: Case) -> nn.Module:
    return load(source, case.net, case.mean, case.std).to(chosen())


@lru_cache(maxsize=2)
def _clean(path: str, content: str, setting: Setting, seed: int) -> CleanSet:
    clean = CleanSet.load(path, samples=setting.samples, samples_per_class=setting.samples_per_class, seed=seed)
    _require_unchanged(path, content)
    return clean


@lru_cache(maxsize=2)
def _test(path: str, content: str, images: int | None) -> CleanSet:
    test = CleanSet.load(path)
    _require_unchanged(path, content)
    return test if images is None else test.take(range(min(len(test), images)))


def _require_unchanged(path: str, content: str) -> None:
    """Raise where images are not those of the grid; they were read before, so that no change of them goes unseen."""
    if fingerprint(path) != content:
        raise DataError(f"{path} has changed since the grid was started; start it again")


@lru_cache(maxsize=2)
def _shared(clean: CleanSet, test: CleanSet) -> int:
    return shared_images(clean, test)


@lru_cache(maxsize=2)
def _before(source: Checkpoint, case: Case, attack: Attack | None, known: str, test: CleanSet) -> Scores:
    return _measured(_model(source, case), case, attack, known, test)


def _measured(
    model: nn.Module, case: Case, attack: Attack | None, known: str, test: CleanSet, before: Scores | None = None
) -> Scores:
    """Measure a model, and raise where its trigger is not what the grid knows; its files were read before."""
    scores = evaluate(model, test, attack, case.target, before)
    if attack and json.dumps(identity(attack)) != known:
        raise DataError(f"the files of {case.attack} have changed since the grid was started; start it again")
    return scores


def _octets(images: CleanSet) -> list[bytes]:
    """Every image as bytes, on the 8-bit grid."""
    return [
        image.cpu().numpy().tobytes()
        for part in torch.arange(len(images)).split(_IMAGES_AT_A_TIME)
        for image in images.take(part).floats().mul(255).round().to(torch.uint8)
    ]
