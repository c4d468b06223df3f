import dataclasses
import json
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Field

from untrojan.defenses.defense import Defense
from untrojan.defenses.rnp import RNP
from untrojan.defenses.tuning import Tuning
from untrojan.errors import ConfigError
from untrojan.lab.attack import Attack
from untrojan.lab.attacks.additive import Additive
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.recipe import Recipe
from untrojan.registry import config, describe, discover, documentation, fields, identity, parse
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.scanner import Scanner


class Cook(ABC):
    name: ClassVar[str]

    @abstractmethod
    def cook(self): ...


@config
class Stew(Cook):
    """Slow food.

    Attributes:
        hours: How long, at least
            one hour: no less.
        pot (Path): Where
    """

    name: ClassVar[str] = "stew"
    hours: Annotated[int, Field(ge=1)] = 2
    pot: Path

    def cook(self): ...


@config
class Soup(Stew):
    """Thin food.

    Args:
        style: Clear or not.

        spices: In order.

    Returns:
        nothing: This is not a field.
    """

    name: ClassVar[str] = "soup"
    style: Literal["clear", "thick"] = "clear"
    spices: list[str] = dataclasses.field(default_factory=lambda: ["salt"])
    secret: float | None = None


METHOD = """
from typing import ClassVar
from untrojan.lab.attack import Attack
from untrojan.lab.attacks.badnets import BadNets
from untrojan.registry import config

class Abstract(Attack):
    name: ClassVar[str] = "abstract"

@config
class Found(Attack):
    {name}
    size: int = 1

    def _trigger(self, images):
        return images
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package on the path; call it with file names and sources."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(**modules):
        folder = tmp_path / "kitchen"
        folder.mkdir()
        (folder / "__init__.py").touch()
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(source)
        return "kitchen"

    yield write
    for name in [name for name in sys.modules if name.split(".")[0] == "kitchen"]:
        del sys.modules[name]


def test_discover_lists_every_attack_by_name():
    found = discover("untrojan.lab.attacks", Attack)
    assert {"additive", "badnets", "masked"} <= set(found)
    assert list(found) == sorted(found)
    assert all(cls.name == name for name, cls in found.items())


def test_adding_a_method_is_one_file(package):
    name = package(
        zebra=METHOD.format(name='name: ClassVar[str] = "z"'),
        ape=METHOD.format(name='name: ClassVar[str] = "a"'),
    )
    assert list(discover(name, Attack)) == ["a", "z"], "neither abstract classes nor imported ones"
    assert describe(parse("z:size=4", name, Attack)) == {"size": 4}


def test_two_methods_of_one_name_are_refused(package):
    source = METHOD.format(name='name: ClassVar[str] = "twin"')
    with pytest.raises(ConfigError, match=r"'twin'.*kitchen\.one\.Found.*kitchen\.two\.Found"):
        discover(package(one=source, two=source), Attack)


def test_a_method_without_a_name_is_refused(package):
    with pytest.raises(ConfigError, match=r"`name` on kitchen\.one\.Found"):
        discover(package(one=METHOD.format(name="")), Attack)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("badnets", BadNets()),
        ("badnets:", BadNets()),
        ("badnets:pattern=grid", BadNets(pattern="grid")),
        ("badnets:size=4,row=27,col=27,value=1", BadNets(size=4, row=27, col=27, value=1.0)),
    ],
)
def test_parse_builds_what_the_constructor_builds(spec, expected):
    assert parse(spec, "untrojan.lab.attacks", Attack) == expected


def test_parse_keeps_commas_and_equals_signs_in_values(tmp_path):
    image, mask = tmp_path / "a,b.png", tmp_path / "m=n,o.npy"
    image.touch()
    mask.touch()
    attack = parse(f"masked:image={image},mask={mask}", "untrojan.lab.attacks", Attack)
    assert describe(attack) == {"image": str(image), "mask": str(mask)}


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("badnet", "no attack is named 'badnet'; expected one of adaptive-blend, additive, awp, badnets"),
        ("badnets:sizes=4", "`sizes` is not a field"),
        ("badnets:name=x", "`name` is not a field"),
        ("badnets:size=four", "`size`: input should be a valid integer"),
        ("badnets:size=four", "got 'four'"),
        ("badnets:size=" + "x" * 300, "got '" + "x" * 199 + "…"),
        ("badnets:size=0", "`size`: input should be greater than or equal to 1, got '0'"),
        ("badnets:value=2", "`value`: input should be less than or equal to 1, got '2'"),
        ("badnets:pattern=dot", "input should be 'square' or 'grid', got 'dot'"),
        (
            "badnets:sizes=4",
            "it takes pattern=square, size=3, row, col, value=1.0",
        ),
        ("badnets:size", "'size' is no key=value"),
        ("badnets:size=3,size=4", "'size=4' is given twice"),
        ("badnets:pattern=grid,size=4", "expected size 3 with the grid, got 4"),
        ("additive", "`image` must be given; it takes image"),
        ("additive:image=/no/such.png", "`image`: path does not point to a file, got '/no/such.png'"),
    ],
)
def test_parse_says_what_is_wrong_with_a_spec(spec, text):
    with pytest.raises(ConfigError) as error:
        parse(spec, "untrojan.lab.attacks", Attack)
    assert text in str(error.value)


def test_a_wrong_call_tells_about_all_fields_at_once():
    with pytest.raises(ConfigError, match=r"stew: .*`hours`: .*; `pot` must be given; `lid` is not a field"):
        Stew(hours=0, lid=True)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: RNP(nosuch=1), r"^rnp: `nosuch` is not a field; it takes budget=0.02, .*recover_epochs=20"),
        (lambda: RNP(unlearn_epochs="many"), "^rnp: `unlearn_epochs`: .* valid integer, .*got 'many'; it takes "),
        (lambda: Recipe(epoch=3), "^Recipe: `epoch` is not a field; it takes epochs=30, "),
        (lambda: dataclasses.replace(RNP(), budget=2), "^rnp: `budget`: .*less than 1, got 2; it takes "),
    ],
)
def test_a_wrong_call_is_a_config_error(call, text):
    with pytest.raises(ConfigError, match=text):
        call()


def test_fields_are_given_by_name_alone():
    with pytest.raises(TypeError, match=r"RNP.__init__\(\) takes 1 positional argument"):
        RNP(0.1)


def test_fields_give_types_defaults_and_help():
    hours, pot, style, spices, secret = fields(Soup)
    assert hours == ("hours", int, 2, "How long, at least one hour: no less.")
    assert pot == ("pot", Path, dataclasses.MISSING, "Where")
    assert style == ("style", Literal["clear", "thick"], "clear", "Clear or not.")
    assert spices == ("spices", list[str], ["salt"], "In order.")
    assert secret == ("secret", float | None, None, "")


@pytest.mark.parametrize("cls", discover("untrojan.lab.attacks", Attack).values())
def test_every_field_of_every_attack_has_help(cls):
    assert all(field.help for field in fields(cls))


class Told(Cook):
    """Told: cook
    whatever there is.

    First paragraph,
    on two lines.

    Cost: not a section, but text with a colon at its end:

    Attributes:
        salt: How much.

    Needs:
        Time,
        and water.

    References:
        One, Two: A title that goes on
        over two lines. Journal 2020.

        Three: Another one, arXiv:1.2.
        Four, Five: The last, 2022.

    Deviations:
        Here:

        * one
          thing
    """

    def cook(self): ...


def test_documentation_takes_the_docstring_apart():
    told = documentation(Told)
    assert told.summary == "Told: cook"
    assert told.text.startswith("whatever there is.\n\nFirst paragraph,\non two lines.\n\nCost: not a section")
    assert list(told.sections) == ["Attributes", "Needs", "References", "Deviations"]
    assert told.sections["Attributes"] == "salt: How much."
    assert told.sections["Needs"].startswith("Time,\nand water.")
    assert told.sections["Deviations"] == "Here:\n\n* one\n  thing"
    assert told.line("Attributes") == "salt: How much."
    assert told.line("Cost") == ""
    assert told.references == [
        "One, Two: A title that goes on over two lines. Journal 2020.",
        "Three: Another one, arXiv:1.2.",
        "Four, Five: The last, 2022.",
    ]


def test_documentation_of_what_is_not_documented():
    class Silent(Told):
        pass

    assert documentation(Silent) == ("", "", {})
    assert documentation(Silent).references == []


@pytest.mark.parametrize(
    "cls",
    [
        *discover("untrojan.defenses", Defense).values(),
        *discover("untrojan.scanners", Scanner).values(),
        *discover("untrojan.scanners.detectors", Detector).values(),
    ],
)
def test_every_method_says_what_its_users_must_know(cls):
    told = documentation(cls)
    assert told.summary.endswith(".")
    assert told.text
    assert all(told.line(section) for section in ("Needs", "Cost", "Example", "References", "Deviations"))
    if issubclass(cls, Tuning) and cls.name != "auto":
        assert "held" in told.line("Deviations")
    assert all(reference.endswith(".") for reference in told.references)
    assert all(field.help for field in fields(cls))


def test_describe_is_json_and_builds_the_same_again(tmp_path):
    soup = Soup(pot=tmp_path, secret=0.5)
    told = describe(soup)
    assert told == {
        "hours": 2,
        "pot": str(tmp_path),
        "style": "clear",
        "spices": ["salt"],
        "secret": 0.5,
    }
    assert Soup(**json.loads(json.dumps(told))) == soup


def test_the_identity_of_a_method_is_what_its_files_hold(tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for file, content in zip(files, (b"one", b"one", b"two"), strict=True):
        file.write_bytes(content)
    one, same, other = (identity(Additive(image=file)) for file in files)
    assert one == same != other
    gone = Additive(image=files[0])
    files[0].unlink()
    with pytest.raises(ConfigError, match=r"cannot read .*a\.png"):
        identity(gone)


def test_methods_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BadNets().size = 4
