"""The wall: what defends cannot know attacks, and importing untrojan stays cheap."""

import ast
import importlib.util
import inspect
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import untrojan
from untrojan.defenses.defense import Defense
from untrojan.registry import discover
from untrojan.scanners.scanner import Scanner

ROOT = Path(untrojan.__file__).parent
LAB = "untrojan.lab"
HEAVY = {"transformers", "ray", "bokeh", "matplotlib", "datasets", "pyarrow", "sklearn", "jinja2", "rich", "torch"}


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in ROOT.rglob("*.py")}
DEFENDERS = sorted(name for name in FILES if not name.startswith((LAB, "untrojan.cli", "untrojan.__main__")))


def statements(tree):
    """All nodes that run, which those under `if TYPE_CHECKING` do not."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from (other, *statements(other))
        else:
            yield node
            yield from statements(node)


@cache
def imports(name):
    """Every name that a module imports, also inside its functions, with `from package import` resolved."""
    return list(_imports(name))


def _imports(name):
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in statements(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            home = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                yield home
                yield (
                    untrojan._HOMES.get(alias.name, f"{home}.{alias.name}")
                    if home == "untrojan"
                    else (f"{home}.{alias.name}")
                )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and name != "untrojan":
            yield node.value


def reached(name):
    seen, waiting = {name}, [name]
    while waiting:
        for imported in imports(waiting.pop()):
            if imported in FILES and imported not in seen:
                seen.add(imported)
                waiting.append(imported)
    return seen


@pytest.mark.parametrize("name", DEFENDERS)
def test_defenders_do_not_reach_the_lab(name):
    assert not [each for each in imports(name) if each == LAB or each.startswith(f"{LAB}.")]
    assert not [each for each in reached(name) if each == LAB or each.startswith(f"{LAB}.")]


def test_the_walk_sees_what_it_must():
    assert {"untrojan.defenses.rnp", "untrojan.scanners.unlearning", "untrojan.mask", "untrojan"} <= set(DEFENDERS)
    assert {"untrojan.fit", "untrojan.scanners.scanner", "untrojan.record"} <= reached("untrojan.defenses.rnp")
    assert LAB + ".attack" in reached("untrojan.lab.evaluate")
    assert "untrojan.report" in reached("untrojan.defenses.defense"), "an import inside a function"


@pytest.mark.parametrize("method", [Defense.repair, Defense._repair, Scanner.scan, Scanner._scan])
def test_signatures_hold_no_test_data(method):
    assert set(inspect.signature(method).parameters) <= {"self", "model", "clean", "diagnosis", "seed", "source"}


@pytest.mark.parametrize(
    ("package", "base", "final"),
    [("untrojan.defenses", Defense, "repair"), ("untrojan.scanners", Scanner, "scan")],
)
def test_methods_do_not_replace_what_is_common(package, base, final):
    found = discover(package, base)
    assert found
    assert all(getattr(cls, final) is getattr(base, final) for cls in found.values())


def loaded_by(code):
    out = subprocess.run(
        [sys.executable, "-c", f"import sys; {code}; print(*{{name.partition('.')[0] for name in sys.modules}})"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(out.stdout.split())


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import untrojan", set()),
        ("import untrojan.cli", {"rich"}),
        ("from untrojan import CleanSet, RNP, UnlearningScanner, repair, load", {"torch"}),
    ],
)
def test_imports_stay_light(code, allowed):
    assert loaded_by(code) & HEAVY <= allowed


def test_every_public_name_is_there():
    assert untrojan.__all__ == sorted(untrojan.__all__)
    assert all(getattr(untrojan, name) is not None for name in untrojan.__all__)
    assert set(dir(untrojan)) >= set(untrojan.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = untrojan.nothing
