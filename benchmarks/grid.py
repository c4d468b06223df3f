"""What the grid itself costs: its overhead for each cell, and reading a hundred thousand records.

Overhead: 1,000 real cells of tiny networks are run: two models, two seeds, and 250 defenses that are over quickly. Time
of all workers less scans, repairs and measuring ACC, ASR and RA is overhead: starting the workers, hashing,
sending, opening model and images, comparing clean and test images, and writing the record.

Reading: the records of that grid are copied under other keys until there are 100,000, and become a page and a table.
They have just been written, so that the disk is not measured.

The page also shows what `benchmarks/grid.toml` left in `benchmarks/records/grid`; that grid is not run here.

    python benchmarks/grid.py      # writes benchmarks/records/grid.json and benchmarks/grid.md
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import percent, percents

from untrojan.data import CleanSet
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.grid import Grid
from untrojan.lab.processes import Processes, begin
from untrojan.lab.runner import run
from untrojan.lab.victim import poison, train
from untrojan.report.leaderboard import RATES, read, render, write_parquet
from untrojan.run import environment
from untrojan.sources.files import save_state
from untrojan.sources.nets import build
from untrojan.writing import write_atomic

RECORD, PAGE = Path("benchmarks/records/grid.json"), Path("benchmarks/grid.md")
CELLS = Path("benchmarks/records/grid")
DEFENSES, SEEDS, MODELS = 250, 2, 2
RECORDS = 100_000
CLASSES = 4


def stripes(count: int) -> CleanSet:
    """Images whose class is where the bright stripe lies."""
    labels = torch.arange(count) % CLASSES
    images = 0.4 * torch.rand(count, 1, 8, 8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += 0.5
    return CleanSet((images * 255).to(torch.uint8), labels)


def grid(folder: Path) -> Grid:
    """Make models, images and the grid of 1,000 cells."""
    torch.manual_seed(0)
    images = {"clean": stripes(80), "test": stripes(400)}
    for name, each in images.items():
        np.savez(folder / f"{name}.npz", images=each.images.permute(0, 2, 3, 1).numpy(), labels=each.labels.numpy())
    lines = [
        # Pruning 60 channels ruins the network, and the checks are over after the first; the budget tells cells apart.
        f"defenses = {[f'clp:select=count,count=60,budget={0.02 + 1e-5 * number:.5f}' for number in range(DEFENSES)]}",
        f"seeds = {list(range(SEEDS))}",
        "settings = [{ samples = 40 }]",
        'scan = "unlearning:runs=1,unlearn_epochs=1"',
    ]
    for number in range(MODELS):
        poisoned = poison(images["clean"], BadNets(size=2), target=1, seed=number)
        net = train(build(f"digits-cnn:classes={CLASSES}"), poisoned, epochs=30, seed=number)
        save_state(folder / f"{number}.safetensors", net.state_dict())
        lines += [
            f"[models.model-{number}]",
            f'file = "{folder / str(number)}.safetensors"',
            f'net = "digits-cnn:classes={CLASSES}"',
            f'clean = "{folder / "clean.npz"}"',
            f'test = "{folder / "test.npz"}"',
            'attack = "badnets:size=2"',
            "target = 1",
        ]
    file = folder / "grid.toml"
    file.write_text("\n".join(lines))
    return Grid.load(file)


def overhead(folder: Path, jobs: int) -> dict[str, Any]:
    """Run the 1,000 cells, and take the repairs and scans off the time of all processes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    asked = grid(folder)
    start, processor = time.perf_counter(), time.process_time()
    begin()  # as `untrojan bench run` does
    cells = asked.cells()
    ran = run(cells, folder / "out", Processes(jobs))
    wall, processor = time.perf_counter() - start, time.process_time() - processor
    rows = read(folder / "out")
    if ran.failed or len(rows) != len(cells):
        raise SystemExit(f"expected {len(cells)} cells with a result, got {ran.done}; see {ran.failed[:1]}")
    scans = {(row["model"], row["seed"]): row["scan_seconds"] for row in rows}
    work = sum(row["repair_seconds"] + row["measure_seconds"] for row in rows) + sum(scans.values())
    return {
        "cells": len(cells),
        "jobs": jobs,
        "seconds": wall,
        "work_ms_per_cell": 1000 * work / len(cells),
        "overhead_ms_per_cell": 1000 * (wall * jobs - work) / len(cells),
        "runner_processor_ms_per_cell": 1000 * processor / len(cells),
        "load": os.getloadavg()[0],
    }


def reading(folder: Path) -> dict[str, Any]:
    """Copy records until there are 100,000, and time what the leaderboard does with them."""
    records = [json.loads(path.read_text()) for path in sorted((folder / "out" / "cells").glob("*/*.json"))]
    many = folder / "many"
    for number in range(RECORDS):
        record = records[number % len(records)]
        key = f"{number * 2654435761 % 2**32:08x}{record['key'][8:]}"
        model, setup = f"model-{number // 1000}", f"{number // 1000:064x}"
        copy = {**record, "key": key, "setup": setup, "model": model, "seed": number % 5}
        copy["defense"] = f"clp:select=count,count={number % 1000 // 5}"
        path = many / "cells" / key[:2] / f"{key}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(copy, separators=(",", ":")) + "\n")
    seconds, rows = timed(lambda: read(many))
    page_seconds, page = timed(lambda: render(rows))
    table_seconds, _ = timed(lambda: write_parquet(rows, folder / "cells.parquet"))
    if len(rows) != RECORDS:
        raise SystemExit(f"expected {RECORDS} rows, got {len(rows)}")
    return {
        "records": len(rows),
        "bytes_per_record": statistics.fmean(path.stat().st_size for path in many.glob("cells/00/*.json")),
        "read_seconds": seconds,
        "page_seconds": page_seconds,
        "page_bytes": len(page.encode()),
        "parquet_seconds": table_seconds,
        "parquet_bytes": (folder / "cells.parquet").stat().st_size,
        "load": os.getloadavg()[0],
    }


def timed(do: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = do()
    return time.perf_counter() - start, result


def page(record: dict[str, Any]) -> str:
    """The measurement in words."""
    many, versions = record["reading"], record["environment"]
    machine = f"Python {versions['python']}, torch {versions['torch']}, {versions['platform']}, {record['cores']} cores"
    costs = "\n".join(
        f"| {cost['jobs']} | {cost['work_ms_per_cell']:.1f} ms | {cost['overhead_ms_per_cell']:.1f} ms "
        f"| {cost['runner_processor_ms_per_cell']:.1f} ms | {cost['load']:.1f} |"
        for cost in record["overhead"]
    )
    return f"""# What the grid itself costs

Made by `python benchmarks/grid.py`, which says what counts; the numbers are in `benchmarks/records/grid.json`.
{machine}.
Load is how many processes wanted a core on average, those of other programs too; where it is more than
there are cores, all times but processor time include waiting for one. Workers are forked from one process, whose
start counts in the first line of the table only.

## For each of {record["overhead"][0]["cells"]:,} cells, wanted is an overhead under 20 ms

| workers | scan, repair and measuring | overhead | processor time of the runner | load |
|---|---|---|---|---|
{costs}

## Reading {many["records"]:,} records of {many["bytes_per_record"]:,.0f} bytes, wanted is under 10 s

| what | seconds |
|---|---|
| reading | {many["read_seconds"]:.1f} |
| making the page, {many["page_bytes"] / 1e6:.0f} MB | {many["page_seconds"]:.1f} |
| writing parquet, {many["parquet_bytes"] / 1e6:.1f} MB | {many["parquet_seconds"]:.1f} |

The files were in the cache of the disk, and the load was {many["load"]:.1f}.

## On published checkpoints

`untrojan bench run benchmarks/grid.toml --out benchmarks/records/grid`, 500 clean images, seed 0, ACC / ASR / RA in
percent on all test images. Models, images, scan and seed are those of [methods.md](methods.md).

| model | defense | before | after | DER | says of itself | seconds | flags |
|---|---|---|---|---|---|---|---|
{table(read(CELLS))}
"""


def table(rows: list[dict[str, Any]]) -> str:
    """Cells as lines of a Markdown table."""
    return "\n".join(map(line, sorted(rows, key=lambda row: (row["model"], row["defense"]))))


def line(row: dict[str, Any]) -> str:
    flags = ", ".join(flag["name"] for flag in row["flags"])
    measured = f"{rates(row, 'before')} | {rates(row, 'after')} | {percent(row['der'])}"
    return (
        f"| {row['model']} | {row['defense']} | {measured} | {row['status']} | {row['repair_seconds']:.0f} | {flags} |"
    )


def rates(row: dict[str, Any], when: str) -> str:
    return percents(row[f"{name}_{when}"] for name in RATES)


def main() -> None:
    """Measure, and write record and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs="+", default=[1, 2], help="numbers of worker processes to try")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        record = {
            "overhead": [overhead(folder, jobs) for jobs in asked.jobs],
            "reading": reading(folder),
            "environment": environment(),
            "cores": len(os.sched_getaffinity(0)),
        }
    write_atomic(RECORD, (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(PAGE, page(record).encode())


if __name__ == "__main__":
    main()
