"""The leaderboard: what records become on the page and in the table, and what the page does in a browser."""

import base64
import hashlib
import json
import os
import re
import shutil

import pyarrow.parquet
import pytest
from browser import opened
from grids import SPOILS, Here, make_grid

from untrojan.cli import run as command
from untrojan.errors import RecordError
from untrojan.lab.grid import Grid
from untrojan.lab.runner import run
from untrojan.report.leaderboard import defenses, read, render, results, write_parquet

NONE = "\N{EN DASH}"
HOSTILE = "<script>alert(1)</script>\u202e</script>"


def row(model="m", defense="clp", seed=0, asr=0.1, der=0.9, setup=None, **changes):
    method, setup = defense.partition(":")[0], setup or f"setup of {model}"
    given = {
        "key": f"{model}{defense}{seed}{setup}".encode().hex(),
        "setup": setup,
        "model": model,
        "attack": "badnets",
        "target": "1",
        "method": method,
        "defense": defense,
        "setting": "500 images",
        "seed": seed,
        "error": None,
        "verdict": "found",
        "suspect": 1,
        "status": "repaired",
        "reason": "it passes",
        "acc_before": 0.9,
        "asr_before": 1.0,
        "ra_before": 0.0,
        "acc_after": 0.88,
        "asr_after": asr,
        "ra_after": 0.8,
        "der": der,
        "repair_seconds": 2.0,
        "measure_seconds": 0.5,
        "scan_seconds": 1.0,
        "total_seconds": 3.0,
        "peak_memory_bytes": 4_000_000,
        "units_changed": 1,
        "units_total": 2,
        "values_changed": 3,
        "clean_images": 500,
        "test_images": 1000,
        "flags": [],
        "untrojan": "0.1.0",
    }
    return given | changes


def failed(**changes):
    nothing = dict.fromkeys(
        ("verdict", "suspect", "status", "reason", "acc_before", "asr_before", "ra_before", "acc_after", "asr_after",
         "ra_after", "der", "repair_seconds", "measure_seconds", "scan_seconds", "total_seconds", "peak_memory_bytes")
    )  # fmt: skip
    return row(**{"error": "Traceback: on purpose", **nothing, **changes})


ROWS = [
    row("alpha", "clp", 0, asr=0.5, der=0.7),
    row("alpha", "clp", 1, asr=0.3, der=0.8, flags=[{"name": "attack-missed", "detail": "ASR was low"}]),
    row("alpha", "rnp", 0, asr=0.0, der=0.6),
    row("beta", "clp", 0, asr=0.2, der=0.9),
    row("beta", "rnp", 0, asr=0.1, der=0.95),
    row("beta", "rnp:select=threshold", 0, asr=0.05, der=0.99),
    failed(model=HOSTILE, defense="rnp", error=HOSTILE),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("records")
    file = make_grid(made, defenses=SPOILS[:2], seeds=(0, 1))
    run(Grid.load(file).cells(), made / "out", Here())
    return made / "out"


# Reading


def test_what_a_grid_wrote_is_read(folder):
    rows = read(folder)
    written = sorted(folder.glob("cells/*/*.json"), key=lambda path: path.stat().st_mtime_ns)
    assert [each["key"] for each in rows] == [path.stem for path in written]
    first = rows[0]
    assert set(first) == set(row())
    assert (first["model"], first["method"], first["target"], first["clean_images"]) == ("one", "clp", "1", 20)
    assert first["acc_before"] == 1.0
    assert 0 <= first["der"] <= 1
    assert {flag["name"] for flag in first["flags"]} >= {"attack-missed"}


def test_what_a_killed_grid_left_half_written_is_ignored(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    for place in [tmp_path / "out" / "cells", *(tmp_path / "out" / "cells").iterdir()]:
        (place / ".abc.json.partial").write_text("{")
    assert len(read(tmp_path / "out")) == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not the record of a cell"),
        ("[]", "is not the record of a cell"),
        ('{"kind": "cell", "schema_version": 1}', "is not the record of a cell: KeyError"),
        ('{"kind": "scan", "schema_version": 1}', "one of kind 'scan'"),
        ('{"kind": "cell", "schema_version": 99}', "newer untrojan"),
    ],
)
def test_a_file_that_is_no_record_is_told_so(tmp_path, text, said):
    (tmp_path / "cells" / "ab").mkdir(parents=True)
    (tmp_path / "cells" / "ab" / "abc.json").write_text(text)
    with pytest.raises(RecordError, match=said) as caught:
        read(tmp_path)
    assert "abc.json" in str(caught.value)


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (["outcome", "flags"], 5, "`flags` is 5"),
        (["outcome", "flags"], [{"name": None}], "a flag is named None"),
        (["outcome", "after", "acc", "value"], "high", "`acc_after` is 'high'"),
        (["outcome", "before", "acc", "value"], None, "`acc_before` is None"),
        (["outcome", "repair_seconds"], None, "`repair_seconds` is None"),
        (["outcome"], None, "`error` is None"),
        (["outcome"], "none", "TypeError"),
        (["seed"], "x", "`seed` is 'x'"),
        (["model"], None, "`model` is None"),
        (["inputs", "untrojan"], 3, "`untrojan` is 3"),
    ],
)
def test_a_value_of_another_kind_is_told_with_the_file_that_has_it(folder, tmp_path, where, value, said):
    shutil.copytree(folder, tmp_path / "out")
    path = next((tmp_path / "out" / "cells").glob("*/*.json"))
    record = part = json.loads(path.read_text())
    for name in where[:-1]:
        part = part[name]
    part[where[-1]] = value
    path.write_text(json.dumps(record))
    with pytest.raises(RecordError, match=f"{path} is not the record of a cell: .*{re.escape(said)}"):
        read(tmp_path / "out")


def test_a_folder_without_cells_is_told_so(tmp_path, capsys):
    with pytest.raises(RecordError, match="holds no cells"):
        read(tmp_path)
    (tmp_path / "cells").mkdir()
    assert command(["bench", "report", str(tmp_path), "--out", str(tmp_path / "page.html")]) == 3
    assert "holds no records yet" in capsys.readouterr().err


# Putting together


def test_seeds_become_mean_and_deviation():
    table = {(each["model"], each["defense"]): each for each in results(ROWS)}
    clp = table["alpha", "clp"]
    assert clp["asr"] == pytest.approx([0.4, 0.2 / 2**0.5])
    assert clp["der"] == pytest.approx([0.75, 0.1 / 2**0.5])
    assert clp["acc_change"] == pytest.approx([-0.02, 0])
    assert (clp["done"], clp["failed"], clp["flagged"], clp["flags"]) == (2, 0, 1, ["attack-missed"])
    assert clp["seconds"] == [2.0, None]
    assert table["beta", "clp"]["asr"] == [0.2, None]
    lost = table[HOSTILE, "rnp"]
    assert (lost["done"], lost["failed"], lost["asr"], lost["seconds"]) == (0, 1, None, None)


def test_the_oracle_is_the_best_of_all_fields_of_a_method():
    table = {(each["model"], each["defense"]): each["gap"] for each in results(ROWS)}
    assert table["beta", "rnp"] == [pytest.approx(0.04), None]
    assert table["beta", "rnp:select=threshold"] == [0, None]
    assert table["alpha", "rnp"] is None, "there is nothing to compare it with"


def test_the_oracle_chooses_for_each_seed():
    rows = [row(defense=f"rnp:count={count}", seed=seed, der=der) for count, seed, der in
            [(1, 0, 0.9), (2, 0, 0.8), (1, 1, 0.6), (2, 1, 0.9)]]  # fmt: skip
    gaps = {each["defense"]: each["gap"][0] for each in results(rows)}
    assert gaps == {"rnp:count=1": pytest.approx(0.15), "rnp:count=2": pytest.approx(0.05)}


def test_cells_that_cannot_be_compared_are_not_put_together():
    table = results([row(asr=0.1), row(asr=0.3, setup="other", seed=1)])
    assert [each["asr"] for each in table] in ([[0.1, None], [0.3, None]], [[0.3, None], [0.1, None]])


def test_a_model_that_was_renamed_is_one_under_its_last_name():
    rows = [
        row("old", "rnp:count=1", 0, der=0.5, setup="s"),
        row("old", "rnp:count=2", 0, der=0.7, setup="s"),
        row("new", "rnp:count=1", 1, der=0.9, setup="s"),
        row("other", "rnp:count=1", 0, der=0.1),
    ]
    table = results(rows)
    assert [(each["model"], each["defense"], each["done"]) for each in table] == [
        ("new", "rnp:count=1", 2),
        ("new", "rnp:count=2", 1),
        ("other", "rnp:count=1", 1),
    ]
    assert table[0]["gap"][0] == pytest.approx(0.2)
    assert defenses(table)[0]["models"] == [2, 2]
    assert "on 2 models" in render(rows)


def test_the_last_name_is_that_of_the_record_that_was_written_last(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out")
    for path in (tmp_path / "out" / "cells").glob("*/*.json"):
        os.utime(path, ns=(1, 1))
    path.write_text(path.read_text().replace('"model":"one"', '"model":"renamed"'))
    assert {each["model"] for each in results(read(tmp_path / "out"))} == {"renamed"}
    os.utime(path, ns=(0, 0))
    assert {each["model"] for each in results(read(tmp_path / "out"))} == {"one"}


def test_rows_of_one_model_count_as_one():
    rows = [row("a", asr=0.1, setup="s"), row("a", asr=0.3, setup="t"), row("b", asr=0.8), failed(model="c")]
    (told,) = defenses(results(rows))
    assert told["models"] == [2, 3]
    assert told["asr"] == [pytest.approx(0.5), None]
    assert told["worst_asr"] == [0.8, None]


def test_models_become_means_and_the_worst():
    table = {each["defense"]: each for each in defenses(results(ROWS))}
    assert table["clp"]["asr"][0] == pytest.approx(0.3)
    assert table["clp"]["worst_asr"][0] == pytest.approx(0.4)
    assert table["clp"]["models"] == [2, 2]
    assert table["rnp"]["models"] == [2, 3]
    assert table["clp"]["repaired"] == [3, 3]


def test_parquet_holds_a_row_for_each_cell(tmp_path):
    write_parquet(ROWS, tmp_path / "cells.parquet")
    table = pyarrow.parquet.read_table(tmp_path / "cells.parquet")
    assert table.column_names == list(row())
    assert table.column("asr_after").to_pylist() == [each["asr_after"] for each in ROWS]
    assert table.column("flags").to_pylist() == ["", "attack-missed", "", "", "", "", ""]
    assert table.column("error").to_pylist()[-1] == HOSTILE


def test_the_command_writes_page_and_table(folder, tmp_path, capsys):
    page, table = tmp_path / "new" / "page.html", tmp_path / "cells.parquet"
    assert command(["bench", "report", str(folder), "--out", str(page), "--parquet", str(table)]) == 0
    assert capsys.readouterr().out == f"wrote {page}, {table}: 4 cells\n"
    assert page.read_text("utf-8") == render(read(folder))
    assert pyarrow.parquet.read_table(table).num_rows == 4
    assert command(["bench", "report", str(folder), "--out", str(tmp_path)]) == 4


@pytest.mark.parametrize("option", ["--out", "--parquet"])
def test_the_command_does_not_replace_what_is_no_file(folder, tmp_path, capsys, option):
    os.mkfifo(tmp_path / "pipe")
    paths = {"--out": tmp_path / "page.html", "--parquet": tmp_path / "cells.parquet"} | {option: tmp_path / "pipe"}
    assert command(["bench", "report", str(folder), *(str(each) for pair in paths.items() for each in pair)]) == 4
    assert "pipe is a pipe or a device; give the file to write" in capsys.readouterr().err
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


@pytest.mark.parametrize("name", ["page.html", "link", "./page.html"])
def test_the_command_does_not_write_page_and_table_over_each_other(folder, tmp_path, capsys, name):
    (tmp_path / "link").symlink_to(tmp_path / "page.html")
    same = ["--out", str(tmp_path / "page.html"), "--parquet", f"{tmp_path}/{name}"]
    assert command(["bench", "report", str(folder), *same]) == 4
    assert "--out and --parquet are both" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


# The page


def test_records_cannot_reach_into_the_page():
    page = render(ROWS)
    assert "alert(1)</script>" not in page
    assert "\u202e" not in page
    assert "http" not in re.sub(r'<meta http-equiv="[^>]*>', "", page)


@pytest.fixture
def browse(tmp_path):
    """Open the page, do something with it, and give the page that is then there."""

    def browse(rows, steps):
        page = render(rows)
        driver = f'"use strict";\nconst find = (query) => document.querySelector(query);\n{steps}'
        allowed = base64.b64encode(hashlib.sha256(driver.encode()).digest()).decode()
        page = page.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
        page = page.replace("</body>", f"<script>{driver}</script></body>")
        document, console = opened(page, tmp_path)
        assert console == []
        return json.loads(re.search(r'<pre id="seen">(.*?)</pre>', document, re.DOTALL)[1])

    return browse


SEE = """
const seen = [];
const column = (table, name) => [...document.querySelectorAll(`#${table} thead th`)].findIndex((head) =>
  head.textContent.startsWith(name));
const values = (table, name) => [...document.querySelectorAll(`#${table} tbody tr:not(.open)`)].map((line) =>
  line.children[column(table, name)].firstChild.textContent);
const buttons = () => [...document.querySelectorAll("#results tbody tr:not(.open) button")];
const models = () => buttons().map((each) => each.textContent);
const sort = (table, name) => document.querySelectorAll(`#${table} thead th`)[column(table, name)].firstChild.click();
const type = (text) => { find("#filter").value = text; find("#filter").dispatchEvent(new Event("input")); };
const choose = (text) => { find("#trust").value = text; find("#trust").dispatchEvent(new Event("change")); };
"""
SHOW = """
const out = document.createElement("pre");
out.id = "seen";
out.textContent = JSON.stringify(seen).replace(/[<>&]/g, "_");
document.body.append(out);
"""


def test_the_page_sorts(browse):
    steps = """
    seen.push(values("results", "DER"));
    sort("results", "DER"); seen.push(values("results", "DER"), find("#results th[aria-sort]").ariaSort);
    sort("results", "DER"); seen.push(values("results", "DER"), find("#results th[aria-sort]").ariaSort);
    sort("results", "Defense"); seen.push(values("results", "Defense"));
    sort("defenses", "Worst ASR"); seen.push(values("defenses", "Worst ASR"));
    """
    by_model, down, how, up, other, names, worst = browse(ROWS, SEE + steps + SHOW)
    assert by_model[-5:] == ["75.0 ± 7.1", "60.0", "90.0", "95.0", "99.0"]
    assert (down, how) == (["99.0", "95.0", "90.0", "75.0 ± 7.1", "60.0", NONE], "descending")
    assert (up, other) == (["60.0", "75.0 ± 7.1", "90.0", "95.0", "99.0", NONE], "ascending")
    assert names == ["clp", "clp", "rnp", "rnp", "rnp", "rnp"]
    assert worst == ["40.0", "10.0", "5.0"]


def test_the_page_filters(browse):
    steps = """
    type("beta RNP"); seen.push(models(), values("defenses", "Defense").length, find("#count").textContent);
    type("missed"); seen.push(models());
    type("nothing such"); seen.push(models());
    type(""); choose("failed"); seen.push(models());
    choose("sound"); seen.push(models());
    """
    both, methods, count, flagged, none, lost, sound = browse(ROWS, SEE + steps + SHOW)
    assert (both, methods, count) == (["beta", "beta"], 2, "2 of 6 results")
    assert flagged == ["alpha"]
    assert none == []
    assert len(lost) == 1
    assert lost[0].startswith("_script_alert(1)")
    assert sound == ["alpha", "beta", "beta", "beta"]


def test_one_is_said_so(browse):
    assert "<span>1 cell ·" in render(ROWS[:1])
    assert "<span>2 cells ·" in render(ROWS[:2])
    assert browse(ROWS[:1], SEE + 'seen.push(find("#count").textContent);' + SHOW) == ["1 of 1 result"]


def test_an_edge_that_hides_columns_is_shaded(browse):
    """The two covers scroll with the table, and the shades under them stay where they are."""
    steps = """
    for (const table of document.querySelectorAll(".scroll")) seen.push(getComputedStyle(table).backgroundAttachment);
    """
    assert browse(ROWS, SEE + steps + SHOW) == ["local, local, scroll, scroll"] * 2


def test_the_page_opens_a_cell(browse):
    steps = """
    const open = (name) => buttons().find((each) => each.textContent.startsWith(name)).click();
    open("alpha"); seen.push(find("#results tr.open").innerText);
    open("alpha"); seen.push(document.querySelectorAll("tr.open").length);
    open("<script>"); seen.push(find("#results tr.open").innerText, document.scripts.length);
    """
    alpha, after, lost, scripts = browse(ROWS, SEE + steps + SHOW)
    assert "Seed 0" in alpha
    assert "Seed 1" in alpha
    assert "ACC 88.0 · ASR 30.0 · RA 80.0 · DER 80.0" in alpha
    assert "⚑ attack-missed: ASR was low." in alpha
    assert f"Record: cells/{ROWS[0]['key'][:2]}/{ROWS[0]['key']}.json" in alpha
    assert after == 0
    assert "The cell failed:" in lost
    assert "alert(1)" in lost
    assert scripts == 3


def test_a_long_table_is_drawn_in_parts(browse):
    rows = [row(f"model {number}", "clp", asr=number / 1000) for number in range(700)]
    steps = """
    seen.push(models().length, find("#more").hidden);
    find("#more").click(); seen.push(models().length);
    find("#more").click(); seen.push(models().length, find("#more").hidden, models()[10]);
    """
    assert browse(rows, SEE + steps + SHOW) == [300, False, 600, 700, True, "model 10"]
