"""`untrojan lab`: the list of attacks."""

import json

import pytest

from untrojan.cli import run
from untrojan.lab.attack import Attack
from untrojan.registry import discover, documentation, fields

ATTACKS = discover("untrojan.lab.attacks", Attack)


def test_attacks_are_listed_for_people(capsys):
    assert run(["lab", "attacks"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [line.split()[0] for line in out.splitlines()[: len(ATTACKS)]] == list(ATTACKS)
    assert "\nwanet\n  poisons  10 % of every batch, anew, from other classes; cover samples: 2 times as many\n" in out
    assert "\nblend\n  poisons  10 % of all images, from other classes\n" in out
    assert "\nsig\n  poisons  100 % of the target class, labels unchanged\n" in out
    assert "image=Path, mask=Path" in out
    assert "k=4, s=0.5, covers=2.0, seed=0" in out


def test_attacks_are_listed_for_machines(capsys):
    assert run(["lab", "attacks", "--json"]) == 0
    cards = json.loads(capsys.readouterr().out)
    assert [card["name"] for card in cards] == list(ATTACKS)
    for card, attack in zip(cards, ATTACKS.values(), strict=True):
        assert (card["rate"], card["covers"], card["clean_label"]) == (attack.rate, attack.covers, attack.clean_label)
        assert card["changes_batches"] == attack.changes_batches()
        assert card["summary"].endswith(".")
        assert card["deviations"]
        assert [field["name"] for field in card["fields"]] == [field.name for field in fields(attack)]
        assert all(field["help"] and field["type"] for field in card["fields"])


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_every_attack_says_what_its_users_must_know(attack):
    told = documentation(attack)
    assert told.summary.endswith(".")
    assert told.text
    assert all(told.line(section) for section in ("Example", "References", "Deviations"))
    assert all(reference.endswith(".") for reference in told.references)


def test_the_group_and_its_verb_have_help(capsys):
    for arguments in (["lab", "--help"], ["lab", "attacks", "-h"]):
        assert run(arguments) == 0
        assert capsys.readouterr().out.startswith("Usage: untrojan lab")
    assert run(["--help"]) == 0
    assert " lab " in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["lab"], ["lab", "attack"], ["lab", "attacks", "blend"]])
def test_wrong_calls_are_told_so(capsys, arguments):
    assert run(arguments) == 4
    assert capsys.readouterr().err
