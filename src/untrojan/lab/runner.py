"""Runs the cells of a grid that have no record yet, and says beforehand how long that will take.

A folder of records holds `cells/ab/<key>.json` and `scans/ab/<key>.json`. Only this process writes, one whole file per
cell, so that it can be killed at any time: what is lost are the cells in work.
"""

import contextlib
import fcntl
import statistics
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from untrojan.errors import ConfigError, RecordError
from untrojan.lab.cell import CellRecord
from untrojan.lab.grid import Cell
from untrojan.lab.work import Answer, Job
from untrojan.progress import Advance, stage
from untrojan.record import ScanRecord
from untrojan.registry import spec
from untrojan.writing import write_atomic

_TRIES = 2


class Pool(Protocol):
    """Workers that jobs are given to: processes of this machine, or of a Ray cluster."""

    size: int
    """How many jobs may be at work at a time."""

    def start(self, job: Job) -> None:
        """Begin a job; there are never more than `size` at work."""
        ...

    def wait(self) -> tuple[Job, Answer | None]:
        """Wait until a job ends, and give it with its answer, `None` where its worker died."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


class Plan(NamedTuple):
    """What there is to do.

    Attributes:
        missing: The cells without a record, in the order of the grid.
        scans: Keys of the scans that these need and that are not there.
        seconds: Predicted seconds of each missing cell without its scan, `None` where nothing like it was ever run.
        scan_seconds: Predicted seconds of each scan, by its key.
    """

    missing: list[Cell]
    scans: list[str]
    seconds: list[float | None]
    scan_seconds: dict[str, float | None]

    @property
    def known(self) -> float:
        """Seconds of work in all, as far as they can be predicted."""
        return sum(filter(None, [*self.seconds, *self.scan_seconds.values()]))

    @property
    def unknown(self) -> int:
        """How many cells and scans nothing is known about."""
        return [*self.seconds, *self.scan_seconds.values()].count(None)


class Ran(NamedTuple):
    """What became of the missing cells: how many have a result now, and the records of those that failed."""

    done: int
    failed: list[Path]


def cell_path(folder: Path, key: str) -> Path:
    """Where the record of a cell is."""
    return folder / "cells" / key[:2] / f"{key}.json"


def failures(cells: Iterable[Cell], folder: Path) -> list[Path]:
    """List the records of those cells that failed.

    Args:
        cells: All cells of the grid.
        folder: Where the records are; it need not exist.

    Raises:
        RecordError: The record of a cell is none.
    """
    paths = [cell_path(folder, cell.key) for cell in cells]
    return [path for path in paths if path.exists() and CellRecord.load(path).error is not None]


def plan(cells: Iterable[Cell], folder: Path) -> Plan:
    """Say what is missing and how long it will take, from cells that are there.

    The time of a cell is the median of cells with the same model, defense and setting, else of those with the same
    defense and setting; that of a scan is the median of the same model and setting, else of the same setting.

    Args:
        cells: All cells of the grid.
        folder: Where the records are; it need not exist.

    Raises:
        RecordError: A file among the records is none.
    """
    from untrojan.report.leaderboard import read

    missing = [cell for cell in cells if not cell_path(folder, cell.key).exists()]
    scans = _unscanned(missing, folder)
    known = _known(read(folder)) if (folder / "cells").is_dir() else {}
    return Plan(
        missing,
        list(scans),
        [_median(known, (cell.model, spec(cell.method), str(cell.setting))) for cell in missing],
        {key: _median(known, (cells[0].model, None, str(cells[0].setting))) for key, cells in scans.items()},
    )


def run(cells: Iterable[Cell], folder: Path, pool: Pool) -> Ran:
    """Run every cell that has no record; one that fails leaves a record with its traceback, and the others go on.

    A job whose worker died is tried once more, on another one.

    Args:
        cells: All cells of the grid.
        folder: Where the records go; made if it is not there.
        pool: Who does the work; it is closed at the end.

    Raises:
        ConfigError: Another process is running a grid in the folder.
    """
    try:
        with _locked(folder):
            missing = [cell for cell in cells if not cell_path(folder, cell.key).exists()]
            with stage("cells", total=len(missing)) as advance:
                return _Run(missing, folder, pool).all(advance)
    finally:
        pool.close()


class _Run:
    """The state of one run: cells whose scan is there are ready, the others wait for it."""

    def __init__(self, missing: list[Cell], folder: Path, pool: Pool) -> None:
        self.folder = folder
        self.pool = pool
        self.waiting = _unscanned(missing, folder)
        self.ready = deque(cell for cell in missing if cell.scan_key not in self.waiting)
        self.scans = deque(group[0] for group in self.waiting.values())
        self.working = 0
        self.deaths: dict[str, int] = {}
        self.done = 0
        self.failed: list[Path] = []

    def all(self, advance: Advance) -> Ran:
        while self._start_what_can():
            job, answer = self.pool.wait()
            self.working -= 1
            if job.scan is not None:  # cells may wait for a scan, but no worker until a result is on the disk
                self._start_what_can()
            for _ in range(self._end(job, answer)):
                advance()
        return Ran(self.done, self.failed)

    def _start_what_can(self) -> bool:
        while self.working < self.pool.size and (self.ready or self.scans):
            if self.ready:
                cell = self.ready.popleft()
                job = Job(cell, _scan_path(self.folder, cell.scan_key).read_text("utf-8"))
            else:
                job = Job(self.scans.popleft(), None)
            self.pool.start(job)
            self.working += 1
        return self.working > 0

    def _end(self, job: Job, answer: Answer | None) -> int:
        """Write down what came of a job; give how many cells that settles."""
        cell, is_scan = job.cell, job.scan is None
        if answer is None:
            key = cell.scan_key if is_scan else cell.key
            self.deaths[key] = self.deaths.get(key, 0) + 1
            if self.deaths[key] < _TRIES:
                (self.scans if is_scan else self.ready).appendleft(cell)
                return 0
            answer = Answer(None, f"the worker process died {_TRIES} times, perhaps for want of memory")
        if not is_scan:
            return self._settle([cell], answer)
        if answer.text is None:
            return self._settle(self.waiting.pop(cell.scan_key), answer)
        _write(_scan_path(self.folder, cell.scan_key), answer.text)
        self.ready.extend(self.waiting.pop(cell.scan_key))
        return 0

    def _settle(self, cells: list[Cell], answer: Answer) -> int:
        for cell in cells:
            path = cell_path(self.folder, cell.key)
            if answer.text is None:
                self.failed.append(path)
                _write(path, CellRecord.of(cell, error=answer.error or "").to_json())
            else:
                self.done += 1
                _write(path, answer.text)
        return len(cells)


def _scan_path(folder: Path, key: str) -> Path:
    return folder / "scans" / key[:2] / f"{key}.json"


def _unscanned(missing: Iterable[Cell], folder: Path) -> dict[str, list[Cell]]:
    """The cells whose scan is not there, or cannot be read, by the key of the scan."""
    groups: dict[str, list[Cell]] = {}
    for cell in missing:
        groups.setdefault(cell.scan_key, []).append(cell)
    return {key: cells for key, cells in groups.items() if not _is_scan(_scan_path(folder, key))}


def _is_scan(path: Path) -> bool:
    try:
        ScanRecord.load(path)
    except RecordError:
        return False
    return True


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, text.encode())


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of the folder; the lock ends with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(f"another grid is running in {folder}; wait for it, or give another folder") from error
        yield


_Like = tuple[str | None, str | None, str]


def _known(rows: Iterable[Mapping[str, Any]]) -> dict[_Like, list[float]]:
    """Seconds of cells by model, defense and setting, and of scans under no defense; `None` stands for any model."""
    known: dict[_Like, list[float]] = {}
    for row in rows:
        for model in (row["model"], None) if row["status"] else ():
            known.setdefault((model, row["defense"], row["setting"]), []).append(row["total_seconds"])
            known.setdefault((model, None, row["setting"]), []).append(row["scan_seconds"])
    return known


def _median(known: Mapping[_Like, list[float]], like: _Like) -> float | None:
    _, defense, setting = like
    seconds = known.get(like) or known.get((None, defense, setting))
    return statistics.median(seconds) if seconds else None
