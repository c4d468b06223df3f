"""`untrojan scan`: is there a backdoor in a model, and which label does it serve."""

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
from untrojan.errors import ConfigError, visible
from untrojan.record import ScanRecord
from untrojan.registry import discover
from untrojan.report import evidence, finding
from untrojan.scanners.scanner import Scanner
from untrojan.writing import RECORD, REPORT, SARIF


@click.command(cls=WithMethodOptions, methods=lambda: discover("untrojan.scanners", Scanner))
@run_options("triggers", f"One of {', '.join(discover('untrojan.scanners', Scanner))}.")
@json_option
@click.option("--sarif", is_flag=True, help="Print the result as SARIF.")
@quiet_option
@click.pass_context
def scan(
    ctx: click.Context,
    seed: int,
    out: Path,
    force: bool,
    as_json: bool,
    sarif: bool,
    quiet: bool,
    **_: object,
) -> int:
    """Look for a backdoor in MODEL, and write the evidence to a folder.

    Exits with 0 when no backdoor was found, with 1 when one was, and with 2 when the scan was inconclusive.
    """
    if as_json and sarif:
        raise ConfigError("expected --json or --sarif, got both; the folder holds both files anyway")
    scanner: Scanner = method_of(ctx)
    require_output(out, force)
    with working(quiet):
        network, images, source = open_inputs(ctx)
        record = as_called(scanner.examine(network, images, seed, source), ctx)
    record.save(out, force)
    if as_json or sarif:
        click.echo((out / (SARIF if sarif else RECORD)).read_text("utf-8"), nl=False)
    else:
        click.echo(visible(_summary(record, out)))
    return EXIT_CODES[record.diagnosis.verdict]


def _summary(record: ScanRecord, out: Path) -> str:
    files = ", ".join(str(out / name) for name in (REPORT, SARIF, RECORD))
    return f"{finding(record)}\n{evidence(record)}\nwrote {files}"
