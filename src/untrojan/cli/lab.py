"""`untrojan lab`: what evaluation needs, and a defender never does."""

import json
from collections.abc import Mapping
from typing import Any

import click

from untrojan.cli.options import field_cards, json_option, show_cards
from untrojan.cli.train import train
from untrojan.cli.zoo import zoo
from untrojan.lab.attack import Attack
from untrojan.registry import discover, documentation


@click.group()
def lab() -> None:
    """Plant backdoors: the attacks, and models to measure defenses on."""


lab.add_command(train)
lab.add_command(zoo)


@lab.command()
@json_option
def attacks(as_json: bool) -> int:
    """List the attacks: what each does, how it poisons, its fields, and its paper."""
    cards = [_card(attack) for attack in discover("untrojan.lab.attacks", Attack).values()]
    if as_json:
        click.echo(json.dumps(cards, indent=2))
        return 0
    show_cards(
        cards,
        lambda card: {"poisons": _poisons(card), "fields": _fields(card), "paper": card["references"][0]},
    )
    click.echo("\n`untrojan evaluate --attack NAME:field=value,field=value` puts the trigger of one on test images.")
    return 0


def _card(attack: type[Attack]) -> dict[str, Any]:
    told = documentation(attack)
    return {
        "name": attack.name,
        "summary": told.summary,
        "text": told.text,
        "rate": attack.rate,
        "covers": attack.covers,
        "clean_label": attack.clean_label,
        "changes_batches": attack.changes_batches(),
        "deviations": told.line("Deviations"),
        "references": told.references,
        "fields": field_cards(attack),
    }


def _poisons(card: Mapping[str, Any]) -> str:
    of = "every batch, anew" if card["changes_batches"] else "all images"
    whose = "the target class, labels unchanged" if card["clean_label"] else f"{of}, from other classes"
    covers = f"; cover samples: {card['covers']:g} times as many" if card["covers"] else ""
    return f"{100 * card['rate']:g} % of {whose}{covers}"


def _fields(card: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{each['name']}={each['type']}" if each["required"] else f"{each['name']}={each['default']}"
        for each in card["fields"]
    )
