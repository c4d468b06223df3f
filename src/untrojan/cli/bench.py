"""`untrojan bench`: measure defenses on models whose attack is known, a grid at a time."""

import os
from collections.abc import Iterator
from pathlib import Path

import click

from untrojan.cli import FAILED
from untrojan.cli.options import quiet_option, require_file_output, require_output, working
from untrojan.errors import ConfigError, RecordError, visible
from untrojan.lab.cell import CellRecord
from untrojan.lab.cluster import Cluster
from untrojan.lab.grid import Grid
from untrojan.lab.processes import Processes, begin
from untrojan.lab.runner import Plan, failures, plan
from untrojan.lab.runner import run as run_cells
from untrojan.progress import span
from untrojan.registry import spec
from untrojan.writing import write_atomic


@click.group()
def bench() -> None:
    """Measure defenses on models whose attack is known, and compare them."""


@bench.command()
@click.argument("grid", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of records, made or added to.")
@click.option("--dry-run", is_flag=True, help="Print what is missing and how long it will take, and run nothing.")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Worker processes.  [default: one for each core]")
@click.option("--ray", metavar="ADDRESS", help="Run on this Ray cluster, such as auto or 10.0.0.1:6379.")
@click.option(
    "--gpus",
    type=click.FloatRange(min=0),
    metavar="G",
    help="GPUs of each cell on Ray, such as 0.25; else none.",
)
@quiet_option
def run(
    grid: Path, out: Path, dry_run: bool, jobs: int | None, ray: str | None, gpus: float | None, quiet: bool
) -> int:
    """Run the cells of GRID, a TOML file, that have no record yet.

    A cell that fails leaves a record with its traceback, and the others go on; remove the record to run the cell again.
    The command may be killed at any time: the next call goes on where it ended. Exits with 2 when cells failed, now or
    earlier.
    """
    require_output(out, force=True)
    if gpus is not None and ray is None:
        raise ConfigError("--gpus is what Ray gives each cell; without --ray all cells share the GPU of this machine")
    size = jobs or _cores()
    if not dry_run and ray is None:
        begin()
    with working(quiet=True):
        cells = Grid.load(grid).cells()
    earlier = failures(cells, out)
    told = [f"failed earlier: {_failed(path)}; remove it to run the cell again" for path in earlier]
    if dry_run:
        click.echo(visible("\n".join([*_planned(plan(cells, out), len(cells), size), *told])))
        return FAILED if earlier else 0
    with working(quiet):
        ran = run_cells(cells, out, Processes(size) if ray is None else Cluster(ray, jobs, gpus or 0.0))
    failed = len(earlier) + len(ran.failed)
    there = len(cells) - ran.done - failed
    click.echo(f"{_counted(len(cells))}: {ran.done} done now, {there} were there, {failed} failed")
    for line in (*told, *(f"failed: {_failed(path)}" for path in ran.failed)):
        click.echo(visible(line))
    click.echo(f"`untrojan bench report {out} --out page.html` shows the results.")
    return FAILED if failed else 0


def _counted(count: int, what: str = "cell") -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"


def _cores() -> int:
    """How many cores this process may use; all of them where the system does not tell."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@bench.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The page to write; replaced if there.")
@click.option("--parquet", type=click.Path(path_type=Path), help="Also write a table with one row per cell.")
def report(folder: Path, out: Path, parquet: Path | None) -> int:
    """Write the records in FOLDER as one page that works offline: sortable, with a filter, every cell to open."""
    from untrojan.report.leaderboard import read, render, write_parquet

    paths = [path for path in (out, parquet) if path is not None]
    for path in paths:
        require_file_output(path)
    if parquet is not None and parquet.resolve() == out.resolve():
        raise ConfigError(f"--out and --parquet are both {out}; give the table a file of its own")
    rows = read(folder)
    if not rows:
        raise RecordError(f"{folder} holds no records yet")
    for path in paths:
        path.resolve().parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, render(rows).encode())
    if parquet is not None:
        write_parquet(rows, parquet)
    click.echo(f"wrote {', '.join(map(str, paths))}: {_counted(len(rows))}")
    return 0


def _failed(path: Path) -> str:
    return f"{path}: {CellRecord.load(path).why}"


def _planned(planned: Plan, cells: int, size: int) -> Iterator[str]:
    """The plan: a line for each model, defense and setting with what is missing of it, then the sums."""
    groups: dict[tuple[str, str, str], list[tuple[int, float | None]]] = {}
    for cell, seconds in zip(planned.missing, planned.seconds, strict=True):
        groups.setdefault((cell.model, spec(cell.method), str(cell.setting)), []).append((cell.seed, seconds))
    for name, missing in groups.items():
        seconds = missing[0][1]
        seeds = ", ".join(str(seed) for seed, _ in missing)
        yield f"{', '.join(name)}: seed {seeds}; {'unknown' if seconds is None else f'{span(seconds)} each'}"
    scans = _counted(len(planned.scans), "scan")
    yield f"{_counted(cells)}, {len(planned.missing)} to run, and {scans} that they share"
    parts = [f"{span(planned.known / size)} on {size} process{'es' if size > 1 else ''}"] if planned.known else []
    parts += [f"{planned.unknown} cells and scans of unknown time"] if planned.unknown else []
    yield f"predicted: {', and '.join(parts) or 'nothing to do'}"
