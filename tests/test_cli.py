"""The command line end to end: exit codes, what is written and what is not, and what bad input is told."""

import contextlib
import json
import os
import pickle
import pty
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import click
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import DEFENSES, digits
from tiny import QUICK as FEW_STEPS

import untrojan.cli.options
import untrojan.cli.repair
import untrojan.defenses.defense
import untrojan.progress
from untrojan.cli import VERBS, run
from untrojan.cli.options import made_of, options_of
from untrojan.defenses.defense import CHANGES, RECORD, REPAIRED, REPORT, Defense, Outcome
from untrojan.errors import UnreliableWarning
from untrojan.model import correct
from untrojan.record import Check, Diagnosis, Record, Target
from untrojan.registry import config, discover, documentation, fields
from untrojan.scanners.triggers import TriggerScanner
from untrojan.scanners.unlearning import UnlearningScanner
from untrojan.sources.files import Checkpoint, save_state, state_sha256
from untrojan.sources.nets import build
from untrojan.writing import sha256

COMMAND = str(Path(sys.executable).with_name("untrojan"))
FILES = {REPAIRED, CHANGES, REPORT, RECORD}
QUICK = ("--method=rnp", "--unlearn-epochs=2", "--floor=0.99", "--recover-epochs=1", "--select=count", "--count=3")
UNRELIABLE = ("--method=rnp", "--unlearn-epochs=2", "--floor=1e-9", "--recover-epochs=1")
SCANS_QUICKLY = (
    "import os, signal, sys, untrojan.cli, untrojan.writing as writing, untrojan.defenses.defense as defense\n"
    "from untrojan.scanners.unlearning import UnlearningScanner\n"
    "defense.TriggerScanner = UnlearningScanner\n"
    "defense.Defense._checks = lambda *_: []\n"
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
)
ENDLESS = ("--method=rnp", "--unlearn-epochs", "1000000", "--floor", "1e-9")
NET = "digits-cnn"


@config
class Stub(Defense):
    """Ends as it is told, to see what the command line makes of it.

    Attributes:
        end: How it ends.
        some_number: A number of no consequence.
    """

    name: ClassVar[str] = "stub"
    end: Literal["repaired", "nothing_to_repair", "inconclusive", "failed", "interrupted", "bug"]
    some_number: float | None = None

    def _repair(self, model, clean, diagnosis, seed):
        if self.end == "interrupted":
            raise KeyboardInterrupt
        if self.end == "bug":
            raise ZeroDivisionError("oops")
        before = correct(model, clean)
        with torch.no_grad():
            next(model.parameters())[0] = 0
        checks = [Check(name="told", passed=self.end != "failed", detail="as it was told")]
        return Outcome(model, before, before, True, checks)

    def _checks(self, model, outcome, clean, diagnosis, seed):
        return outcome.checks

    def __post_init__(self):
        verdict = {"nothing_to_repair": "not_found", "inconclusive": "inconclusive"}.get(self.end, "found")
        targets = [Target(label=1, score=0.9), Target(label=0, score=0.1)]
        LOOKS.append(Diagnosis(verdict=verdict, rule="as told", targets=targets, runs=[]))


LOOKS = []


def look(*_):
    warnings.warn(UnreliableWarning("this stands on little"), stacklevel=2)
    return LOOKS[-1]


@pytest.fixture(scope="module", autouse=True)
def _suspicious():
    """The model is clean and the default scan says so; by unlearning alone there is something to repair, unchecked."""

    def scan(_, model, clean, seed):
        return UnlearningScanner().scan(model, clean, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TriggerScanner, "_scan", scan)
        patch.setattr(Defense, "_checks", lambda *_: [])
        yield


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(untrojan.cli.repair, "discover", lambda *_: {"stub": Stub})
    monkeypatch.setattr(untrojan.defenses.defense, "_look", look)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with a small trained model and clean images for it."""
    folder = tmp_path_factory.mktemp("site")
    images, labels = digits().images, digits().labels
    torch.manual_seed(0)
    net = build(NET)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for batch in torch.randperm(1500).repeat(3).split(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
    save_state(folder / "model.safetensors", net.state_dict())
    np.savez(folder / "clean.npz", images=images[1500:1580].numpy(), labels=labels[1500:1580].numpy())
    return folder


@pytest.fixture
def command(site, tmp_path):
    """Build the arguments of a repair into `tmp_path / "out"`."""

    def arguments(*options, model=site / "model.safetensors", net=NET, clean=site / "clean.npz", out=tmp_path / "out"):
        return [*map(str, ("repair", model, "--net", net, "--clean", clean, "--out", out, *(options or QUICK)))]

    return arguments


@pytest.fixture(scope="module")
def repaired(site, tmp_path_factory):
    """One real run: its folder and its arguments."""
    out = tmp_path_factory.mktemp("repaired") / "out"
    arguments = ["repair", str(site / "model.safetensors"), "--net", NET, "--clean", str(site / "clean.npz")]
    arguments += ["--out", str(out), "--seed", "3", "--samples-per-class", "4", *QUICK]
    status = {0: ("repaired", "nothing_to_repair"), 2: ("failed", "inconclusive")}[run(arguments)]
    assert json.loads((out / RECORD).read_text())["status"] in status
    return out, arguments


@pytest.fixture
def talk(capsys):
    """Run in this process: the exit code, stdout and stderr."""

    def call(arguments):
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return call


def holdings(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def npz(path, images, labels):
    np.savez(path, images=images, labels=labels)
    return path


def written(path, data):
    path.write_bytes(data)
    return path


def piped(path):
    os.mkfifo(path)
    return path


def changed(site, path, change):
    state = Checkpoint.read(site / "model.safetensors").tensors
    change(state)
    save_state(path, state)
    return path


def put(name, value):
    def change(state):
        state[name].view(-1)[0] = value

    return change


def image_folder(path, counts, mode="L", size=8):
    for label, count in enumerate(counts):
        (path / f"class-{label}").mkdir(parents=True)
        for number in range(count):
            Image.new(mode, (size, size)).save(path / f"class-{label}" / f"{number}.png")
    return path


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


# Bad input: what was expected, what came, what to do; nothing is written and nothing lost

GREY = np.zeros((20, 1, 8, 8), np.uint8)
EACH = np.arange(20) % 10


def not_written_by_torch(at):
    return written(at / "m.pt", pickle.dumps({"weights": Payload()}))


BAD_INPUT = {
    "model missing": (lambda at, site: {"model": at / "no.pt"}, 3, ["cannot read", "no.pt", "No such file"]),
    "model is a folder": (lambda at, site: {"model": at}, 3, ["cannot read", "Is a directory"]),
    "model empty": (lambda at, site: {"model": written(at / "m.pt", b"")}, 3, ["m.pt", "empty"]),
    "model is text": (lambda at, site: {"model": written(at / "m.pt", b"hello")}, 3, ["neither", "safetensors"]),
    "model truncated": (
        lambda at, site: {"model": written(at / "m", (site / "model.safetensors").read_bytes()[:5000])},
        3,
        ["damaged", "get it again"],
    ),
    "model is hostile": (
        lambda at, site: {"model": not_written_by_torch(at)},
        3,
        ["posix.mkdir", "nothing of it was run", "safetensors"],
    ),
    "weights NaN": (
        lambda at, site: {"model": changed(site, at / "m", put("classifier.weight", float("nan")))},
        3,
        ["NaN or infinite", "classifier.weight"],
    ),
    "weights infinite": (
        lambda at, site: {"model": changed(site, at / "m", put("features.1.running_var", float("inf")))},
        3,
        ["NaN or infinite", "features.1.running_var"],
    ),
    "weights missing": (
        lambda at, site: {"model": changed(site, at / "m", lambda state: state.pop("classifier.bias"))},
        3,
        ["missing in the file", "classifier.bias"],
    ),
    "classes do not fit": (
        lambda at, site: {"net": f"{NET}:classes=7"},
        3,
        ["the file has 10 classes", "built with 7"],
    ),
    "channels do not fit": (
        lambda at, site: {"net": f"{NET}:channels=3"},
        3,
        ["the file takes 1 channels", "built with 3"],
    ),
    "images missing": (lambda at, site: {"clean": at / "no.npz"}, 3, ["no such file or folder", "no.npz"]),
    "images normalized": (
        lambda at, site: {"clean": npz(at / "c.npz", GREY - 2.1, EACH)},
        3,
        ["expected images in [0, 1]", "-2.1", "Normalize"],
    ),
    "images up to 255": (
        lambda at, site: {"clean": npz(at / "c.npz", GREY + 255.0, EACH)},
        3,
        ["expected images in [0, 1]", "255", "divide"],
    ),
    "images NaN": (lambda at, site: {"clean": npz(at / "c.npz", GREY * np.nan, EACH)}, 3, ["in [0, 1]", "NaN"]),
    "images RGB for a grey net": (
        lambda at, site: {"clean": npz(at / "c.npz", GREY.repeat(3, 1), EACH)},
        3,
        ["cannot take images of 3x8x8", "expected 1 channels, got 3"],
    ),
    "images RGBA": (
        lambda at, site: {"clean": image_folder(at / "c", [2] * 10, "RGBA")},
        3,
        ["RGBA", "convert"],
    ),
    "images of another size": (
        lambda at, site: {"clean": image_folder(at / "c", [2] * 10, size=1)},
        3,
        ["cannot take images of 1x1x1"],
    ),
    "class folder empty": (lambda at, site: {"clean": image_folder(at / "c", [2, 0, 2])}, 3, ["class-1", "no image"]),
    "class without images": (
        lambda at, site: {"clean": npz(at / "c.npz", GREY, EACH % 9)},
        3,
        ["no image of class 9", "each of the 10 classes"],
    ),
    "one image": (lambda at, site: {"clean": npz(at / "c.npz", GREY[:1], EACH[:1])}, 3, ["at least 2 clean images"]),
    "labels too high": (
        lambda at, site: {"clean": npz(at / "c.npz", GREY, EACH + 1)},
        3,
        ["labels go up to 10", "10 classes"],
    ),
    "labels negative": (lambda at, site: {"clean": npz(at / "c.npz", GREY, EACH - 1)}, 3, ["labels from 0", "-1"]),
    "labels fractional": (lambda at, site: {"clean": npz(at / "c.npz", GREY, EACH / 2)}, 3, ["whole numbers"]),
    "labels too few": (lambda at, site: {"clean": npz(at / "c.npz", GREY, EACH[:-1])}, 3, ["20 images, 19 labels"]),
    "images are pickles": (
        lambda at, site: {"clean": npz(at / "c.npz", np.array([Payload()]), EACH[:1])},
        3,
        ["pickled objects"],
    ),
    "more samples than images": (lambda at, site: {"options": ("--samples", "9999")}, 3, ["9999", "there are 80"]),
    "too few per class": (lambda at, site: {"options": ("--samples-per-class", "50")}, 3, ["50", "class"]),
    "net unknown": (lambda at, site: {"net": "resnet"}, 4, ["unknown net 'resnet'", "resnet18"]),
    "net argument unknown": (lambda at, site: {"net": f"{NET}:width=2"}, 4, ["width", "classes: int = 10"]),
    "net not importable": (lambda at, site: {"net": "no_such_module:make"}, 4, ["no_such_module", "importable"]),
    "method unknown": (lambda at, site: {"options": ("--method", "rpn")}, 4, ["'rpn'", "rnp"]),
    "method empty": (lambda at, site: {"options": ("--method=",)}, 4, ["value behind --method=", "empty"]),
    "images empty": (lambda at, site: {"clean": ""}, 4, ["value behind --clean", "empty"]),
    "out empty": (lambda at, site: {"out": ""}, 4, ["value behind --out", "empty"]),
    "method without name": (lambda at, site: {"options": ("--method",)}, 4, ["--method", "requires an argument"]),
    "last method counts": (lambda at, site: {"options": ("--method", "rnp", "--method=x")}, 4, ["'x'"]),
    "option of wrong type": (
        lambda at, site: {"options": ("--method", "rnp", "--unlearn-lr", "much")},
        4,
        ["`--unlearn-lr`: ", "number", "'much'", "it takes --budget=0.02, --variant=fixed"],
    ),
    "option out of range": (lambda at, site: {"options": ("--budget", "2")}, 4, ["budget", "less than 1", "'2'"]),
    "options that clash": (
        lambda at, site: {"options": ("--method", "rnp", "--variant", "released")},
        4,
        ["select", "threshold"],
    ),
    "option unknown": (lambda at, site: {"options": ("--bugdet", "0.1")}, 4, ["--bugdet", "--budget"]),
    "argument too many": (lambda at, site: {"options": ("more",)}, 4, ["unexpected extra argument", "more"]),
    "method behind --": (lambda at, site: {"options": ("--", "--method", "x")}, 4, ["unexpected extra argument"]),
    "seed negative": (lambda at, site: {"options": ("--seed", "-1")}, 4, ["--seed", "-1"]),
    "no samples": (lambda at, site: {"options": ("--samples", "0")}, 4, ["--samples", "x>=1"]),
    "both kinds of samples": (
        lambda at, site: {"options": ("--samples", "20", "--samples-per-class", "2")},
        4,
        ["samples or of samples per class, got both"],
    ),
    "mean without std": (lambda at, site: {"options": ("--mean", "0.5")}, 4, ["both mean and std"]),
    "mean longer than std": (
        lambda at, site: {"options": ("--mean", "0.5,0.5", "--std", "0.5")},
        4,
        ["as many finite deviations above 0 as finite means"],
    ),
    "mean no number": (lambda at, site: {"options": ("--mean", "a,b")}, 4, ["separated by commas", "'a,b'"]),
    "out is a file": (lambda at, site: {"out": written(at / "f", b"mine")}, 4, ["is a file", "folder"]),
    "out is a pipe": (lambda at, site: {"out": piped(at / "p")}, 4, ["is a file", "folder"]),
    "out is under a file": (lambda at, site: {"out": written(at / "f", b"mine") / "x"}, 4, ["f is a file", "another"]),
    "out is not empty": (
        lambda at, site: {"out": written(at / "notes.txt", b"mine").parent},
        4,
        ["not empty", "--force"],
    ),
    "name not in UTF-8": (lambda at, site: {"model": "m\udcff"}, 4, ["UTF-8"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_a_clear_error_and_loses_nothing(case, command, site, talk, tmp_path, monkeypatch):
    make, expected, fragments = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    changes = make(tmp_path, site)
    arguments = command(*changes.pop("options", ()), **changes)
    before = holdings(tmp_path)
    code, out, err = talk(arguments)
    assert (code, out) == (expected, "")
    assert err.startswith("untrojan: ")
    assert err.count("untrojan: ") == 1
    assert "Traceback" not in err
    assert [fragment for fragment in fragments if fragment not in err] == []
    assert holdings(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["repiar"], "No such command 'repiar'"),
        (["repair"], "Missing argument 'MODEL'"),
        (["repair", "m.pt", "--clean", "c", "--out", "o"], "Missing option '--net'"),
        (["evaluate", "m.pt", "--net", NET], "Missing option '--test'"),
        (["restore", "folder"], "Missing option '--out'"),
        (["restore", "folder", "--out"], "Option '--out' requires an argument; see `untrojan restore --help`"),
        (["methods", "--yaml"], "No such option"),
        (
            ["repair", "--method", "clp", "--rounds", "3"],
            "clp has no option --rounds; see `untrojan repair --method clp ",
        ),
        (["scan", "--sampels", "3"], "triggers has no option --sampels. Did you mean '--samples'?"),
        (["--verbose"], "No such option"),
    ],
)
def test_wrong_call_says_where_the_help_is(talk, arguments, fragment):
    code, out, err = talk(arguments)
    assert (code, out) == (4, "")
    assert err.startswith("untrojan: ")
    assert fragment in err
    assert "--help`" in err
    assert err.count("\n") == 1


def test_without_arguments_help_goes_to_stderr(talk):
    code, out, err = talk([])
    assert (code, out) == (4, "")
    assert "Commands:" in err


def test_required_option_of_a_method_is_named(command, talk, stub):
    code, _, err = talk(command("--method", "stub"))
    assert code == 4
    assert "Missing option '--end'" in err


# Stops and failures


@pytest.mark.parametrize(
    ("end", "expected"),
    [("repaired", 0), ("nothing_to_repair", 0), ("inconclusive", 2), ("failed", 2), ("interrupted", 130), ("bug", 5)],
)
def test_exit_code_follows_how_the_repair_ended(command, talk, stub, tmp_path, end, expected):
    code, out, err = talk(command("--method", "stub", "--end", end))
    assert code == expected
    if end in ("interrupted", "bug"):
        assert list(tmp_path.iterdir()) == []
        assert out == ""
        assert err.splitlines()[-1].startswith("untrojan: ")
        assert ("Traceback" in err) == (end == "bug")
    else:
        assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
        assert out.startswith(end.replace("_", " "))
        assert "warning: this stands on little" in err


@contextlib.contextmanager
def no_file_above(size):
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize("size", [50_000, 500_000], ids=["weights", "report"])
@pytest.mark.parametrize("force", [False, True])
def test_full_disk_leaves_nothing_half_written(command, talk, stub, tmp_path, size, force):
    arguments = command("--method", "stub", "--end", "repaired", *(["--force"] if force else []))
    if force:
        assert talk([*arguments, "--seed", "1"])[0] == 0
    before = holdings(tmp_path)
    with no_file_above(size):
        code, out, err = talk(arguments)
    assert (code, out) == (5, "")
    assert "cannot finish: File too large" in err
    assert "Traceback" not in err
    assert holdings(tmp_path) == before
    assert talk(arguments)[0] == 0


def test_full_disk_while_restoring_keeps_the_old_file(repaired, talk, tmp_path):
    old = written(tmp_path / "old.safetensors", b"old")
    with no_file_above(50_000):
        code, _, err = talk(["restore", repaired[0], "--out", old, "--force"])
    assert code == 5
    assert "cannot finish: File too large" in err
    assert holdings(tmp_path) == {old: b"old"}


@pytest.mark.slow
@pytest.mark.usefixtures("short_searches")
def test_killed_run_leaves_no_output_and_can_be_repeated(command, talk, tmp_path):
    strike = "writing._move = lambda *_: os.kill(os.getpid(), signal.SIGKILL)"
    killed = f"{SCANS_QUICKLY}{strike}\nuntrojan.cli.run(sys.argv[1:])"
    assert hasattr(untrojan.writing, "_move")
    done = subprocess.run([sys.executable, "-c", killed, *command()], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert talk(command())[0] in (0, 2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES


def on_a_terminal(arguments, act):
    """Run with a terminal of 80 columns on stderr; `act` is called once with the process when a bar is there."""
    program = sys.executable, "-c", f"{SCANS_QUICKLY}untrojan.cli.main()"
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*program, *arguments], stdout=subprocess.PIPE, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(ours, 65536):
            shown += part
            if b"unlearn" in shown and act:
                act(process)
                act = None
    os.close(ours)
    out = process.communicate()[0]
    return process.returncode, out.decode(), shown.decode()


def assert_cursor_is_back(shown):
    assert "\x1b[?25l" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_run_ends_cleanly(command, tmp_path, stop):
    code, out, shown = on_a_terminal(command(*ENDLESS), lambda process: process.send_signal(stop))
    assert (code, out) == (130, "")
    assert "untrojan: interrupted" in shown
    assert "Traceback" not in shown
    assert_cursor_is_back(shown)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_terminal_gets_bars_and_stdout_the_result(command, tmp_path):
    code, out, shown = on_a_terminal(command(*QUICK, "--json"), None)
    assert code in (0, 2)
    assert Record.model_validate_json(out)
    assert "━" in shown
    assert_cursor_is_back(shown)


def test_a_call_without_stdout_is_told_before_it_begins():
    done = subprocess.run(
        [COMMAND, "methods"], preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (4, "untrojan: stdout is closed; expected a place for the result\n")


@pytest.mark.parametrize(("where", "arguments"), [("closed pipe", ["--help"]), ("full disk", ["methods"])])
def test_result_that_cannot_be_delivered_is_a_quiet_failure(where, arguments):
    if where == "full disk":
        out = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, out = os.pipe()
        os.close(reader)
    done = subprocess.run([COMMAND, *arguments], stdout=out, stderr=subprocess.PIPE, text=True, check=False)
    os.close(out)
    assert done.returncode == 5
    assert done.stderr == "" if where == "closed pipe" else "No space left" in done.stderr
    assert "Traceback" not in done.stderr


# Repair


def test_record_tells_all_about_the_run(repaired, site):
    folder, arguments = repaired
    record = json.loads((folder / RECORD).read_text())
    assert (record["schema_version"], record["kind"], record["seed"]) == (1, "repair", 3)
    assert record["status"] in ("repaired", "nothing_to_repair", "inconclusive", "failed")
    assert record["reason"]
    rnp = discover("untrojan.defenses", Defense)["rnp"]
    assert record["method"]["name"] == "rnp"
    assert list(record["method"]["fields"]) == [field.name for field in fields(rnp)]
    assert record["method"]["fields"]["unlearn_epochs"] == 2

    model = site / "model.safetensors"
    assert record["model"]["path"] == str(model)
    assert record["model"]["sha256"] == sha256(model.read_bytes())
    assert record["model"]["state_sha256"] == state_sha256(Checkpoint.read(model).tensors)
    assert record["model"]["net"] == NET
    assert record["repaired"]["path"] == REPAIRED
    assert record["repaired"]["sha256"] == sha256((folder / REPAIRED).read_bytes())
    assert record["clean"]["path"] == str(site / "clean.npz")
    assert record["clean"]["per_class"] == [4] * 10

    scores = [target["score"] for target in record["diagnosis"]["targets"]]
    assert scores == sorted(scores, reverse=True)
    assert record["diagnosis"]["verdict"] in ("found", "not_found", "inconclusive")
    assert record["selection"]["rule"].startswith("count: ")
    assert record["selection"]["curve"][record["selection"]["chosen"]]["pruned"] == record["units_changed"] == 3
    for side in ("before", "after"):
        rate = record[side]["accuracy"]
        assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    assert {"unlearn", "recover"} <= record["seconds"].keys()
    assert record["peak_memory_bytes"] > 1e6
    assert {"untrojan", "torch", "python"} <= record["environment"].keys()
    assert shlex.split(record["command"]) == ["untrojan", *arguments]


@pytest.mark.parametrize("name", DEFENSES)
def test_every_method_runs_with_its_options(name, command, talk, site, tmp_path):
    options = [f"--{field.replace('_', '-')}={value}" for field, value in FEW_STEPS[name].items()]
    code, _, told = talk(command(f"--method={name}", *options, "--samples-per-class", 4))
    record = Record.load(tmp_path / "out" / RECORD)
    assert code == (0 if record.status in ("repaired", "nothing_to_repair") else 2), told
    assert record.status != "nothing_to_repair"
    assert record.method.name == name
    assert record.method.fields.items() >= FEW_STEPS[name].items()
    state = Checkpoint.read(tmp_path / "out" / REPAIRED).tensors
    assert state.keys() == Checkpoint.read(site / "model.safetensors").tensors.keys()


def test_repaired_weights_load_into_the_plain_network(repaired, site):
    state = Checkpoint.read(repaired[0] / REPAIRED).tensors
    original = Checkpoint.read(site / "model.safetensors").tensors
    assert {name: value.dtype for name, value in state.items()} == {
        name: value.dtype for name, value in original.items()
    }
    build(NET).load_state_dict(state)
    assert (repaired[0] / REPORT).read_text().startswith("<!DOCTYPE html>")
    assert {path.name for path in repaired[0].iterdir()} == FILES


def test_command_in_the_record_repeats_the_run(repaired, talk, tmp_path):
    folder, _ = repaired
    arguments = shlex.split(Record.load(folder / RECORD).command)[1:]
    again = tmp_path / "again"
    arguments[arguments.index("--out") + 1] = str(again)
    talk(arguments)
    assert (again / REPAIRED).read_bytes() == (folder / REPAIRED).read_bytes()
    assert (again / CHANGES).read_bytes() == (folder / CHANGES).read_bytes()


def test_json_is_the_record_and_nothing_else(command, talk, stub, tmp_path):
    _, out, _ = talk(command("--method", "stub", "--end", "repaired", "--json"))
    assert out == (tmp_path / "out" / RECORD).read_text()
    assert json.loads(out)["warnings"] == ["this stands on little"]


def test_progress_goes_to_stderr(command, talk, monkeypatch):
    monkeypatch.setattr(untrojan.cli.options, "Lines", partial(untrojan.progress.Lines, every=0, quick=0))
    _, out, err = talk(command(*UNRELIABLE, "--json"))
    assert Record.model_validate_json(out)
    assert "unlearn: 1 of 2, " in err
    assert "unlearn: done in " in err
    assert "\x1b" not in err


def test_quiet_prints_nothing_on_stderr(command, talk, monkeypatch, tmp_path):
    monkeypatch.setattr(untrojan.cli.options, "Lines", partial(untrojan.progress.Lines, every=0, quick=0))
    _, out, err = talk(command(*UNRELIABLE, "--quiet"))
    assert err == ""
    assert "wrote" in out
    assert Record.load(tmp_path / "out" / RECORD).warnings


def test_seed_draws_the_images(command, talk, stub, tmp_path):
    def drawn(name, seed):
        options = ("--method", "stub", "--end", "repaired", "--samples", "30", "--seed", seed)
        talk(command(*options, out=tmp_path / name))
        return Record.load(tmp_path / name / RECORD).clean.sha256

    assert drawn("a", 1) == drawn("b", 1) != drawn("c", 2)


def test_force_replaces_the_run_and_keeps_what_is_not_ours(command, talk, stub, tmp_path):
    talk(command("--method", "stub", "--end", "repaired"))
    written(tmp_path / "out" / "notes.txt", b"mine")
    (tmp_path / "out" / RECORD).write_text("old")
    before = holdings(tmp_path)
    refused, _, err = talk(command("--method", "stub", "--end", "failed"))
    assert refused == 4
    assert "--force" in err
    assert holdings(tmp_path) == before
    assert talk(command("--method", "stub", "--end", "failed", "--force"))[0] == 2
    assert Record.load(tmp_path / "out" / RECORD).status == "failed"
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"notes.txt"}
    assert (tmp_path / "out" / "notes.txt").read_bytes() == b"mine"


def test_force_does_not_replace_the_model_it_reads(command, talk, stub, tmp_path):
    options = ("--method", "stub", "--end", "repaired", "--force")
    talk(command(*options))
    before = holdings(tmp_path)
    code, _, err = talk(command(*options, model=tmp_path / "out" / REPAIRED))
    assert code == 4
    assert "holds the model itself" in err
    assert holdings(tmp_path) == before


def test_out_may_be_an_empty_folder_or_lie_in_one_that_is_not_there(command, talk, stub, tmp_path):
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "not" / "there"):
        assert talk(command("--method", "stub", "--end", "repaired", out=out))[0] == 0
        assert {path.name for path in out.iterdir()} == FILES


def test_class_names_cannot_steer_the_terminal(command, talk, stub, tmp_path):
    images = image_folder(tmp_path / "images", [1] * 10)
    (images / "class-1").rename(images / "class-1\x1b[2J\nNo backdoor found")
    _, out, _ = talk(command("--method", "stub", "--end", "repaired", clean=images))
    assert "label 1 ('class-1\\x1b[2J\\nNo backdoor found')" in out
    assert "No backdoor found" not in out.splitlines()
    (images / "class-3" / "0.png").write_bytes(b"no image")
    (images / "class-3").rename(images / "class-3\x1b[2J")
    code, _, err = talk(command("--method", "stub", "--end", "repaired", "--force", clean=images))
    assert code == 3
    assert "class-3\\x1b[2J" in err


@pytest.mark.parametrize(
    ("name", "body", "expected", "fragment"),
    [
        ("cli_prints", "print('building'); return build('digits-cnn')", 0, "building"),
        ("cli_exits", "raise SystemExit(0)", 4, "cli_exits:make ended the program with sys.exit"),
        ("cli_exits_later", "net = build('digits-cnn'); net.forward = lambda _: sys.exit(); return net", 4, "sys.exit"),
        ("cli_breaks", "return 1 / 0", 4, "ZeroDivisionError"),
        ("cli_no_net", "return 3", 4, "torch.nn.Module, got int"),
    ],
)
def test_network_of_ones_own(command, talk, stub, tmp_path, monkeypatch, name, body, expected, fragment):
    monkeypatch.chdir(tmp_path)
    Path(f"{name}.py").write_text(f"import sys\nfrom untrojan.sources.nets import build\ndef make():\n    {body}\n")
    code, out, err = talk(command("--method", "stub", "--end", "repaired", "--json", net=f"{name}:make"))
    assert code == expected
    assert fragment in err
    if expected == 0:
        assert json.loads(out)["model"]["net"] == f"{name}:make"


# Restore, and what containers become


def half(state):
    return {name: value.half() if value.is_floating_point() else value for name, value in state.items()}


def bfloat(state):
    return {name: value.bfloat16() if value.is_floating_point() else value for name, value in state.items()}


def double(state):
    """As another framework may have trained it: with digits that float32 does not hold."""
    return {name: value.double() * (1 + 1e-12) if value.is_floating_point() else value for name, value in state.items()}


CONTAINERS = {
    "half precision": half,
    "bfloat16": bfloat,
    "float64": double,
    "prefixed": lambda state: {f"module.{name}": value for name, value in state.items()},
    "nested": lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3},
    "without counters": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_names_and_types_of_the_file_are_kept_and_restored(container, command, site, talk, stub, tmp_path):
    torch.save(CONTAINERS[container](Checkpoint.read(site / "model.safetensors").tensors), tmp_path / "m.pt")
    original = Checkpoint.read(tmp_path / "m.pt").tensors
    assert talk(command("--method", "stub", "--end", "repaired", model=tmp_path / "m.pt"))[0] == 0
    child = Checkpoint.read(tmp_path / "out" / REPAIRED).tensors
    assert {name: (value.shape, value.dtype) for name, value in child.items()} == {
        name: (value.shape, value.dtype) for name, value in original.items()
    }
    code, out, _ = talk(["restore", tmp_path / "out", "--out", tmp_path / "new" / "back.safetensors"])
    assert code == 0
    assert state_sha256(Checkpoint.read(tmp_path / "new" / "back.safetensors").tensors) == state_sha256(original)
    assert state_sha256(original) in out
    assert Record.load(tmp_path / "out" / RECORD).model.state_sha256 == state_sha256(original)


def test_restore_refuses_what_exists(repaired, talk, tmp_path):
    old = written(tmp_path / "old.safetensors", b"old")
    code, out, err = talk(["restore", repaired[0], "--out", old])
    assert (code, out) == (4, "")
    assert "--force" in err
    assert old.read_bytes() == b"old"
    assert talk(["restore", repaired[0], "--out", tmp_path])[0] == 4
    assert talk(["restore", repaired[0], "--out", old, "--force"])[0] == 0
    assert Checkpoint.read(old).tensors


@pytest.mark.parametrize("name", [REPAIRED, CHANGES, "link"])
def test_restore_does_not_replace_what_it_reads(repaired, talk, tmp_path, name):
    out = tmp_path / "out"
    shutil.copytree(repaired[0], out)
    (out / "link").symlink_to(out / REPAIRED)
    before = holdings(out)
    code, _, err = talk(["restore", out, "--out", out / name, "--force"])
    assert code == 4
    assert "is a part of the repair" in err
    assert holdings(out) == before


def test_restore_writes_into_no_pipe_and_through_a_link(repaired, talk, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = talk(["restore", repaired[0], "--out", tmp_path / "pipe", "--force"])
    assert (code, (tmp_path / "pipe").is_fifo()) == (4, True)
    assert "pipe is a pipe or a device" in err
    (tmp_path / "link").symlink_to(tmp_path / "new" / "file")
    assert talk(["restore", repaired[0], "--out", tmp_path / "link"])[0] == 0
    assert (tmp_path / "link").is_symlink()
    assert Checkpoint.read(tmp_path / "new" / "file").tensors


def test_restore_refuses_a_pair_that_does_not_belong_together(repaired, site, talk, tmp_path):
    code, _, err = talk(["restore", site, "--out", tmp_path / "back"])
    assert code == 3
    assert f"no {REPAIRED} and no {CHANGES}" in err
    assert "untrojan repair" in err
    written(tmp_path / REPAIRED, (site / "model.safetensors").read_bytes())
    written(tmp_path / CHANGES, (repaired[0] / CHANGES).read_bytes())
    code, _, err = talk(["restore", tmp_path, "--out", tmp_path / "back"])
    assert code == 3
    assert "belongs to another model" in err
    assert not (tmp_path / "back").exists()


# Evaluate


@pytest.fixture
def measured(site, talk):
    def call(*options, test=site / "clean.npz"):
        return talk(["evaluate", site / "model.safetensors", "--net", NET, "--test", test, *options])

    return call


ATTACK = ("--attack", "badnets:size=2", "--target", "0")


def test_evaluate_gives_clean_accuracy(measured):
    code, out, err = measured()
    assert (code, err) == (0, "")
    assert out.startswith("ACC")
    assert "of 80, 95 % interval" in out
    assert "ASR" not in out


def test_evaluate_takes_test_images_that_leave_classes_out(measured, tmp_path):
    code, out, _ = measured(test=npz(tmp_path / "one.npz", GREY[:1], EACH[:1]))
    assert code == 0
    assert "of 1," in out


@pytest.mark.parametrize("target", ["0", "all-to-all"])
def test_evaluate_puts_the_trigger_on(measured, repaired, target):
    before = repaired[0] / REPAIRED
    code, out, _ = measured("--attack", "badnets:size=2", "--target", target, "--before", before)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["ACC", "ASR", "RA", "DER"]


def test_evaluate_speaks_json(measured, site):
    code, out, _ = measured(*ATTACK, "--before", site / "model.safetensors", "--json")
    scores = json.loads(out)
    assert code == 0
    assert scores["attack"]["name"] == "badnets"
    assert scores["attack"]["fields"]["size"] == 2
    assert scores["target"] == 0
    assert scores["asr"]["total"] == scores["ra"]["total"] < scores["acc"]["total"] == scores["images"] == 80
    assert scores["der"] == 0.5


@pytest.mark.parametrize(
    ("options", "expected", "fragment"),
    [
        (("--attack", "badnet", "--target", "0"), 4, "no attack is named 'badnet'; expected one of"),
        (("--attack", "badnets:size=big", "--target", "0"), 4, "size"),
        (("--attack", "badnets:size", "--target", "0"), 4, "no key=value"),
        (("--attack", "masked", "--target", "0"), 4, "`mask` must be given"),
        (("--attack", "badnets"), 4, "--attack and --target together"),
        (("--target", "0"), 4, "--attack and --target together"),
        (("--attack", "badnets", "--target", "zero"), 4, "all-to-all as target, got 'zero'"),
        (("--attack", "badnets", "--target", "10"), 4, "10"),
        (("--before", "x"), 4, "--attack and --target with it"),
        (("--attack", "badnets:size=9", "--target", "0"), 3, "inside of the 8x8 image"),
        ((*ATTACK, "--before", "missing.pt"), 3, "cannot read missing.pt"),
    ],
)
def test_evaluate_refuses_what_it_cannot_measure(measured, options, expected, fragment):
    code, out, err = measured(*options)
    assert (code, out) == (expected, "")
    assert fragment in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("images", "labels", "fragment"),
    [
        (GREY.repeat(3, 1), EACH, "model.safetensors: the model cannot take images of 3x8x8"),
        (GREY, EACH + 1, "label 10"),
    ],
)
def test_evaluate_refuses_images_that_do_not_fit(measured, tmp_path, images, labels, fragment):
    code, out, err = measured(test=npz(tmp_path / "bad.npz", images, labels))
    assert (code, out) == (3, "")
    assert fragment in err
    assert "Traceback" not in err


# Methods and help


def test_methods_are_listed(talk):
    known = discover("untrojan.defenses", Defense)
    code, out, _ = talk(["methods"])
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[: len(known)]] == list(known)
    code, out, _ = talk(["methods", "--json"])
    cards = json.loads(out)
    assert code == 0
    assert [card["name"] for card in cards] == list(known)
    for card, method in zip(cards, known.values(), strict=True):
        assert card["summary"]
        assert [field["name"] for field in card["fields"]] == [field.name for field in fields(method)]
        assert all(field["help"] and field["type"] for field in card["fields"])


def test_methods_say_what_they_need_and_cost_and_whose_they_are(talk):
    _, text, _ = talk(["methods"])
    _, cards, _ = talk(["methods", "--json"])
    for card, method in zip(json.loads(cards), discover("untrojan.defenses", Defense).values(), strict=True):
        told = documentation(method)
        needs, cost = told.line("Needs"), told.line("Cost")
        assert (card["needs"], card["cost"], card["references"]) == (needs, cost, told.references)
        assert all(part and part in text for part in (needs, cost, told.references[0]))
    assert "paper  The project's own" in text


@pytest.mark.parametrize("cls", discover("untrojan.defenses", Defense).values())
def test_defaults_given_as_options_make_the_default_method(cls):
    given = [f"--{each.name.replace('_', '-')}={each.default}" for each in fields(cls) if each.default is not None]
    made = []
    command = click.Command("any", params=options_of(cls), callback=lambda **params: made.append(made_of(cls, params)))
    command.main(given, standalone_mode=False)
    assert made == [cls()]
    assert len(given) >= len(fields(cls)) - 1


def squashed(text):
    """Without spaces, because help wraps at hyphens too."""
    return "".join(text.split())


@pytest.mark.parametrize("method", discover("untrojan.defenses", Defense))
def test_help_lists_every_option_of_the_method_with_its_default_and_the_deviations(talk, method):
    code, out, err = talk(["repair", "--method", method, "--help"])
    assert (code, err) == (0, "")
    shared, own = out.split(f"Options of {method}:")
    own, deviations = " ".join(own.split()).split("Deviations: ")
    assert "--clean DATA" in shared
    cls = discover("untrojan.defenses", Defense)[method]
    assert squashed(documentation(cls).line("Deviations")) == squashed(deviations)
    for field in fields(cls):
        option = own.partition(f"--{field.name.replace('_', '-')} ")[2].partition(" --")[0]
        assert (f"[default: {field.default}]" in option) == (field.default is not None)
        assert "None" not in option
        assert squashed(field.help.replace("`", "")) in squashed(option)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(talk, verb):
    for option in ("--help", "-h"):
        code, out, err = talk([verb, option])
        assert (code, err) == (0, "")
        assert out.startswith(f"Usage: untrojan {verb}")
    assert f"  {verb} " in talk(["--help"])[1]


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_what_the_program_says_of_itself_does_not_wait_for_torch(option):
    code = f"import sys; from untrojan.cli import run; print(run(['{option}']), 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("0 False\n")


def test_version(talk):
    code, out, _ = talk(["--version"])
    assert code == 0
    assert out == f"untrojan, version {untrojan.__version__}\n"
