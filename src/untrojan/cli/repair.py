"""`untrojan repair`: the same model without the backdoor, with a report and a record."""

from dataclasses import replace
from pathlib import Path

import click

from untrojan.cli import EXIT_CODES
from untrojan.cli.options import (
    WithMethodOptions,
    as_called,
    json_option,
    method_of,
    open_inputs,
    quiet_option,
    require_output,
    run_options,
    working,
)
from untrojan.defenses.defense import CHANGES, REPAIRED, Defense
from untrojan.errors import ConfigError, visible
from untrojan.record import Rate, Record
from untrojan.registry import discover
from untrojan.report import finding
from untrojan.writing import RECORD, REPORT


@click.command(cls=WithMethodOptions, methods=lambda: discover("untrojan.defenses", Defense))
@run_options("auto", "See `untrojan methods`.")
@json_option
@quiet_option
@click.pass_context
def repair(
    ctx: click.Context,
    model: str,
    seed: int,
    out: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    **_: object,
) -> int:
    """Find the target label of MODEL, remove the backdoor, and write the result to a folder.

    Exits with 0 when the repaired model meets its own checks or nothing was found, and with 2 when it does not or the
    scan was inconclusive; the record and the report say why.
    """
    defense: Defense = method_of(ctx)
    require_output(out, force)
    if Path(model).resolve() in [(out / name).resolve() for name in (REPAIRED, CHANGES)]:
        raise ConfigError(f"{out} holds the model itself, which would be replaced; give another folder")
    with working(quiet):
        network, images, source = open_inputs(ctx)
        done = defense.repair(network, images, seed=seed, source=source)
    record = as_called(done.record, ctx)
    replace(done, record=record).save(out, force)
    click.echo((out / RECORD).read_text("utf-8") if as_json else visible(_summary(record, out)), nl=not as_json)
    return EXIT_CODES[record.status]


def _summary(record: Record, out: Path) -> str:
    lines = [f"{record.status.replace('_', ' ')}: {record.reason}", finding(record)]
    kind = "held-out" if record.before.held_out else "these"
    lines.append(
        f"accuracy on {kind} clean images: {_percent(record.before.accuracy)} before, "
        f"{_percent(record.after.accuracy)} after; {_changed(record)}"
    )
    lines.append(f"wrote {out / REPAIRED}, {out / REPORT}, {out / RECORD}")
    if record.status == "failed":
        lines.append(f"{REPAIRED} holds the best that {record.method.name} reached; do not take it for repaired")
    return "\n".join(lines)


def _changed(record: Record) -> str:
    if record.units_total:
        return f"{record.units_changed} of {record.units_total} units pruned"
    return f"{record.values_changed:,} values changed"


def _percent(rate: Rate) -> str:
    if rate.value is None or rate.low is None or rate.high is None:
        return "unknown"
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"
