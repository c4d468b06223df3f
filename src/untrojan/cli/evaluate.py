"""`untrojan evaluate`: how a model does on clean images, and on triggered ones where the attack is known."""

import click

from untrojan.cli.options import (
    SOURCES,
    attack_options,
    json_option,
    load_images,
    net_options,
    quiet_option,
    sample_options,
    working,
)
from untrojan.device import chosen
from untrojan.errors import ConfigError, ModelError
from untrojan.lab.attack import Attack, Target
from untrojan.lab.evaluate import Scores
from untrojan.lab.evaluate import evaluate as measure
from untrojan.record import Rate
from untrojan.registry import parse
from untrojan.sources import load


@click.command()
@net_options
@click.option("--test", required=True, metavar="DATA", help=f"Test images: {SOURCES}.")
@sample_options
@attack_options
@click.option("--before", metavar="MODEL", help="The model before its repair, to add DER.")
@json_option
@quiet_option
def evaluate(
    model: str,
    net: str,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
    device: str,
    test: str,
    samples: int | None,
    samples_per_class: int | None,
    attack: str | None,
    target: Target | None,
    before: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure MODEL: clean accuracy (ACC), attack success rate (ASR) and robust accuracy (RA)."""
    known = None if attack is None else parse(attack, "untrojan.lab.attacks", Attack)
    if (known is None) != (target is None):
        raise ConfigError("expected --attack and --target together, got only one of them")
    if before is not None and known is None:
        raise ConfigError("--before rates a defense against an attack (DER); give --attack and --target with it")
    place = chosen(device)

    def measured(path: str, earlier: Scores | None = None) -> Scores:
        network = load(path, net, mean, std).to(place)
        try:
            return measure(network, images, known, target, earlier)
        except ModelError as error:
            raise ModelError(f"{path}: {error}") from error

    with working(quiet):
        images = load_images(test, samples, samples_per_class)
        scores = measured(model, None if before is None else measured(before))
    click.echo(scores.model_dump_json(indent=2) if as_json else table(scores))
    return 0


def table(scores: Scores) -> str:
    """Scores as lines for a person."""
    rows = {"ACC": scores.acc, "ASR": scores.asr, "RA": scores.ra}
    lines = [f"{name:<4}{_row(rate)}" for name, rate in rows.items() if rate is not None]
    return "\n".join(lines + ([f"DER {scores.der:.3f}"] if scores.der is not None else []))


def _row(rate: Rate) -> str:
    if rate.value is None:
        return "no image to measure it on"
    return f"{rate.value:7.2%}   {rate.count} of {rate.total}, 95 % interval {rate.low:.2%} to {rate.high:.2%}"
