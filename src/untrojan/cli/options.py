"""Options that several verbs share, and what stands behind them."""

import contextlib
import os
import sys
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import click

from untrojan.data import CleanSet
from untrojan.errors import ConfigError
from untrojan.progress import Bars, Lines, Reporter, Silent, reporting
from untrojan.registry import FieldInfo

Command = Callable[..., Any]

_AT_LEAST_ONE = click.IntRange(min=1)


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


def net_options(command: Command) -> Command:
    """Add what is needed to open a model: the file, the architecture, and normalization."""
    for option in (
        click.option("--std", type=Numbers(), metavar="S,S,S", help="Deviation per channel; comes with --mean."),
        click.option(
            "--mean",
            type=Numbers(),
            metavar="M,M,M",
            help="Mean per channel, where the network was trained on normalized images.",
        ),
        click.option(
            "--net",
            required=True,
            help="Architecture, such as small-vgg:classes=10, or package.module:callable of your own.",
        ),
        click.argument("model"),
    ):
        command = option(command)
    return command


def sample_options(command: Command) -> Command:
    """Add the options that draw a subset of images."""
    for option in (
        click.option(
            "--samples-per-class", type=_AT_LEAST_ONE, metavar="N", help="Draw exactly N images of each class."
        ),
        click.option(
            "--samples", type=_AT_LEAST_ONE, metavar="N", help="Draw N images, spread evenly over the classes."
        ),
    ):
        command = option(command)
    return command


def quiet_option(command: Command) -> Command:
    """Add `--quiet`."""
    return click.option("-q", "--quiet", is_flag=True, help="Show no progress and no warnings.")(command)


def json_option(command: Command) -> Command:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def value_of(field: FieldInfo) -> str:
    """What to give for a field of a method: its type, or its choices."""
    if typing.get_origin(field.annotation) is Literal:
        return "|".join(map(str, typing.get_args(field.annotation)))
    return getattr(field.annotation, "__name__", str(field.annotation))


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


def require_writable(path: Path) -> None:
    """Raise when `path` could not be written, so that nobody waits for a run to hear it."""
    folder = path if path.is_dir() else next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ConfigError(f"cannot make {path}: {folder} is a file; give another path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot make {path}: there is no permission to write into {folder}; give another path")


def load_images(path: str, samples: int | None, samples_per_class: int | None, seed: int = 0) -> CleanSet:
    """Read images as `--samples` and `--samples-per-class` say."""
    return CleanSet.load(path, samples=samples, samples_per_class=samples_per_class, seed=seed)
