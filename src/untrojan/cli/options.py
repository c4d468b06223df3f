"""Options that several verbs share."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import click

from untrojan.data import CleanSet
from untrojan.progress import Bars, Lines, Silent, reporting

Command = Callable[..., Any]


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
        click.option("--samples-per-class", type=int, metavar="N", help="Draw exactly N images of each class."),
        click.option("--samples", type=int, metavar="N", help="Draw N images, spread evenly over the classes."),
    ):
        command = option(command)
    return command


def quiet_option(command: Command) -> Command:
    """Add `--quiet`."""
    return click.option("-q", "--quiet", is_flag=True, help="Show no progress.")(command)


def json_option(command: Command) -> Command:
    """Add `--json`."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(command)


def progress(quiet: bool) -> AbstractContextManager[None]:
    """Report stages as bars on a terminal, as plain lines elsewhere, or not at all."""
    if quiet:
        return reporting(Silent())
    return reporting(Bars() if sys.stderr.isatty() else Lines())


def load_images(path: str, samples: int | None, samples_per_class: int | None, seed: int = 0) -> CleanSet:
    """Read images as `--samples` and `--samples-per-class` say."""
    return CleanSet.load(path, samples=samples, samples_per_class=samples_per_class, seed=seed)
