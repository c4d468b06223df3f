"""Options that several verbs share, and what stands behind them."""

import contextlib
import os
import re
import shlex
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from difflib import get_close_matches
from functools import reduce
from pathlib import Path
from typing import Any, Literal, TypeVar

import click
from pydantic import ValidationError
from torch import nn

from untrojan.data import CleanSet
from untrojan.device import AUTO, chosen
from untrojan.errors import ConfigError
from untrojan.progress import Bars, Lines, Reporter, Silent, reporting
from untrojan.record import RunRecord
from untrojan.registry import FieldInfo, documentation, fields, told
from untrojan.sources import load
from untrojan.sources.files import Checkpoint
from untrojan.writing import require_file, require_free

Command = Callable[..., Any]
R = TypeVar("R", bound=RunRecord)
T = TypeVar("T")

SOURCES = "parquet, npz, folder per class, saved data set, or Hub id"
"""What images are read from, for the help of an option."""

_AT_LEAST_ONE = click.IntRange(min=1)


class TargetLabel(click.ParamType):
    """What an attacker wants: a class number, or all-to-all."""

    name = "target"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Turn `7` into a number."""
        if value == "all-to-all" or isinstance(value, int):
            return value
        if not value.isdecimal():
            raise ConfigError(f"expected a class number or all-to-all as target, got {value!r}")
        return int(value)


class Numbers(click.ParamType):
    """Numbers separated by commas, such as one mean per channel."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Turn `0.49,0.48,0.45` into numbers."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"expected numbers separated by commas, got {value!r}", param, ctx)


class WithMethodOptions(click.Command):
    """A command with a `--method` that also takes every field of the chosen method as an option.

    The class that was chosen is in the context's `meta`, under `method`.

    Args:
        methods: Gives the classes to choose from, by name.
    """

    def __init__(self, *args: Any, methods: Callable[[], Mapping[str, type]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.methods = methods

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Find the method first, so that its options are known."""
        peek = self.make_parser(ctx)
        peek.ignore_unknown_options = True
        given, _, _ = peek.parse_args(list(args))
        option = next(option for option in self.params if option.name == "method")
        name, methods = given.get("method", option.default), self.methods()
        if name not in methods:
            raise ConfigError(f"no method is named {name!r}; expected one of {', '.join(methods)}")
        ctx.meta["method"] = methods[name]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            asked = error.option_name.lstrip("-")  # without the hyphens, in which any two options are alike
            near = [each for each in error.possibilities or () if get_close_matches(asked, [each.lstrip("-")])]
            raise click.NoSuchOption(
                error.option_name, f"{name} has no option {error.option_name}.", near, ctx
            ) from error

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """List the options of the command and of the method."""
        return super().get_params(ctx) + self._own(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of the method under a heading of their own, then its deviations."""
        own = self._own(ctx)
        shared = self.get_params(ctx)[: -len(own) or None]
        for heading, options in (("Options", shared), (f"Options of {ctx.meta['method'].name}", own)):
            if lines := [line for option in options if (line := option.get_help_record(ctx))]:
                with formatter.section(heading):
                    formatter.write_dl(lines)
        if deviations := documentation(ctx.meta["method"]).sections.get("Deviations"):
            with formatter.section("Deviations"):
                formatter.write_text(re.sub(r"\n +", " ", deviations).replace("\n*", "\n\n*"))

    def _own(self, ctx: click.Context) -> list[click.Parameter]:
        method = ctx.meta.get("method")
        return options_of(method) if method else []


def options_of(config: type) -> list[click.Parameter]:
    """Give every field of a class as an option; :func:`made_of` makes it of what was given."""
    return [_option(field) for field in fields(config)]


def _option(field: FieldInfo) -> click.Option:
    value = value_of(field).removesuffix(" | None")
    default = "" if field.default in (MISSING, None) else f"  [default: {field.default}]"
    return click.Option(
        [_flag(field.name), field.name],
        required=field.default is MISSING,
        metavar=value if "|" in value else value.upper(),
        help=field.help.replace("`", "") + default,
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def in_order(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """Add options so that `--help` lists them in this order."""
    return lambda command: reduce(lambda made, option: option(made), reversed(options), command)


def run_options(method: str, help: str) -> Callable[[Command], Command]:
    """Add what every run of a method takes: a model, clean images, the method, and where to write.

    Args:
        method: The method that runs where none is chosen.
        help: What to say about `--method`.
    """
    return in_order(
        net_options,
        clean_option,
        sample_options,
        seed_option("Draws the images and drives the method."),
        click.option("--method", default=method, show_default=True, metavar="NAME", help=help),
        output_options,
    )


def as_called(record: R, ctx: click.Context) -> R:
    """Put into a record what only the command line knows: the command, and how the network was named."""
    command = shlex.join(["untrojan", *ctx.obj])
    return record.model_copy(
        update={"command": command, "model": record.model.model_copy(update={"net": ctx.params["net"]})}
    )


device_option = click.option(
    "--device", default=AUTO, show_default=True, help="Such as cpu or cuda:1; auto takes a GPU where there is one."
)
"""`--device`, which :func:`untrojan.device.chosen` takes."""

net_options = in_order(
    click.argument("model"),
    click.option(
        "--net",
        required=True,
        help="Architecture, such as small-vgg:classes=10, or package.module:callable of your own.",
    ),
    click.option(
        "--mean",
        type=Numbers(),
        metavar="M,M,M",
        help="Mean per channel, where the network was trained on normalized images.",
    ),
    click.option("--std", type=Numbers(), metavar="S,S,S", help="Deviation per channel; comes with --mean."),
    device_option,
)
"""What is needed to open a model: the file, the architecture, normalization, and the device."""

clean_option = click.option("--clean", required=True, metavar="DATA", help=f"Clean images: {SOURCES}.")
"""`--clean`."""

sample_options = in_order(
    click.option("--samples", type=_AT_LEAST_ONE, metavar="N", help="Draw N images, spread evenly over the classes."),
    click.option("--samples-per-class", type=_AT_LEAST_ONE, metavar="N", help="Draw exactly N images of each class."),
)
"""What draws a subset of images."""

attack_options = in_order(
    click.option("--attack", metavar="SPEC", help="Such as badnets:size=4,row=27,col=27,value=1; comes with --target."),
    click.option("--target", type=TargetLabel(), help="Class that the attacker wants, or all-to-all."),
)
"""`--attack` and `--target`."""

output_options = in_order(
    click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to make and write into."),
    click.option("--force", is_flag=True, help="Replace what an earlier run left in the folder."),
)
"""`--out` and `--force`."""

quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress and no warnings.")
"""`--quiet`."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
"""`--json`."""


def seed_option(help: str) -> Callable[[Command], Command]:
    """Add `--seed`; `help` says what it decides."""
    return click.option(
        "--seed", type=click.IntRange(0, 2**32 - 1), metavar="N", default=0, show_default=True, help=help
    )


def value_of(field: FieldInfo) -> str:
    """What to give for a field of a method: its type, or its choices."""
    if typing.get_origin(field.annotation) is Literal:
        return "|".join(map(str, typing.get_args(field.annotation)))
    return getattr(field.annotation, "__name__", str(field.annotation))


def field_cards(method: type) -> list[dict[str, Any]]:
    """Give the fields of a method for a list in JSON."""
    return [
        {
            "name": each.name,
            "type": value_of(each),
            "required": each.default is MISSING,
            "default": None if each.default is MISSING else each.default,
            "help": each.help,
        }
        for each in fields(method)
    ]


def show_cards(cards: Sequence[Mapping[str, Any]], topics: Callable[[Mapping[str, Any]], Mapping[str, str]]) -> None:
    """Print a line for each method, then for each what there is to say on its topics."""
    width = max(len(card["name"]) for card in cards)
    for card in cards:
        click.echo(f"{card['name']:<{width}}  {card['summary']}")
    for card in cards:
        click.echo(f"\n{card['name']}")
        told = topics(card)
        for topic, text in told.items():
            click.echo(f"  {topic:<{max(map(len, told))}}  {text}")


@contextlib.contextmanager
def working(quiet: bool) -> Iterator[None]:
    """Report stages as bars on a terminal, as plain lines elsewhere, or not at all; stdout is for results only.

    What a network of the user's own prints goes to stderr.
    """
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings(), reporting(_reporter(quiet)):
        if quiet:
            warnings.simplefilter("ignore")
        yield


def _reporter(quiet: bool) -> Reporter:
    terminal = sys.stderr
    if quiet or not terminal:  # there is none where the caller closed it
        return Silent()
    return Bars() if terminal.isatty() else Lines()


def _require_writable(path: Path) -> None:
    real = Path(os.path.realpath(path))
    folder = real if real.is_dir() else next(parent for parent in real.parents if parent.exists())
    if not folder.is_dir():
        raise ConfigError(f"cannot make {path}: {folder} is a file; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot make {path}: there is no permission to write into {folder}; give another path")


def require_output(out: Path, force: bool) -> None:
    """Raise when a run could not be written to `out`, so that nobody waits for it to hear that."""
    require_free(out, force)
    _require_writable(out)


def require_file_output(out: Path) -> None:
    """Raise when a file could not be written to `out`, so that nobody waits for it to hear that."""
    require_file(out)
    _require_writable(out)


def method_of(ctx: click.Context) -> Any:
    """Make the method that was chosen, with the options of its own that were given."""
    return made_of(ctx.meta["method"], ctx.params)


def made_of(config: type[T], params: Mapping[str, Any]) -> T:
    """Make what :func:`options_of` gave the options of; fields left out have their defaults."""
    given = {field.name: params[field.name] for field in fields(config)}
    try:
        return config(**{name: value for name, value in given.items() if value is not None})
    except ConfigError as error:
        if isinstance(error.__cause__, ValidationError):
            raise ConfigError(told(config, error.__cause__, _flag)) from error
        raise


def open_inputs(ctx: click.Context) -> tuple[nn.Module, CleanSet, Checkpoint]:
    """Read what every run on a model needs: the network, the clean images, and the file the network came from."""
    given = ctx.params
    source = Checkpoint.read(given["model"])
    network = load(source, given["net"], given["mean"], given["std"]).to(chosen(given["device"]))
    return network, load_images(given["clean"], given["samples"], given["samples_per_class"], given["seed"]), source


def load_images(path: str, samples: int | None, samples_per_class: int | None, seed: int = 0) -> CleanSet:
    """Read images as `--samples` and `--samples-per-class` say."""
    return CleanSet.load(path, samples=samples, samples_per_class=samples_per_class, seed=seed)
