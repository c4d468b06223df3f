"""The grid: what decides a cell's key, and what the runner does with cells that are missing, failing or killed."""

import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from grids import NET, SCAN, SPOILS, Here, make_grid, pretend, save_images
from PIL import Image
from tiny import make_clean

import untrojan.cli.bench
from untrojan.cli import run as command
from untrojan.errors import ConfigError, DataError, ModelError, RecordError
from untrojan.lab.cell import CellRecord
from untrojan.lab.grid import Case, Grid, Setting
from untrojan.lab.processes import Processes
from untrojan.lab.runner import cell_path, plan, run
from untrojan.lab.work import Answer, Job, shared_images, work
from untrojan.record import ScanRecord
from untrojan.report.leaderboard import read
from untrojan.sources.files import save_state
from untrojan.sources.nets import build

COST = re.compile(r".*(seconds|stages|memory).*")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_grid(tmp_path_factory.mktemp("grid"), models=("one", "two"), seeds=(0, 1))


@pytest.fixture
def cells(made):
    return Grid.load(made).cells()


def loaded(path):
    return json.loads(path.read_text())


def without_cost(value):
    """A record without what differs from run to run."""
    if isinstance(value, dict):
        return {name: without_cost(each) for name, each in value.items() if not COST.fullmatch(name)}
    return value


def results_in(folder):
    return {path.name: without_cost(loaded(path)) for path in (folder / "cells").glob("*/[0-9a-f]*.json")}


# What a grid file may hold


def test_cells_are_all_combinations_with_the_first_seed_first(cells):
    assert [(cell.seed, cell.model, cell.method.count) for cell in cells] == [
        (seed, model, count) for seed in (0, 1) for model in ("one", "two") for count in (40, 50)
    ]
    assert len({cell.key for cell in cells}) == 8
    assert len({cell.scan_key for cell in cells}) == 4
    assert len({cell.setup for cell in cells}) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("defenses = [", "expected TOML"),
        ('defenses = ["clp"]', "`models` must be given"),
        ('defenses = ["clp"]\nsamples = 3\n[models.a]', "`samples` is not a field"),
        ('defenses = ["clp"]\n[models.a]\nfile = "a"', "`models.a.net` must be given"),
        ('defenses = []\n[models.a]\nfile = "a"', "`defenses`: list should have at least 1 item"),
        ('defenses = ["clp"]\n[models.a]\nfile = 3', "`models.a.file`: input should be a valid string, got 3; "),
    ],
)
def test_a_grid_that_is_none_is_told_so(tmp_path, text, said):
    file = tmp_path / "grid.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        Grid.load(file)
    assert str(file) in str(caught.value)


def test_a_missing_grid_is_told_so(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        Grid.load(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("old", "new", "error", "said"),
    [
        ("target = 1", "target = 4", ConfigError, "models.one: expected .*class from 0 to 3, got 4"),
        ("target = 1", "target = 1\nmean = [0.5]", ConfigError, "models.one: expected both mean and std or neither"),
        ("target = 1", "target = 1\nmean = [0.5]\nstd = [0.0]", ConfigError, "models.one: expected as many finite"),
        (NET, "digits-net", ConfigError, "models.one: unknown net 'digits-net'"),
        (NET, "sys:exit", ConfigError, "models.one: sys:exit ended the program"),
        (NET, "digits-cnn:classes=5", ModelError, "(?s)models.one: .*hint: the file has 4 classes"),
        ("badnets:size=2", "badnets:size=9", DataError, "models.one: .*8x8 image"),
        ("target = 1", "", ConfigError, "models.one: expected attack and target together"),
        ("badnets:size=2", "", ConfigError, "no attack is named ''"),
        ("badnets:size=2", "nothing", ConfigError, "no attack is named 'nothing'"),
        (SPOILS[0], "nothing", ConfigError, "no defense is named 'nothing'"),
        ("unlearning:runs", "unlearning:walks", ConfigError, "`walks` is not a field"),
        ("samples = 20", "samples = 20, samples_per_class = 1", ConfigError, "got both"),
        (SPOILS[1], SPOILS[0], ConfigError, "got the same one twice"),
        ("one.safetensors", "none.safetensors", ModelError, "cannot read .*none.safetensors"),
        ("clean.npz", "none.npz", DataError, "no such file or folder: .*none.npz"),
    ],
)
def test_a_grid_that_cannot_run_is_told_so_before_it_starts(made, tmp_path, old, new, error, said):
    file = tmp_path / "grid.toml"
    assert old in made.read_text()
    file.write_text(made.read_text().replace(old, new))
    with pytest.raises(error, match=said):
        Grid.load(file).cells()


# What the key knows


@pytest.fixture
def moved(tmp_path):
    """A grid of one cell, whose files may be changed."""
    file = make_grid(tmp_path, defenses=SPOILS[:1])
    Image.new("L", (8, 8), 50).save(tmp_path / "trigger.png")
    return file


def only(file):
    (cell,) = Grid.load(file).cells()
    return cell


def test_the_key_knows_no_paths_and_no_names(moved, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    before = only(moved)
    for name in ("one.safetensors", "clean.npz", "test.npz"):
        (tmp_path / name).rename(elsewhere / name)
    moved.write_text(moved.read_text().replace(str(tmp_path), str(elsewhere)).replace("models.one", "models.other"))
    after = only(moved)
    assert after.key == before.key
    assert (before.model, after.model) == ("one", "other")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (NET, "untrojan.sources.architectures:DigitsCNN:classes=4"),
        ("target = 1", "target = 2"),
        ("badnets:size=2", "badnets:size=1"),
        ("target = 1", "target = 1\ntest_images = 30"),
        ("count=40", "count=41"),
    ],
)
def test_the_key_knows_what_decides_the_result_and_the_scan_what_decides_it(moved, old, new):
    before = only(moved)
    moved.write_text(moved.read_text().replace(old, new))
    after = only(moved)
    assert after.key != before.key
    assert (after.scan_key != before.scan_key) == (old == NET)
    assert (after.setup == before.setup) == old.startswith("count")


@pytest.mark.parametrize(
    ("old", "new"),
    [("runs=1", "runs=2"), ("samples = 20", "samples = 24"), ("seeds = [0]", "seeds = [5]"), ("size=2", "size=2")],
)
def test_the_scan_is_shared_where_model_images_scanner_and_seed_are_the_same(moved, old, new):
    before = only(moved)
    moved.write_text(moved.read_text().replace(old, new))
    assert (only(moved).scan_key == before.scan_key) == (old == new)


@pytest.mark.parametrize("name", ["one.safetensors", "clean.npz", "test.npz", "trigger.png"])
def test_the_key_knows_the_content_of_files(moved, tmp_path, name):
    text = moved.read_text().replace("badnets:size=2", f"additive:image={tmp_path / 'trigger.png'}")
    moved.write_text(text)
    before = only(moved)
    if name.endswith("npz"):
        save_images(tmp_path / name, make_clean(count=44, shape=(1, 8, 8)))
    elif name.endswith("png"):
        Image.new("L", (8, 8), 60).save(tmp_path / name)
    else:
        save_state(tmp_path / name, build(NET).state_dict())
    assert only(moved).key != before.key


# Running


def test_a_real_cell_has_all_there_is_to_know(moved, tmp_path):
    ran = run([only(moved)], tmp_path / "out", Here())
    assert (ran.done, ran.failed) == (1, [])
    cell = only(moved)
    record = CellRecord.model_validate_json(cell_path(tmp_path / "out", cell.key).read_text())
    assert (record.key, record.model, record.defense, record.setting) == (cell.key, "one", SPOILS[0], "20 images")
    assert record.error is None
    outcome = record.outcome
    assert outcome.status == "failed"
    assert outcome.before.acc.value == 1
    assert outcome.after.acc.value < 0.9
    assert outcome.after.asr.total == 30
    assert outcome.after.der is not None
    assert outcome.clean.per_class == [5, 5, 5, 5]
    assert outcome.total_seconds > outcome.repair_seconds > 0
    assert {"attack-missed", "too-few-images"} <= {flag.name for flag in outcome.flags}
    (scan,) = (tmp_path / "out" / "scans").glob("*/*.json")
    assert scan.stem == record.scan == cell.scan_key
    assert ScanRecord.load(scan).method.name == "unlearning"


def test_cells_of_a_model_and_seed_share_one_scan(cells, tmp_path):
    pool = Here(work=pretend)
    assert run(cells, tmp_path, pool).done == 8
    kinds = [kind for kind, _ in pool.log]
    assert (kinds.count("scan"), kinds.count("cell")) == (4, 8)
    assert kinds[:3] == ["scan", "cell", "cell"], "cells come as soon as they can"
    assert pool.closed


def test_no_more_jobs_are_at_work_than_the_pool_takes(cells, tmp_path):
    pool = Here(size=3, work=pretend)
    run(cells, tmp_path, pool)
    assert pool.most == 3


def test_present_cells_and_scans_are_not_run_again(cells, tmp_path):
    run(cells, tmp_path, Here(work=pretend))
    cell_path(tmp_path, cells[3].key).unlink()
    pool = Here(work=pretend)
    assert run(cells, tmp_path, pool) == (1, [])
    assert [(kind, cell.key) for kind, cell in pool.log] == [("cell", cells[3].key)]
    assert run(cells, tmp_path, Here(work=pytest.fail)) == (0, [])


@pytest.mark.parametrize("content", ["{}", "", None])
def test_a_scan_that_cannot_be_read_is_made_anew(cells, tmp_path, content):
    run(cells, tmp_path, Here(work=pretend))
    scans = sorted((tmp_path / "scans").glob("*/*.json"))
    scans[0].write_text(content) if content is not None else scans[0].unlink()
    shutil.rmtree(tmp_path / "cells")
    assert plan(cells, tmp_path).scans == [scans[0].stem]
    pool = Here(work=pretend)
    assert run(cells, tmp_path, pool) == (8, [])
    assert [cell.scan_key for kind, cell in pool.log if kind == "scan"] == [scans[0].stem]
    assert scans[0].read_text() == SCAN


def test_a_failed_cell_is_a_record_with_its_traceback_and_the_others_go_on(cells, tmp_path):
    def fails(job):
        return Answer(None, "Traceback: on purpose") if job.scan and job.cell.key == cells[2].key else pretend(job)

    ran = run(cells, tmp_path, Here(work=fails))
    assert (ran.done, ran.failed) == (7, [cell_path(tmp_path, cells[2].key)])
    record = CellRecord.model_validate_json(ran.failed[0].read_text())
    assert (record.error, record.outcome, record.model) == ("Traceback: on purpose", None, "two")
    assert run(cells, tmp_path, Here(work=pytest.fail)).done == 0


def test_cells_whose_scan_fails_fail_with_it(cells, tmp_path):
    def fails(job):
        return Answer(None, "no scan") if job.scan is None and job.cell.model == "one" else pretend(job)

    ran = run(cells, tmp_path, Here(work=fails))
    assert (ran.done, len(ran.failed)) == (4, 4)
    assert {loaded(path)["model"] for path in ran.failed} == {"one"}
    assert {loaded(path)["error"] for path in ran.failed} == {"no scan"}


@pytest.mark.parametrize("kind", ["scan", "cell"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_job_whose_worker_died_is_tried_once_more(cells, tmp_path, kind, times):
    deaths = []

    def dies(job):
        hit = (job.scan is None) == (kind == "scan") and job.cell.key == cells[0].key and len(deaths) < times
        return deaths.append(job) if hit else pretend(job)

    ran = run(cells, tmp_path, Here(work=dies))
    lost = {1: 0, 2: 2 if kind == "scan" else 1}[times]
    assert len(deaths) == times
    assert (ran.done, len(ran.failed)) == (8 - lost, lost)
    assert all("died 2 times" in loaded(path)["error"] for path in ran.failed)


def test_two_grids_do_not_run_in_one_folder(cells, tmp_path):
    def again(job):
        with pytest.raises(ConfigError, match="another grid is running"):
            run(cells, tmp_path, Here(work=pytest.fail))
        return pretend(job)

    assert run(cells[:1], tmp_path, Here(work=again)).done == 1


def test_whatever_goes_wrong_in_a_cell_is_its_answer(moved, tmp_path):
    cell = only(moved)
    (tmp_path / "one.safetensors").write_bytes(b"changed")
    assert "cannot read" in work(Job(cell, None)).error
    save_state(tmp_path / "one.safetensors", build(NET).state_dict())
    assert "has changed since the grid was started" in work(Job(cell, None)).error
    assert work(Job(cell, "{}")).text is None


@pytest.mark.parametrize("name", ["clean.npz", "test.npz"])
def test_images_that_changed_since_the_grid_was_started_are_not_used(moved, tmp_path, name):
    cell = only(moved)
    scan = work(Job(cell, None)).text if name == "test.npz" else None
    save_images(tmp_path / name, make_clean(count=44, shape=(1, 8, 8)))
    answer = work(Job(cell, scan))
    assert answer.text is None
    assert f"{tmp_path / name} has changed since the grid was started; start it again" in answer.error
    assert work(Job(only(moved), scan)).error is None


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_trigger_that_changed_since_the_grid_was_started_is_not_used(moved, tmp_path, monkeypatch, when):
    """Also where another cell of the worker was measured with it while it was the right one."""
    moved.write_text(moved.read_text().replace("badnets:size=2", f"additive:image={tmp_path / 'trigger.png'}"))
    cell = only(moved)
    scan = work(Job(cell, None)).text
    if when == "after":
        assert work(Job(cell, scan)).error is None
    Image.new("L", (8, 8), 60).save(tmp_path / "trigger.png")
    for job in (Job(cell, scan), Job(pickle.loads(pickle.dumps(cell)), scan)):
        answer = work(job)
        assert answer.text is None
        assert f"the files of {cell.case.attack} have changed since the grid was started" in answer.error
    assert work(Job(only(moved), scan)).error is None


def test_a_record_has_an_outcome_or_an_error(cells):
    with pytest.raises(RecordError, match="an outcome or an error"):
        CellRecord.of(cells[0])


def test_an_error_may_name_a_file_that_is_not_utf8(cells, tmp_path):
    def fails(job):
        return pretend(job) if job.scan is None else Answer(None, "caf\udce9")

    ran = run(cells[:1], tmp_path, Here(work=fails))
    assert loaded(ran.failed[0])["error"] == "caf\\udce9"


def test_images_are_shared_pixel_for_pixel_whatever_they_are_kept_as():
    images = make_clean(count=12)
    some = torch.rand(3, 3, 8, 8)
    floats = type(images)(torch.cat([images.floats()[:4], some]), torch.zeros(7, dtype=torch.long))
    assert shared_images(floats, images) == 4
    assert shared_images(make_clean(count=8, shape=(1, 8, 8)), images) == 0


@pytest.mark.parametrize("bad", [{"samples": 0}, {"samples_per_class": 0}, {"images": 3}])
def test_settings_are_checked(bad):
    with pytest.raises(ConfigError, match=r"^Setting: "):
        Setting(**bad)


def test_a_case_takes_all_to_all():
    assert Case(file="a", net="b", clean="c", test="d", target="all-to-all").target == "all-to-all"


# The plan


def test_the_plan_predicts_from_cells_that_are_there(cells, tmp_path):
    fresh = plan(cells, tmp_path)
    assert (len(fresh.missing), len(fresh.scans), fresh.known, fresh.unknown) == (8, 4, 0, 12)

    def timed(job):
        answer = Answer(None, "none") if job.scan else Answer(SCAN)
        return answer if job.cell.key != cells[0].key or not job.scan else Answer(record(job.cell, 7.0, 3.0))

    run(cells[:1], tmp_path, Here(work=timed))
    planned = plan(cells, tmp_path)
    assert len(planned.missing) == 7
    assert len(planned.scans) == 3
    assert planned.seconds == [None, 7, None, 7, None, 7, None]
    assert list(planned.scan_seconds.values()) == [3, 3, 3]
    assert (planned.known, planned.unknown) == (30, 4)


def record(cell, total, scan):
    """The record of a cell as far as the plan reads it."""
    rate = {"value": 0.5}
    scores = {"acc": rate, "asr": rate, "ra": rate, "der": 0.5}
    names = ("suspect", "repair_seconds", "peak_memory_bytes")
    outcome = dict.fromkeys((*names, "units_changed", "units_total", "values_changed", "measure_seconds"), 1)
    outcome |= dict.fromkeys(("verdict", "status", "reason"), "as told")
    outcome |= {"total_seconds": total, "scan_seconds": scan, "before": scores, "after": scores, "flags": []}
    outcome |= {"clean": {"images": 1}, "test": {"images": 1}}
    return json.dumps({**CellRecord.of(cell, error="").model_dump(), "error": None, "outcome": outcome})


# Processes


def answer_with_process(job):
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    return Answer(f"{job} in {os.getpid()}")


@pytest.mark.slow
def test_processes_work_side_by_side_live_on_and_are_replaced_when_they_die():
    pool = Processes(2, answer_with_process)
    try:
        pool.start("a")
        pool.start("b")
        ends = dict(pool.wait() for _ in range(2))
        assert {job: answer.text.split(" in ")[0] for job, answer in ends.items()} == {"a": "a", "b": "b"}
        assert ends["a"].text.split(" in ")[1] != ends["b"].text.split(" in ")[1]

        seen = []
        for job in ("a", "b", "die", "c"):
            pool.start(job)
            told, answer = pool.wait()
            assert told == job
            seen.append(answer and answer.text.split(" in "))
        assert seen[0][1] == seen[1][1]
        assert seen[2] is None
        assert seen[3][1] not in (seen[0][1], str(os.getpid()))
    finally:
        pool.close()
    assert not Path(f"/proc/{seen[3][1]}").exists()


# The command


def test_the_command_plans_runs_and_skips(moved, tmp_path, capsys):
    out = tmp_path / "out"
    call = ["bench", "run", str(moved), "--out", str(out), "--jobs", "1"]
    assert command([*call, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert f"one, {SPOILS[0]}, 20 images: seed 0; unknown" in told
    assert "1 cell, 1 to run, and 1 scan that" in told
    assert not out.exists()
    assert command(call) == 0
    assert "1 cell: 1 done now, 0 were there, 0 failed\n" in capsys.readouterr().out
    assert command(call) == 0
    assert "1 cell: 0 done now, 1 were there, 0 failed\n" in capsys.readouterr().out


def test_the_command_counts_cores_where_the_system_does_not_tell_which_are_ours(made, tmp_path, capsys, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert command(["bench", "run", str(made), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "8 cells, 8 to run" in capsys.readouterr().out


def test_the_command_says_what_failed(moved, tmp_path, capsys):
    moved.write_text(moved.read_text().replace("samples = 20", "samples = 2000"))
    assert command(["bench", "run", str(moved), "--out", str(tmp_path / "out"), "--jobs", "1", "-q"]) == 2
    told = capsys.readouterr().out
    ((path, why),) = re.findall(r"failed: (.*?): .*DataError: (.*)", told)
    assert "2000" in why
    assert loaded(Path(path))["error"].endswith(f"{why}\n")


def test_the_command_says_what_failed_earlier(moved, tmp_path, capsys, monkeypatch):
    path = cell_path(tmp_path / "out", only(moved).key)
    path.parent.mkdir(parents=True)
    path.write_text(CellRecord.of(only(moved), error="Traceback:\n  a line\nError: on \x1bpurpose\n").to_json())
    monkeypatch.setattr(untrojan.cli.bench, "Processes", lambda _: Here(work=pretend))
    call = ["bench", "run", str(moved), "--out", str(tmp_path / "out"), "-q"]
    for also, said in (([], "1 cell: 0 done now, 0 were there, 1 failed\n"), (["--dry-run"], "nothing to do\n")):
        assert command([*call, *also]) == 2
        told = capsys.readouterr().out
        assert said in told
        assert f"failed earlier: {path}: Error: on \\x1bpurpose; remove it to run the cell again\n" in told
    path.unlink()
    assert command(call) == 0
    assert "1 cell: 1 done now, 0 were there, 0 failed\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["bench"], ["bench", "run"], ["bench", "run", "none.toml", "--out", "x"], ["bench", "report", "x"]]
)
def test_wrong_calls_are_told_so(capsys, arguments):
    assert command(arguments) == 4
    assert capsys.readouterr().err


def test_records_do_not_go_into_a_file(moved, tmp_path, capsys):
    assert command(["bench", "run", str(moved), "--out", str(moved)]) == 4
    assert "is a file" in capsys.readouterr().err


# Killed


@pytest.mark.slow
def test_a_grid_killed_at_random_moments_ends_with_the_same_table(tmp_path):
    file = make_grid(tmp_path, models=("one", "two"), defenses=SPOILS, seeds=(0, 1))
    cells = Grid.load(file).cells()
    assert run(cells, tmp_path / "calm", Here()).done == 12
    killed = tmp_path / "killed"
    rng = random.Random()
    call = ["bench", "run", str(file), "--out", str(killed), "--jobs", "2", "-q"]
    _kill_as_a_command(call, killed)
    assert len(results_in(killed)) < 12, "it was killed before its end"
    for _ in range(4):
        _kill(_started(call), killed, rng.uniform(0, 0.3))
    assert command(call) == 0
    assert results_in(killed) == results_in(tmp_path / "calm")
    assert len(read(killed)) == 12


def _kill_as_a_command(call, folder):
    """Kill the real command, and see that its workers end with it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "untrojan", *call], stdout=subprocess.DEVNULL, start_new_session=True
    )
    _kill(process, folder, 0)
    _wait_until_gone(process.pid)


def _started(call):
    """The command in a process that need not import torch first, which would take most of the test."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["untrojan.lab.runner"])
    process = context.Process(target=command, args=(call,))
    process.start()
    return process


def _kill(process, folder, seconds):
    """Kill it so long after its first new record."""
    before = len(list(folder.glob("*/*/*.json")))
    while len(list(folder.glob("*/*/*.json"))) == before and _runs(process):
        time.sleep(0.01)
    time.sleep(seconds)
    process.kill()
    process.wait() if isinstance(process, subprocess.Popen) else process.join()


def _runs(process):
    return process.poll() is None if isinstance(process, subprocess.Popen) else process.is_alive()


def _wait_until_gone(group):
    """Wait until the workers of a killed grid are gone too."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not any(map(partial(_lives_in, group), Path("/proc").glob("[0-9]*/stat"))):
            return
        time.sleep(0.02)
    pytest.fail("workers outlive the grid that started them")


def _lives_in(group, stat):
    try:
        state, _, its_group, *_ = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return int(its_group) == group and state != "Z"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            "Traceback (most recent call last):\n  File\nuntrojan.errors.ModelError: no\n",
            "untrojan.errors.ModelError: no",
        ),
        (
            "Traceback\ntorch.AcceleratorError: CUDA error\nCompile with `TORCH_USE_CUDA_DSA`.\n",
            "torch.AcceleratorError: CUDA error",
        ),
        ("it died\n", "it died"),
    ],
)
def test_why_a_cell_failed(error, why):
    assert CellRecord.model_construct(error=error).why == why
