"""`untrojan methods`: what can repair a model."""

import json
from dataclasses import MISSING
from typing import Any

import click

from untrojan.cli.options import json_option, value_of
from untrojan.defenses.defense import Defense
from untrojan.registry import discover, documentation, fields


@click.command()
@json_option
def methods(as_json: bool) -> int:
    """List the methods of repair: what each does, what it needs and costs, and its paper."""
    cards = [_card(method) for method in discover("untrojan.defenses", Defense).values()]
    if as_json:
        click.echo(json.dumps(cards, indent=2, default=str))
        return 0
    width = max(len(card["name"]) for card in cards)
    for card in cards:
        click.echo(f"{card['name']:<{width}}  {card['summary']}")
    for card in cards:
        click.echo(f"\n{card['name']}")
        for topic, text in (("needs", card["needs"]), ("cost", card["cost"]), ("paper", card["references"][:1])):
            click.echo(f"  {topic:<5}  {''.join(text)}")
    click.echo("\n`untrojan repair --method NAME --help` lists the options of one.")
    return 0


def _card(method: type[Defense]) -> dict[str, Any]:
    told = documentation(method)
    return {
        "name": method.name,
        "summary": told.summary,
        "text": told.text,
        "needs": told.line("Needs"),
        "cost": told.line("Cost"),
        "references": told.references,
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
