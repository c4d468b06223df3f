"""The command line: every verb is a thin call of the public API.

Exit codes: 0 nothing against the model, or repaired; 1 evidence of a backdoor; 2 inconclusive or failed; 3 an input
that is not supported; 4 a wrong call; 130 interrupted. Results go to stdout, progress and errors to stderr.
"""

import importlib
import sys
import traceback
import warnings
from collections.abc import Sequence

import click

from untrojan import __version__
from untrojan.errors import ConfigError, UntrojanError, UntrojanWarning

FAILED, UNSUPPORTED, USAGE, INTERRUPTED = 2, 3, 4, 130


class _Verbs(click.Group):
    """Verbs by name, each imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return ["repair", "evaluate", "restore", "methods"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        return getattr(importlib.import_module(f"untrojan.cli.{cmd_name}"), cmd_name)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="untrojan")
def cli() -> None:
    """Find and remove backdoors in image classifiers that somebody else trained."""


def run(arguments: Sequence[str]) -> int:
    """Run one command.

    Args:
        arguments: What stands behind `untrojan` on the command line.

    Returns:
        The exit code.
    """
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.simplefilter("always", UntrojanWarning)
        try:
            return cli.main(list(arguments), prog_name="untrojan", standalone_mode=False) or 0
        except click.Abort:
            return _fail("interrupted; nothing was left half-written", INTERRUPTED)
        except click.ClickException as error:
            error.show()
            return USAGE
        except ConfigError as error:
            return _fail(str(error), USAGE)
        except UntrojanError as error:
            return _fail(str(error), UNSUPPORTED)
        except BrokenPipeError:
            return FAILED
        except OSError as error:
            return _fail(f"{error.strerror}: {error.filename}" if error.filename else str(error), FAILED)
        except Exception:
            traceback.print_exc()
            return _fail("this is a bug; please report it with the lines above", FAILED)


def main() -> None:
    """Entry point of the `untrojan` command."""
    sys.exit(run(sys.argv[1:]))


def _fail(text: str, code: int) -> int:
    click.echo(f"untrojan: {text}", err=True)
    return code


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    click.echo(f"untrojan: warning: {message}", err=True)
