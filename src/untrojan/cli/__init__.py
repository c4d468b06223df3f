"""The command line: every verb is a thin call of the public API.

Results go to stdout, progress and errors to stderr. What a command exits with is below, and README.md explains it.
"""

import contextlib
import importlib
import itertools
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from untrojan import __version__
from untrojan.errors import ConfigError, UntrojanError, UntrojanWarning, visible

EXIT_CODES = {
    "not_found": 0,
    "found": 1,
    "inconclusive": 2,
    "repaired": 0,
    "nothing_to_repair": 0,
    "failed": 2,
    "trained": 0,
    "backdoored": 0,
    "attack_did_not_take": 2,
}
"""What a command that came to its end exits with, by the verdict or the status of what it made."""

FAILED, UNSUPPORTED, USAGE, UNFINISHED, INTERRUPTED = 2, 3, 4, 5, 130
"""Some of many failed; an input that cannot be used; a wrong call; a full disk or a bug; Ctrl+C or SIGTERM."""

VERBS = {
    "scan": "Say whether a model carries a backdoor, and show the evidence.",
    "screen": "Rank the samples that a model was trained on by suspicion.",
    "repair": "Remove the backdoor of a model, and verify the result.",
    "evaluate": "Measure accuracy, and the success of an attack that is known.",
    "restore": "Undo a repair, bit for bit.",
    "methods": "List the methods of repair.",
    "lab": "Plant backdoors, to measure defenses on them.",
    "bench": "Measure and compare defenses on models whose attack is known.",
}


class _Verbs(click.Group):
    """Verbs by name, each imported when it is called, for torch takes seconds to import."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        verb = getattr(importlib.import_module(f"untrojan.cli.{cmd_name}"), cmd_name)
        importlib.import_module("torch").set_flush_denormal(True)  # before it starts threads, which take this over
        return verb


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="untrojan")
def cli() -> None:
    """Find and remove backdoors in image classifiers that somebody else trained."""


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: What stands behind `untrojan` on the command line; verbs find it as the context's `obj`.

    Returns:
        The exit code.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", UntrojanWarning)
        try:
            return _invoke(list(arguments))
        except click.exceptions.Exit as end:
            return end.exit_code
        except KeyboardInterrupt as end:
            return _fail("; ".join(["interrupted", "no file was left half-written", *map(str, end.args)]), INTERRUPTED)
        except click.UsageError as error:
            return _wrong_call(error, arguments)
        except ConfigError as error:
            return _fail(str(error), USAGE)
        except UntrojanError as error:
            return _fail(str(error), UNSUPPORTED)
        except SystemExit:
            return _fail("the code behind --net ended the program with sys.exit; a network must not do that", USAGE)
        except BrokenPipeError:
            return UNFINISHED
        except OSError as error:
            return _fail(_reason(error), UNFINISHED)
        except Exception:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            return _fail("this is a bug; please report it with the lines above", UNFINISHED)


def main() -> None:
    """Entry point of the `untrojan` command."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    code = run(sys.argv[1:]) if sys.stdout else _fail("stdout is closed; expected a place for the result", USAGE)
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            # The reader went away, or the disk is full; Python would try again at its end and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or UNFINISHED
    sys.exit(code)


def _invoke(arguments: list[str]) -> int:
    for before, argument in itertools.pairwise(("untrojan", *arguments)):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(f"expected arguments in UTF-8, got {argument!r}; rename the file") from error
        if not argument or re.fullmatch(r"--[\w-]+=", argument):
            raise ConfigError(f"expected a value behind {argument or before}, got an empty one")
    with cli.make_context("untrojan", list(arguments), obj=arguments) as ctx:
        return cli.invoke(ctx) or 0


def _wrong_call(error: click.UsageError, arguments: Sequence[str]) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return USAGE
    command = error.ctx.command_path if error.ctx else " ".join(["untrojan", *arguments[:1]])
    if error.ctx and (method := error.ctx.meta.get("method")):
        command += f" --method {method.name}"
    return _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", USAGE)


def _reason(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    return f"cannot finish: {error.strerror or error}{where}; no file was left half-written, so run it again when cured"


def _fail(text: str, code: int) -> int:
    _say(text)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    _say(f"warning: {message}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(f"untrojan: {visible(text)}", err=True)
