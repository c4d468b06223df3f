"""`untrojan repair`: the same model without the backdoor, with a report and a record."""

import shlex
import sys
import typing
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Literal

import click

from untrojan.cli.options import json_option, load_images, net_options, progress, quiet_option, sample_options
from untrojan.defenses.defense import RECORD, REPAIRED, REPORT, Defense, Repair, require_free
from untrojan.errors import ConfigError
from untrojan.record import Rate
from untrojan.registry import FieldInfo, discover, fields, make
from untrojan.sources import load
from untrojan.sources.files import Checkpoint

DEFAULT = "rnp"


class _WithMethodOptions(click.Command):
    """A command that also takes every field of the chosen method as an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["method"] = _find_method(args)
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        method = ctx.meta.get("method")
        return super().get_params(ctx) + ([_option(field) for field in fields(method)] if method else [])


@click.command(cls=_WithMethodOptions)
@net_options
@click.option("--clean", required=True, metavar="DATA", help="Clean images: parquet, folder per class, npz, or Hub id.")
@sample_options
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the images and drives the method.")
@click.option("--method", default=DEFAULT, show_default=True, help="See `untrojan methods`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--force", is_flag=True, help="Replace the run that is in the folder.")
@json_option
@quiet_option
@click.pass_context
def repair(
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
    quiet: bool,
    **chosen: str | None,
) -> int:
    """Find the target label of MODEL, remove the backdoor, and write the result to a folder.

    Exits with 0 when the repaired model meets its own checks or nothing was found, and with 2 when it does not; the
    record and the report say why.
    """
    defense = make(ctx.meta["method"], {name: value for name, value in chosen.items() if value is not None})
    require_free(out, force)
    source = Checkpoint.read(model)
    network = load(source, net, mean, std)
    images = load_images(clean, samples, samples_per_class, seed)
    with progress(quiet):
        done = defense.repair(network, images, seed=seed, source=source)
    record = done.record.model_copy(
        update={
            "command": shlex.join(["untrojan", *sys.argv[1:]]),
            "model": done.record.model.model_copy(update={"net": net}),
        }
    )
    done = replace(done, record=record)
    done.save(out, force)
    click.echo(record.to_json() if as_json else _summary(done, out), nl=not as_json)
    return 2 if record.status == "failed" else 0


def _find_method(args: list[str]) -> type[Defense]:
    name = DEFAULT
    for position, argument in enumerate(args):
        if argument == "--method":
            name = args[position + 1] if position + 1 < len(args) else ""
        elif argument.startswith("--method="):
            name = argument.partition("=")[2]
    methods = discover("untrojan.defenses", Defense)
    if name not in methods:
        raise ConfigError(f"no method is named {name!r}; expected one of {', '.join(methods)}")
    return methods[name]


def _option(field: FieldInfo) -> click.Option:
    choices = typing.get_args(field.annotation) if typing.get_origin(field.annotation) is Literal else ()
    default = "" if field.default is MISSING else f"  [default: {field.default}]"
    return click.Option(
        [f"--{field.name.replace('_', '-')}", field.name],
        metavar="|".join(map(str, choices)) or getattr(field.annotation, "__name__", str(field.annotation)).upper(),
        help=field.help.replace("`", "") + default,
    )


def _summary(done: Repair, out: Path) -> str:
    record = done.record
    lines = [f"{record.status.replace('_', ' ')}: {record.reason}"]
    if record.diagnosis and record.diagnosis.targets:
        target = record.diagnosis.targets[0]
        names = record.clean.class_names
        name = f" ({names[target.label]})" if names else ""
        lines.append(
            f"backdoor: {record.diagnosis.verdict.replace('_', ' ')}; suspected target label {target.label}{name} "
            f"holds {target.score:.0%} of the predictions after unlearning"
        )
    kind = "held-out" if record.before.held_out else "these"
    lines.append(
        f"accuracy on {kind} clean images: {_percent(record.before.accuracy)} before, "
        f"{_percent(record.after.accuracy)} after; {record.units_changed} of {record.units_total} neurons pruned"
    )
    lines.append(f"wrote {out / REPAIRED}, {out / REPORT}, {out / RECORD}")
    return "\n".join(lines)


def _percent(rate: Rate) -> str:
    if rate.value is None or rate.low is None or rate.high is None:
        return "unknown"
    return f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%})"
