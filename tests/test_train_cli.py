"""`untrojan lab train` end to end: exit codes, what is written, and that kill -9 costs an epoch at most."""

import json
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from tiny import digits

from untrojan.cli import run
from untrojan.lab import checkpoint
from untrojan.lab.recipe import ATTACK, MODEL, Recipe, VictimRecord
from untrojan.registry import fields
from untrojan.writing import RECORD

CHECKPOINT = ".out.training.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    few = digits().take(range(600))
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    np.savez(path, images=few.images, labels=few.labels)
    return path


@pytest.fixture
def command(tmp_path, data):
    def arguments(*options, out=tmp_path / "out"):
        given = ("lab", "train", "--net", "digits-cnn", "--data", data, "--epochs", 6, "--batch-size", 32)
        attack = ("--attack", "badnets:size=2", "--target", 7)
        return [*map(str, (*given, *attack, "--out", out, *options))]

    return arguments


def told(folder):
    record = json.loads((folder / RECORD).read_text())
    for epoch in record["epochs"]:
        del epoch["seconds"]
    return {key: value for key, value in record.items() if key not in ("peak_memory_bytes", "command")}


def test_a_victim(command, tmp_path, capsys):
    assert run(command()) == 0
    out, _ = capsys.readouterr()
    assert out.startswith("backdoored: badnets took: ")
    assert "\nACC " in out
    assert "\nASR " in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    record = VictimRecord.load(tmp_path / "out" / RECORD)
    assert record.net == "digits-cnn"
    assert record.command == shlex.join(["untrojan", *command()])
    assert record.scores.acc.value > 0.8
    capsys.readouterr()
    measured = ["evaluate", tmp_path / "out" / MODEL, "--net", "digits-cnn", "--test", record.clean.path]
    assert run([*map(str, measured), "--attack", "badnets:size=2", "--target", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asr"]["value"] > 0.9


def test_a_trigger_that_was_learned_is_written_too_and_can_be_measured(tmp_path, data, capsys):
    given = ["lab", "train", "--net", "digits-cnn", "--data", data, "--attack", "lira:eps=0.1,lr=0.01", "--target=7"]
    assert run([*map(str, given), "--epochs=3", "--batch-size=64", "--out", str(tmp_path / "out"), "--json"]) in (0, 2)
    record = json.loads(capsys.readouterr().out)
    learned = tmp_path / "out" / ATTACK
    images = ["--net", "digits-cnn", "--test", data, "--target=7", "--json"]
    spec = f"lira:eps=0.1,weights={learned}"
    assert run([*map(str, ["evaluate", tmp_path / "out" / MODEL, *images, "--attack", spec])]) == 0
    assert json.loads(capsys.readouterr().out)["asr"]["value"] == pytest.approx(
        record["scores"]["asr"]["value"], abs=0.1
    )
    assert run([*map(str, ["evaluate", tmp_path / "out" / MODEL, *images, "--attack", "lira"])]) == 4
    assert "lira:weights=FOLDER/attack.safetensors" in capsys.readouterr().err


def test_an_attack_that_did_not_take(command, tmp_path, capsys):
    assert run(command("--rate", 0, "--json", "--quiet")) == 2
    out, err = capsys.readouterr()
    assert err == ""
    assert json.loads(out)["status"] == "attack_did_not_take"
    assert out == (tmp_path / "out" / RECORD).read_text()
    assert (tmp_path / "out" / MODEL).is_file()


def test_a_clean_model_on_test_images_of_its_own(tmp_path, data, capsys):
    given = ["lab", "train", "--net", "digits-cnn", "--data", data, "--test", data, "--epochs=2", "--out"]
    assert run([*map(str, given), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("trained: no attack was asked for\nACC ")
    record = VictimRecord.load(tmp_path / "out" / RECORD)
    assert (record.held_out, record.test.images, record.recipe["batch_size"]) == (False, 600, 128)


@pytest.mark.slow
def test_killed_and_resumed_it_ends_as_if_nothing_had_been(command, tmp_path, capsys):
    assert run(command(out=tmp_path / "undisturbed" / "out")) == 0
    child = subprocess.Popen(
        [sys.executable, "-m", "untrojan", *command()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / CHECKPOINT).exists() and child.poll() is None:
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert run(command()) == 4
    assert "--resume goes on with it, --force begins anew" in capsys.readouterr().err
    assert run(command("--resume", "--seed", 1)) == 4
    assert "seed is 0 there, 1 here" in capsys.readouterr().err
    assert run(command("--resume")) == 0
    assert told(tmp_path / "out") == told(tmp_path / "undisturbed" / "out")
    weights = [(folder / MODEL).read_bytes() for folder in (tmp_path / "out", tmp_path / "undisturbed" / "out")]
    assert weights[0] == weights[1]
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("kept", [True, False])
def test_who_interrupts_a_training_hears_what_is_kept(command, tmp_path, capsys, monkeypatch, kept):
    save = checkpoint.save

    def interrupted(*arguments):
        if kept:
            save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    assert run(command()) == 130
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("untrojan: interrupted; no file was left half-written")
    assert (f"{tmp_path / CHECKPOINT} has the epochs that are done, and --resume goes on" in told) == kept
    monkeypatch.undo()
    assert run(command("--resume")) == 0
    assert not (tmp_path / CHECKPOINT).exists()


def test_who_interrupts_a_training_hears_nothing_of_an_earlier_one(command, tmp_path, capsys, monkeypatch, request):
    """In the background of a shell, which may be where tests run, the signal is ignored otherwise."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    (tmp_path / CHECKPOINT).write_bytes(b"of another training")
    monkeypatch.setattr(checkpoint, "save", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(command("--force")) == 130
    assert "--resume" not in capsys.readouterr().err


def test_force_begins_an_interrupted_training_anew(command, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"nothing to go on from")
    assert run(command("--resume")) == 3
    assert run(command("--force")) == 0
    assert not (tmp_path / CHECKPOINT).exists()


@pytest.mark.parametrize("options", [["--data", "nowhere.npz"], ["--attack", "badnets:size=9"], ["--net", "nothing"]])
def test_an_interrupted_training_outlives_a_call_that_cannot_begin(command, tmp_path, options):
    (tmp_path / CHECKPOINT).write_bytes(b"hours of work")
    assert run(command("--force", *options)) in (3, 4)
    assert (tmp_path / CHECKPOINT).read_bytes() == b"hours of work"


def test_nothing_to_resume_is_a_training_from_the_start(command, tmp_path):
    assert run(command("--resume")) == 0
    assert len(VictimRecord.load(tmp_path / "out" / RECORD).epochs) == 6


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--target", "x"], 4, "expected a class number or all-to-all as target, got 'x'"),
        (["--target", "10"], 4, "class from 0 to 9, got 10"),
        (["--attack", "nothing"], 4, "no attack is named 'nothing'"),
        (["--rate", "2"], 4, "poisoning rate between 0 and 1"),
        (["--epochs", "0"], 4, "`--epochs`"),
        (["--lr", "1e6"], 3, "give a lower --lr (lr) than 1e+06"),
        (["--lr", "1e30"], 3, "give a lower --lr (lr) than 1e+30"),
        (["--augment", "flip"], 4, "`--augment`"),
        (["--net", "digits-cnn:classes=12"], 3, "no image of class 10, 11"),
        (["--data", "/nowhere.parquet"], 3, "nowhere"),
        (["--test", ""], 4, "expected a value behind --test"),
        (["--out", "/", "--force"], 4, "/ has no name"),
    ],
)
def test_what_does_not_fit_leaves_nothing_behind(command, tmp_path, capsys, monkeypatch, options, code, message):
    monkeypatch.chdir(tmp_path)
    assert run(command(*options)) == code
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_waited_for(command, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert run(command()) == 4
    assert "--force" in capsys.readouterr().err


def test_help_names_every_field_of_a_recipe(capsys):
    assert run(["lab", "train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{field.name.replace('_', '-')} " in text for field in fields(Recipe))
    assert "at least 90 %, or 70 % for clean-label attacks, of ACC where it is all-to-all" in " ".join(text.split())
