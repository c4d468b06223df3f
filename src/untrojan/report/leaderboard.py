"""The leaderboard: a folder of cell records in, one sortable offline HTML page or one parquet file out.

Records are read as plain JSON, because there may be a hundred thousand of them. As on the other pages everything in
them is untrusted text, and nothing is fetched.
"""

import contextlib
import gc
import json
import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import from_json

from untrojan.errors import RecordError, plain
from untrojan.record import SCHEMA_VERSION
from untrojan.writing import write_atomic

RATES = ("acc", "asr", "ra")

Row = Mapping[str, Any]


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Read the records of all cells, each as one flat row, in the order in which they were written.

    Args:
        folder: What `untrojan bench run` wrote.

    Returns:
        Rows that all have the same columns. Rates are fractions, times seconds, sizes bytes; `flags` is a list of names
        with details. Cells that failed have an error and no numbers.

    Raises:
        RecordError: The folder holds no cells, or a file that is no record of a cell or from a newer untrojan.
    """
    cells = Path(folder) / "cells"
    if not cells.is_dir():
        raise RecordError(f"{folder} holds no cells; expected a folder that `untrojan bench run` wrote")
    with _no_cycles_sought():
        return [_read(path) for _, path in sorted(_files(cells))]


def write_parquet(rows: Iterable[Row], path: Path) -> None:
    """Write rows as parquet, for analysis, whole or not at all; of flags only the names, joined by spaces.

    Args:
        rows: As :func:`read` gives them.
        path: The file.

    Raises:
        OSError: It cannot be written.
    """
    import pyarrow
    import pyarrow.parquet

    kinds = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in _COLUMNS.items()])
    flat = [{**row, "flags": " ".join(flag["name"] for flag in row["flags"])} for row in rows]
    buffer = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(flat, schema), buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())


def render(rows: Sequence[Row]) -> str:
    """Write the leaderboard.

    Args:
        rows: As :func:`read` gives them. The same rows give the same page.

    Returns:
        One HTML page that needs no network.
    """
    from markupsafe import Markup

    from untrojan.report import csp_hash, inside_script, template

    script = (Path(__file__).parent / "leaderboard.js").read_text("utf-8")
    grouped = results(rows)
    tables = {"defenses": defenses(grouped), "results": grouped}
    return template("leaderboard.html.jinja").render(
        script=Markup(script),
        hash=csp_hash(script),
        data=Markup(inside_script(json.dumps(tables, separators=(",", ":")))),
        cells=len(rows),
        failed=sum(row["error"] is not None for row in rows),
        models=len({row["model"] for row in grouped}),
        defenses=len({row["defense"] for row in rows}),
        flags=Counter(flag["name"] for row in rows for flag in row["flags"]).most_common(),
        flagged=sum(bool(row["flags"]) for row in rows),
        versions=sorted({row["untrojan"] for row in rows}),
    )


def results(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Put the seeds of each model, defense and setting together.

    Args:
        rows: As :func:`read` gives them; a model that was renamed has the name that comes last.

    Returns:
        One row for each, with its cells; a number that several cells have is `[mean, standard deviation]`, the
        deviation `None` for one cell, and the number is `None` where no cell has it. `gap` is how much more DER the
        oracle has: for each seed, the best of all the fields that the same method was run with. Cells that differ in
        more than defense and seed, such as the test images, are never put together: they get rows of their own.
    """
    rows = list(rows)
    best = _oracle(rows)
    names = {row["setup"]: row["model"] for row in rows}
    groups: dict[tuple[str, str, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[names[row["setup"]], row["defense"], row["setting"], row["setup"]].append(row)
    return [_result(name, group, best) for (name, *_), group in sorted(groups.items())]


def defenses(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Put the models of each defense and setting together: means over models of means over seeds, and the worst.

    Args:
        results: As :func:`results` gives them; rows of one model count as one.
    """
    groups: dict[tuple[str, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in results:
        groups[row["defense"], row["setting"]][row["model"]].append(row)
    return [_summary(*group, [*models.values()]) for group, models in sorted(groups.items())]


_COLUMNS: dict[str, type] = {
    **dict.fromkeys(("key", "setup", "model", "attack", "target", "method", "defense", "setting"), str),
    "seed": int,
    **dict.fromkeys(("error", "verdict"), str),
    "suspect": int,
    **dict.fromkeys(("status", "reason"), str),
    **dict.fromkeys([f"{name}_{when}" for when in ("before", "after") for name in RATES], float),
    **dict.fromkeys(("der", "repair_seconds", "measure_seconds", "scan_seconds", "total_seconds"), float),
    **dict.fromkeys(("peak_memory_bytes", "units_changed", "units_total", "values_changed"), int),
    **dict.fromkeys(("clean_images", "test_images"), int),
    **dict.fromkeys(("flags", "untrojan"), str),
}
"""The columns of a row, and what they hold in the parquet file."""

_KINDS = {name: (int, float) if kind is float else kind for name, kind in _COLUMNS.items()} | {"flags": list}
"""What the columns of a row hold where they hold something."""

_ALWAYS = ("key", "setup", "model", "method", "defense", "setting", "seed", "untrojan")
"""The columns that hold something whatever became of the cell."""

_OPTIONAL = ("attack", "target", "error", "suspect", "asr_before", "asr_after", "ra_before", "ra_after", "der")
"""The columns that may hold nothing where the cell has a result."""

_ASKED = ("key", "setup", "model", "attack", "method", "defense", "setting", "seed", "error")
"""What a row takes from a record as it stands there."""

_OUTCOME = (
    *("verdict", "suspect", "status", "reason"),
    *("repair_seconds", "measure_seconds", "scan_seconds", "total_seconds", "peak_memory_bytes"),
    *("units_changed", "units_total", "values_changed", "flags"),
)
"""What a row takes from the outcome of a cell as it stands there."""

_SHOWN = (
    *("key", "seed", "error", "verdict", "suspect", "status", "reason", "acc_before", "acc_after", "asr_before"),
    *("asr_after", "ra_after", "der", "repair_seconds", "peak_memory_bytes", "flags"),
)
"""What the page shows of a cell."""


@contextlib.contextmanager
def _no_cycles_sought() -> Iterator[None]:
    """Stop the garbage collector, which would look through all rows again and again and find nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _files(folder: Path) -> Iterator[tuple[int, str]]:
    """When each record was written, and where it is."""
    for entry in os.scandir(folder):
        if entry.name.startswith("."):  # a record that was being written when its process was killed
            continue
        if entry.is_dir():
            yield from _files(Path(entry.path))
        elif entry.name.endswith(".json"):
            yield entry.stat().st_mtime_ns, entry.path


def _read(path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:  # noqa: PTH123 - a hundred thousand times
            record = from_json(file.read(), cache_strings="keys")
        if record["kind"] != "cell":
            raise RecordError(f"expected the record of a cell in {path}, got one of kind {record['kind']!r}")
        if record["schema_version"] > SCHEMA_VERSION:
            raise RecordError(f"{path} was written by a newer untrojan; update untrojan to read it")
        return _row(record)
    except OSError as error:
        raise RecordError(f"cannot read record {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{path} is not the record of a cell: {type(error).__name__}: {error}") from error


def _row(record: Mapping[str, Any]) -> dict[str, Any]:
    row = dict.fromkeys(_COLUMNS)
    row |= {name: record[name] for name in _ASKED}
    row["target"] = None if record["target"] is None else str(record["target"])
    row["untrojan"], row["flags"] = record["inputs"]["untrojan"], []
    outcome = record["outcome"]
    if outcome is None:
        _require_kinds(row, ("error", *_ALWAYS))
        return row
    row |= {name: outcome[name] for name in _OUTCOME}
    for when in ("before", "after"):
        row |= {f"{name}_{when}": rate["value"] for name in RATES if (rate := outcome[when][name])}
    row["der"] = outcome["after"]["der"]
    row["clean_images"], row["test_images"] = outcome["clean"]["images"], outcome["test"]["images"]
    _require_kinds(row, _KINDS.keys() - _OPTIONAL)
    return row


def _require_kinds(row: Row, needed: Collection[str]) -> None:
    for name, kind in _KINDS.items():
        value = row[name]
        if not isinstance(value, kind) and (value is not None or name in needed):
            raise TypeError(f"`{name}` is {plain(repr(value))}")
    for flag in row["flags"]:
        if not isinstance(flag["name"], str):
            raise TypeError(f"a flag is named {plain(repr(flag['name']))}")


def _oracle(rows: Iterable[Row]) -> dict[tuple[Any, ...], float]:
    """The best DER of each method, setup and seed, where the method was run with different fields."""
    tried: dict[tuple[Any, ...], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["der"] is not None:
            tried[_choice(row)][row["defense"]] = row["der"]
    return {choice: max(ratings.values()) for choice, ratings in tried.items() if len(ratings) > 1}


def _choice(row: Row) -> tuple[Any, ...]:
    return row["method"], row["setup"], row["seed"]


def _result(model: str, group: list[Row], best: Mapping[tuple[Any, ...], float]) -> dict[str, Any]:
    done = [row for row in group if row["status"]]
    changes = [row["acc_after"] - row["acc_before"] for row in done if row["acc_after"] is not None]
    gaps = [best[_choice(row)] - row["der"] for row in done if _choice(row) in best and row["der"] is not None]
    first = group[0]
    return {
        "model": model,
        "attack": first["attack"],
        "target": first["target"],
        "defense": first["defense"],
        "setting": first["setting"],
        "done": len(done),
        "failed": len(group) - len(done),
        "acc_change": _spread(changes),
        **{name: _spread([row[f"{name}_after"] for row in done]) for name in RATES},
        **{f"{name}_before": _spread([row[f"{name}_before"] for row in done]) for name in RATES[:2]},
        "der": _spread([row["der"] for row in done]),
        "gap": _spread(gaps),
        "repaired": [sum(row["status"] == "repaired" for row in done), len(done)],
        "seconds": [statistics.median(row["repair_seconds"] for row in done), None] if done else None,
        "memory": [max(row["peak_memory_bytes"] for row in done), None] if done else None,
        "flagged": sum(bool(row["flags"]) for row in group),
        "flags": sorted({flag["name"] for row in group for flag in row["flags"]}),
        "cells": [_cell(row) for row in sorted(group, key=lambda row: row["seed"])],
    }


def _summary(defense: str, setting: str, models: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """What a defense did in a setting, from its rows, those of each model together."""
    rows = [row for model in models for row in model]
    return {
        "defense": defense,
        "setting": setting,
        "models": [sum(any(row["done"] for row in model) for model in models), len(models)],
        **{name: _mean_of(models, name, statistics.fmean) for name in ("acc_change", *RATES[1:], "der", "gap")},
        "worst_asr": _mean_of([[row] for row in rows], "asr", max),
        "repaired": [sum(row["repaired"][index] for row in rows) for index in (0, 1)],
        "seconds": _mean_of(models, "seconds", statistics.median),
        "memory": _mean_of([[row] for row in rows], "memory", max),
        "flagged": sum(row["flagged"] for row in rows),
    }


def _cell(row: Row) -> dict[str, Any]:
    """What opens under a row of the page."""
    return {name: row[name] for name in _SHOWN}


def _spread(values: Sequence[float | None]) -> list[float | None] | None:
    there = [value for value in values if value is not None]
    if not there:
        return None
    mean = statistics.fmean(there)
    # Twenty times as fast as statistics.stdev, which a hundred thousand records are worth.
    return [mean, math.dist(there, [mean] * len(there)) / (len(there) - 1) ** 0.5 if len(there) > 1 else None]


def _mean_of(models: Iterable[Sequence[Row]], name: str, how: Callable[[list[float]], float]) -> list[Any] | None:
    """Put the means of the models together; a model without the number does not count."""
    known = [[row[name][0] for row in model if row[name] is not None] for model in models]
    means = [statistics.fmean(values) for values in known if values]
    return [how(means), None] if means else None
