"""What the README says is so: its Python example prints what stands there, and there are no other exit codes."""

import re
from pathlib import Path

import pytest

from untrojan.cli import EXIT_CODES, INTERRUPTED, UNFINISHED, UNSUPPORTED, USAGE

ROOT = Path(__file__).parents[1]


@pytest.fixture
def demo(monkeypatch, tmp_path):
    """Stand where `make demo` has left its two files; the rest of it is run by that name."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.chdir(tmp_path)
    import demo

    folder = Path("demo")
    folder.mkdir()
    demo.attack(folder / "victim.safetensors", folder / "clean.npz", seed=0)


def test_every_exit_code_is_listed():
    listed = re.findall(r"^\| (\d+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    codes = {*EXIT_CODES.values(), UNSUPPORTED, USAGE, UNFINISHED, INTERRUPTED}
    assert listed == [str(code) for code in sorted(codes)]


@pytest.mark.slow
@pytest.mark.usefixtures("demo")
def test_the_example_prints_what_the_readme_says(capsys):
    text = (ROOT / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```\n\nprints\n\n```\n(.*?)```", text, re.DOTALL)
    assert example is not None
    capsys.readouterr()

    exec(compile(example[1], "README.md", "exec"), {})  # noqa: S102

    def words(output):
        return re.sub("falls|rises", "moves", re.sub(r"[\d.]+", "#", output)).strip()

    printed = capsys.readouterr().out
    assert words(printed) == words(example[2])
    assert Path("runs/digits/report.html").is_file()
