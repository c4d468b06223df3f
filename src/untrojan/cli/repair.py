"""`untrojan repair`: the same model without the backdoor, with a report and a record."""

import shlex
from dataclasses import MISSING, replace
from pathlib import Path

import click

from untrojan.cli import printable
from untrojan.cli.options import (
    json_option,
    load_images,
    net_options,
    quiet_option,
    require_writable,
    sample_options,
    value_of,
    working,
)
from untrojan.defenses.defense import CHANGES, RECORD, REPAIRED, REPORT, Defense, require_free
from untrojan.errors import ConfigError
from untrojan.record import Rate, Record
from untrojan.registry import FieldInfo, discover, fields, make
from untrojan.sources import load
from untrojan.sources.files import Checkpoint

DEFAULT = "rnp"


class _WithMethodOptions(click.Command):
    """A command that also takes every field of the chosen method as an option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        peek = self.make_parser(ctx)
        peek.ignore_unknown_options = True
        given, _, _ = peek.parse_args(list(args))
        ctx.meta["method"] = _method(given.get("method", DEFAULT))
        return super().parse_args(ctx, args)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        return super().get_params(ctx) + self._own(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        own = self._own(ctx)
        shared = self.get_params(ctx)[: -len(own) or None]
        for heading, options in (("Options", shared), (f"Options of {ctx.meta['method'].name}", own)):
            if lines := [line for option in options if (line := option.get_help_record(ctx))]:
                with formatter.section(heading):
                    formatter.write_dl(lines)

    def _own(self, ctx: click.Context) -> list[click.Parameter]:
        method = ctx.meta.get("method")
        return [_option(field) for field in fields(method)] if method else []


@click.command(cls=_WithMethodOptions)
@net_options
@click.option("--clean", required=True, metavar="DATA", help="Clean images: parquet, folder per class, npz, or Hub id.")
@sample_options
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Draws the images and drives the method.",
)
@click.option("--method", default=DEFAULT, show_default=True, metavar="NAME", help="See `untrojan methods`.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make and write into.")
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
    require_writable(out)
    if Path(model).resolve() in [(out / name).resolve() for name in (REPAIRED, CHANGES)]:
        raise ConfigError(f"{out} holds the model itself, which would be replaced; give another folder")
    with working(quiet):
        source = Checkpoint.read(model)
        network = load(source, net, mean, std)
        images = load_images(clean, samples, samples_per_class, seed)
        done = defense.repair(network, images, seed=seed, source=source)
    record = done.record.model_copy(
        update={
            "command": shlex.join(["untrojan", *ctx.obj]),
            "model": done.record.model.model_copy(update={"net": net}),
        }
    )
    replace(done, record=record).save(out, force)
    click.echo((out / RECORD).read_text("utf-8") if as_json else printable(_summary(record, out)), nl=not as_json)
    return 2 if record.status == "failed" else 0


def _method(name: str) -> type[Defense]:
    methods = discover("untrojan.defenses", Defense)
    if name not in methods:
        raise ConfigError(f"no method is named {name!r}; expected one of {', '.join(methods)}")
    return methods[name]


def _option(field: FieldInfo) -> click.Option:
    value = value_of(field)
    default = "" if field.default is MISSING else f"  [default: {field.default}]"
    return click.Option(
        [f"--{field.name.replace('_', '-')}", field.name],
        required=field.default is MISSING,
        metavar=value if "|" in value else value.upper(),
        help=field.help.replace("`", "") + default,
    )


def _summary(record: Record, out: Path) -> str:
    lines = [f"{record.status.replace('_', ' ')}: {record.reason}"]
    if record.diagnosis.targets:
        target = record.diagnosis.targets[0]
        names = record.clean.class_names or []
        name = f" ({names[target.label]})" if target.label < len(names) else ""
        lines.append(
            f"backdoor: {record.diagnosis.verdict.replace('_', ' ')}; suspected target label {target.label}{name} "
            f"holds {target.score:.0%} of the predictions after unlearning"
        )
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
