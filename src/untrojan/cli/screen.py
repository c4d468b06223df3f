"""`untrojan screen`: which samples of a training set are poisoned."""

import dataclasses
from pathlib import Path

import click

from untrojan.cli import EXIT_CODES
from untrojan.cli.options import (
    as_called,
    clean_option,
    json_option,
    net_options,
    open_inputs,
    output_options,
    quiet_option,
    require_output,
    sample_options,
    seed_option,
    working,
)
from untrojan.errors import visible
from untrojan.registry import discover, parse
from untrojan.report import finding
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.samples import SCORES, SHOWN, ScreeningRecord
from untrojan.scanners.samples import screen as rank
from untrojan.writing import RECORD, REPORT


@click.command()
@net_options
@clean_option
@sample_options
@click.option(
    "--suspects", required=True, metavar="DATA", help="The training set with its labels; it may exceed the memory."
)
@click.option(
    "--detector",
    "detectors",
    multiple=True,
    default=("unlearned",),
    show_default=True,
    metavar="SPEC",
    help="Such as strip:blends=20, several times if you like; the first one ranks. Detectors are "
    f"{', '.join(discover('untrojan.scanners.detectors', Detector))}.",
)
@seed_option("Draws the clean images and drives the detectors.")
@click.option(
    "--shown",
    type=click.IntRange(min=1),
    metavar="N",
    default=SHOWN,
    show_default=True,
    help="How many of the most suspicious images to show on the page.",
)
@output_options
@json_option
@quiet_option
@click.pass_context
def screen(
    ctx: click.Context,
    suspects: str,
    detectors: tuple[str, ...],
    seed: int,
    shown: int,
    out: Path,
    force: bool,
    as_json: bool,
    quiet: bool,
    **_: object,
) -> int:
    """Rank the samples that MODEL was trained on, the most suspicious first, and write scores and a page.

    Scores only rank samples, so the exit code says what the scan found on the model: 0 no backdoor, 1 a backdoor, 2
    inconclusive.
    """
    chosen = [parse(spec, "untrojan.scanners.detectors", Detector) for spec in detectors]
    require_output(out, force)
    with working(quiet):
        network, images, source = open_inputs(ctx)
        done = rank(network, images, suspects, detectors=chosen, seed=seed, shown=shown, source=source)
        record = as_called(done.record, ctx)
        dataclasses.replace(done, record=record).save(out, force)
    click.echo(record.to_json() if as_json else visible(_summary(record, out)), nl=not as_json)
    return EXIT_CODES[record.diagnosis.verdict]


def _summary(record: ScreeningRecord, out: Path) -> str:
    labels = [sample.label for sample in record.top]
    most = max(labels, key=labels.count)
    return "\n".join(
        [
            f"scan of the model: {finding(record)}",
            f"ranked {record.suspects.images:,} samples by {record.method.name}; of the {len(labels)} most "
            f"suspicious, {labels.count(most)} have label {record.label(most)}",
            "scores only rank: look at the images before you drop any",
            f"wrote {out / SCORES}, {out / REPORT}, {out / RECORD}",
        ]
    )
