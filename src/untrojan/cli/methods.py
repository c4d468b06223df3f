"""`untrojan methods`: what can repair a model."""

import json
from typing import Any

import click

from untrojan.cli.options import field_cards, json_option, show_cards
from untrojan.defenses.defense import Defense
from untrojan.registry import discover, documentation


@click.command()
@json_option
def methods(as_json: bool) -> int:
    """List the methods of repair: what each does, what it needs and costs, and its paper."""
    cards = [_card(method) for method in discover("untrojan.defenses", Defense).values()]
    if as_json:
        click.echo(json.dumps(cards, indent=2, default=str))
        return 0
    show_cards(
        cards,
        lambda card: {"needs": card["needs"], "cost": card["cost"], "paper": "".join(card["references"][:1])},
    )
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
        "fields": field_cards(method),
    }
