"""Write docs/methods/ from the docstrings of the methods: one page each, and a table of all."""

import ast
import builtins
import re
import sys
from dataclasses import MISSING
from doctest import DocTestParser
from pathlib import Path
from types import ModuleType
from typing import Any

from untrojan.cli.options import value_of
from untrojan.defenses.defense import Defense
from untrojan.registry import FieldInfo, discover, documentation, fields

FOLDER = Path(__file__).parent / "methods"

PAGE = """\
# {name}

{summary}

{text}

## Options

{options}

In Python an option is a field of `{cls}`, on the command line `--name`, with hyphens for underscores.

## Needs

{needs}

## Cost

{cost}

## In Python

```python
{example}
```

## On the command line

```
untrojan repair model.safetensors --net resnet18:classes=10 --clean images/ --method {name} --out runs/{name}
```

## References

{references}

## Deviations

{deviations}
"""

INDEX = """\
# Methods

What `untrojan methods` lists, with a page for each. `make docs` writes these pages from the docstrings.

{methods}

## What they cost

With the default settings; F is one image through the network once.

{costs}
"""


def pages() -> dict[str, str]:
    """Give the text of every page by its file name."""
    found = discover("untrojan.defenses", Defense)
    return {f"{name}.md": page(method) for name, method in found.items()} | {"README.md": index(found)}


def page(method: type[Defense]) -> str:
    """Describe one method."""
    told = documentation(method)
    return PAGE.format(
        name=method.name,
        cls=method.__name__,
        summary=told.summary,
        text=_markdown(told.text),
        options=_table(("option", "values", "default", "meaning"), map(_option, fields(method))),
        needs=_markdown(told.sections["Needs"]),
        cost=_markdown(told.sections["Cost"]),
        example=_example(method, told.sections["Example"]),
        references="\n".join(f"* {_linked(reference)}" for reference in told.references),
        deviations=_markdown(told.sections["Deviations"]),
    )


def index(found: dict[str, type[Defense]]) -> str:
    """List all methods."""
    methods, costs = [], []
    for name, method in found.items():
        told, link = documentation(method), f"[{name}]({name}.md)"
        methods.append((link, told.summary, told.line("Needs"), _linked(told.references[0])))
        costs.append((link, told.line("Cost")))
    return INDEX.format(
        methods=_table(("method", "what it does", "needs", "paper"), methods),
        costs=_table(("method", "cost"), costs),
    )


def _option(field: FieldInfo) -> tuple[str, ...]:
    default = "must be given" if field.default is MISSING else f"`{field.default}`"
    values = ", ".join(f"`{value}`" for value in value_of(field).split("|"))
    return f"`{field.name}`", values, default, field.help


def _table(head: tuple[str, ...], rows: Any) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def _markdown(text: str) -> str:
    """Turn references such as :class:`~untrojan.mask.Mask` into code."""
    return re.sub(r":\w+:`(?:~[\w.]*\.)?([\w.]+)`", r"`\1`", text)


def _linked(reference: str) -> str:
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", reference)


def _example(method: type[Defense], doctest: str) -> str:
    """The example of the docstring as a script of its own, with what it prints as comments."""
    lines: list[str] = []
    for part in DocTestParser().get_examples(doctest):
        lines += [*part.source.splitlines(), *(f"# {line}" for line in part.want.splitlines())]
    body = [line for line in lines if not line.startswith(("import ", "from "))]
    known = vars(sys.modules[method.__module__])
    imports = {_import(name, known[name]) for name in _free("\n".join(lines)) if name in known}
    imports |= set(lines) - set(body)
    plain, named = (sorted(line for line in imports if line.startswith(word)) for word in ("import", "from"))
    return "\n".join([*plain, "", *named, "", *body]).strip()


def _free(code: str) -> set[str]:
    names = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    stored = {node.id for node in names if isinstance(node.ctx, ast.Store)}
    return {node.id for node in names} - stored - set(vars(builtins))


def _import(name: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        package, _, last = value.__name__.rpartition(".")
        return f"from {package} import {last}" if package else f"import {name}"
    return f"from {value.__module__} import {name}"


def main() -> None:
    """Write the pages, and remove those of methods that are gone."""
    FOLDER.mkdir(exist_ok=True)
    made = pages()
    for path in FOLDER.glob("*.md"):
        if path.name not in made:
            path.unlink()
    for name, text in made.items():
        (FOLDER / name).write_text(text, "utf-8")


if __name__ == "__main__":
    main()
