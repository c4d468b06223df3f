"""The pages about the methods are what the docstrings say, and their examples can be pasted."""

import ast
import builtins
import re
from pathlib import Path

import pytest

from untrojan.defenses.defense import Defense
from untrojan.registry import discover, documentation, fields

DOCS = Path(__file__).parents[1] / "docs"
DEFENSES = discover("untrojan.defenses", Defense)


@pytest.fixture
def make_methods(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import make_methods

    return make_methods


def example_of(name):
    text = (DOCS / "methods" / f"{name}.md").read_text("utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


def test_pages_are_what_the_docstrings_say(make_methods):
    committed = {path.name: path.read_text("utf-8") for path in (DOCS / "methods").iterdir()}
    made = make_methods.pages()
    assert sorted(committed) == sorted(made), "run `make docs`"
    for name, text in made.items():
        assert committed[name] == text, "run `make docs`"


def test_the_script_writes_the_pages_and_removes_old_ones(make_methods, monkeypatch, tmp_path):
    monkeypatch.setattr(make_methods, "FOLDER", tmp_path / "methods")
    make_methods.main()
    (tmp_path / "methods" / "gone.md").touch()
    make_methods.main()
    written = {path.name: path.read_text("utf-8") for path in (tmp_path / "methods").iterdir()}
    assert written == make_methods.pages()


@pytest.mark.parametrize(("name", "method"), DEFENSES.items(), ids=DEFENSES)
def test_a_page_says_it_all(make_methods, name, method):
    page, told = make_methods.page(method), documentation(method)
    assert page.startswith(f"# {name}\n\n{told.summary}\n")
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [field.name for field in fields(method)]
    for field, row in zip(fields(method), rows, strict=True):
        assert f"| `{field.default}` |" in row
        assert row.endswith(f"| {field.help.replace('|', '&#124;')} |")
        assert row.count("|") == 5
    assert f"--method {name} --out" in page
    assert ":class:" not in page
    words = " ".join(page.split())
    for section in ("Needs", "Cost"):
        assert told.line(section) in words


@pytest.mark.parametrize(("name", "method"), DEFENSES.items(), ids=DEFENSES)
def test_the_index_lists_every_method(name, method):
    index, told = (DOCS / "methods" / "README.md").read_text("utf-8"), documentation(method)
    assert f"| [{name}]({name}.md) | {told.summary} | {told.line('Needs')} |" in index
    assert f"| [{name}]({name}.md) | {told.line('Cost')} |" in index


@pytest.mark.parametrize("name", DEFENSES)
def test_an_example_imports_what_it_uses(name):
    tree = ast.parse(example_of(name))
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    known = {node.id for node in names if isinstance(node.ctx, ast.Store)} | set(vars(builtins))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(compile(ast.Module([node], []), name, "exec"), {})  # noqa: S102
            known |= {alias.name for alias in node.names}
    assert {node.id for node in names} <= known


@pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
def test_an_example_runs():
    exec(compile(example_of("clp"), "clp.md", "exec"), {})  # noqa: S102


def test_a_table_cell_may_hold_a_bar(make_methods):
    assert make_methods._table(("a", "b"), [("x|y", "z")]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| x&#124;y | z |",
    ]


def test_roles_become_code_and_papers_links(make_methods):
    text = "See :class:`~untrojan.mask.Mask` and :meth:`tune`, `x`."
    assert make_methods._markdown(text) == "See `Mask` and `tune`, `x`."
    assert make_methods._linked("A: B, arXiv:2305.14876.") == (
        "A: B, [arXiv:2305.14876](https://arxiv.org/abs/2305.14876)."
    )
