"""`untrojan scan`: is there a backdoor in a model, and which label does it serve."""

from pathlib import Path

import click

from untrojan.cli import printable
from untrojan.cli.options import (
    EXIT_CODES,
    WithMethodOptions,
    as_called,
    json_option,
    load_images,
    quiet_option,
    require_writable,
    run_options,
    working,
)
from untrojan.errors import ConfigError
from untrojan.record import RECORD, REPORT, SARIF, ScanRecord, require_free
from untrojan.registry import discover, make
from untrojan.report import evidence, finding
from untrojan.scanners.scanner import Scanner
from untrojan.sources import load
from untrojan.sources.files import Checkpoint


@click.command(cls=WithMethodOptions, methods=lambda: discover("untrojan.scanners", Scanner))
@run_options("unlearning", f"One of {', '.join(discover('untrojan.scanners', Scanner))}.")
@json_option
@click.option("--sarif", is_flag=True, help="Print the result as SARIF.")
@quiet_option
@click.pass_context
def scan(
    ctx: click.Context,
    model: str,
    net: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    clean: str,
    samples: int | None,
    samples_per_class: int | None,
    seed: int,
    method: str,
    out: Path,
    force: bool,
    as_json: bool,
    sarif: bool,
    quiet: bool,
    **chosen: str | None,
) -> int:
    """Look for a backdoor in MODEL, and write the evidence to a folder.

    Exits with 0 when no backdoor was found, with 1 when one was, and with 2 when the scan was inconclusive.
    """
    if as_json and sarif:
        raise ConfigError("expected --json or --sarif, got both; the folder holds both files anyway")
    scanner = make(ctx.meta["method"], {name: value for name, value in chosen.items() if value is not None})
    require_free(out, force)
    require_writable(out)
    with working(quiet):
        source = Checkpoint.read(model)
        network = load(source, net, mean, std)
        images = load_images(clean, samples, samples_per_class, seed)
        record = as_called(scanner.examine(network, images, seed, source), ctx, net)
    record.save(out, force)
    if as_json or sarif:
        click.echo((out / (SARIF if sarif else RECORD)).read_text("utf-8"), nl=False)
    else:
        click.echo(printable(_summary(record, out)))
    return EXIT_CODES[record.diagnosis.verdict]


def _summary(record: ScanRecord, out: Path) -> str:
    files = ", ".join(str(out / name) for name in (REPORT, SARIF, RECORD))
    return f"{finding(record)}\n{evidence(record)}\nwrote {files}"
