"""`untrojan methods`: what can repair a model."""

import inspect
import json
from dataclasses import MISSING
from typing import Any

import click

from untrojan.cli.options import json_option, value_of
from untrojan.defenses.defense import Defense
from untrojan.registry import discover, fields


@click.command()
@json_option
def methods(as_json: bool) -> int:
    """List the methods of repair."""
    found = discover("untrojan.defenses", Defense)
    if as_json:
        click.echo(json.dumps([_card(method) for method in found.values()], indent=2, default=str))
        return 0
    for name, method in found.items():
        click.echo(f"{name:<12}{_summary(method)}")
    click.echo("\n`untrojan repair --method NAME --help` lists the options of one.")
    return 0


def _card(method: type[Defense]) -> dict[str, Any]:
    return {
        "name": method.name,
        "summary": _summary(method),
        "fields": [
            {
                "name": each.name,
                "type": value_of(each),
                "required": each.default is MISSING,
                "default": None if each.default is MISSING else each.default,
                "help": each.help,
            }
            for each in fields(method)
        ],
    }


def _summary(method: type[Defense]) -> str:
    return (inspect.getdoc(method) or "").partition("\n")[0]
