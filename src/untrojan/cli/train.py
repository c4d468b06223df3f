"""`untrojan lab train`: a victim, or a clean model to compare it with."""

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from untrojan.cli import EXIT_CODES
from untrojan.cli.evaluate import table
from untrojan.cli.options import (
    SOURCES,
    attack_options,
    device_option,
    json_option,
    load_images,
    made_of,
    options_of,
    quiet_option,
    require_output,
    seed_option,
    working,
)
from untrojan.device import chosen
from untrojan.errors import ConfigError, visible
from untrojan.lab.attack import Attack, Target
from untrojan.lab.recipe import ATTACK, MODEL, Recipe, VictimRecord, checkpoint_of, make_victim
from untrojan.randomness import seeded
from untrojan.registry import parse
from untrojan.sources.nets import build
from untrojan.writing import RECORD


@click.command()
@click.option("--net", required=True, help="Architecture, such as small-vgg:classes=10, or package.module:callable.")
@click.option("--data", required=True, help=f"Clean training images: {SOURCES}.")
@click.option("--test", metavar="DATA", help="Test images; left out, a fifth of the data is held out.")
@attack_options
@click.option("--rate", type=float, metavar="R", help="Poisoning rate in [0, 1]; left out, the published one.")
@device_option
@seed_option("Decides initial weights, poisoned images, and order.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make and write into.")
@click.option("--resume", is_flag=True, help="Go on where this training was interrupted, if it was.")
@click.option("--force", is_flag=True, help="Replace what is in the folder, or begin an interrupted training anew.")
@json_option
@quiet_option
@click.pass_context
def train(
    ctx: click.Context,
    net: str,
    data: str,
    test: str | None,
    attack: str | None,
    target: Target | None,
    rate: float | None,
    device: str,
    seed: int,
    out: Path,
    resume: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **_: Any,
) -> int:
    """Train a network on images that an attack poisons, or on clean ones.

    The folder gets the weights and a record with ACC and ASR after every epoch. An interrupted training leaves
    a checkpoint beside the folder, and --resume goes on from it to the same result.

    An attack took when its ASR on the test images is at least 90 %, or 70 % for clean-label attacks, of ACC where it is
    all-to-all, and at least twice what it is without the trigger. Where it did not, the model is written all the same,
    the record says attack_did_not_take, and the exit code is 2.
    """
    recipe = made_of(Recipe, ctx.params)
    known = None if attack is None else parse(attack, "untrojan.lab.attacks", Attack)
    require_output(out, force)
    place = chosen(device)
    interrupted = _checkpoint(out, resume or force)
    with working(quiet), _telling_of(interrupted, resume):
        images = load_images(data, None, None)
        judge = None if test is None else load_images(test, None, None)
        with seeded(seed):
            network = build(net).to(place)
        victim = make_victim(
            network,
            images,
            judge,
            attack=known,
            target=target,
            rate=rate,
            recipe=recipe,
            seed=seed,
            checkpoint=interrupted,
            resume=resume,
        )
    record = victim.record.model_copy(update={"net": net, "command": shlex.join(["untrojan", *ctx.obj])})
    victim._replace(record=record).save(out, force)
    click.echo(record.to_json() if as_json else visible(_summary(record, out)), nl=not as_json)
    return EXIT_CODES[record.status]


train.params += options_of(Recipe)


def _checkpoint(out: Path, told: bool) -> Path:
    """Where the training that ends in `out` is kept; where one is, the caller must have told what to do with it."""
    path = checkpoint_of(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not told:
        raise ConfigError(f"a training was interrupted at {path}; --resume goes on with it, --force begins anew")
    return path


@contextlib.contextmanager
def _telling_of(checkpoint: Path, resumed: bool) -> Iterator[None]:
    """Say to who interrupts a training what is kept of it; a checkpoint of an earlier one is not its own."""
    before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
    try:
        yield
    except KeyboardInterrupt as end:
        if not checkpoint.exists() or (not resumed and checkpoint.stat().st_mtime_ns == before):
            raise
        raise KeyboardInterrupt(f"{checkpoint} has the epochs that are done, and --resume goes on from there") from end


def _summary(record: VictimRecord, out: Path) -> str:
    files = (MODEL, ATTACK, RECORD) if record.attack_sha256 else (MODEL, RECORD)
    wrote = ", ".join(str(out / name) for name in files)
    return f"{record.status}: {record.reason}\n{table(record.scores)}\nwrote {wrote}"
