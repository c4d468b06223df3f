"""`untrojan scan` end to end: exit codes, what is written and printed, and what bad input is told."""

import json
import os
import shlex
from typing import ClassVar, Literal

import jsonschema
import numpy as np
import pytest
import torch
from sarif_schema import SCHEMA
from tiny import train

import untrojan.cli.scan
from untrojan.cli import run
from untrojan.data import CleanSet
from untrojan.record import Diagnosis, ScanRecord, Target
from untrojan.registry import config, discover, fields
from untrojan.scanners.scanner import Scanner
from untrojan.sources.files import Checkpoint, save_state, state_sha256
from untrojan.sources.nets import build
from untrojan.writing import RECORD, REPORT, SARIF, sha256

FILES = {RECORD, REPORT, SARIF}
NET = "digits-cnn"
SCANNERS = discover("untrojan.scanners", Scanner)
QUICK = {
    "neural-cleanse": ("--mask-epochs=1",),
    "triggers": ("--runs=1", "--unlearn-epochs=1", "--search-steps=1", "--refine-steps=1"),
    "unlearning": ("--runs=1", "--unlearn-epochs=1"),
}


@config
class Stub(Scanner):
    """Ends as it is told.

    Attributes:
        verdict: How it ends.
    """

    name: ClassVar[str] = "triggers"
    verdict: Literal["found", "not_found", "inconclusive", "interrupted"] = "found"

    def _scan(self, model, clean, seed):
        if self.verdict == "interrupted":
            raise KeyboardInterrupt
        return Diagnosis(verdict=self.verdict, rule="as told", targets=[Target(label=1, score=0.9)], runs=[])


@pytest.fixture
def stub(monkeypatch):
    monkeypatch.setattr(untrojan.cli.scan, "discover", lambda *_: {"triggers": Stub})


@pytest.fixture
def command(tmp_path):
    """Build the arguments of a scan, into `tmp_path / "out"`, of a model that knows its images by heart."""
    torch.manual_seed(0)
    images = np.random.default_rng(0).random((40, 1, 8, 8), np.float32)
    net = train(build(NET), CleanSet.of((images, np.arange(40) % 10)))
    save_state(tmp_path / "model.safetensors", net.state_dict())
    np.savez(tmp_path / "clean.npz", images=images, labels=np.arange(40) % 10)
    np.savez(tmp_path / "mixed up.npz", images=images, labels=np.arange(1, 41) % 10)

    def arguments(*options, out=tmp_path / "out", model=tmp_path / "model.safetensors", clean=tmp_path / "clean.npz"):
        return [*map(str, ("scan", model, "--net", NET, "--clean", clean, "--out", out, *options))]

    return arguments


@pytest.fixture
def talk(capsys):
    """Run in this process: the exit code, stdout and stderr."""

    def call(arguments):
        capsys.readouterr()
        code = run(arguments)
        return code, *capsys.readouterr()

    return call


@pytest.mark.parametrize(
    ("verdict", "code", "words"),
    [
        ("found", 1, "Backdoor found: target label 1"),
        ("not_found", 0, "No backdoor found"),
        ("inconclusive", 2, "Inconclusive; the most suspicious label is 1"),
    ],
)
def test_exit_code_follows_the_verdict(command, talk, stub, tmp_path, verdict, code, words):
    came, out, err = talk(command("--verdict", verdict, "--quiet"))
    assert (came, err) == (code, "")
    assert out.startswith(f"{words}\nThe model is right on ")
    assert all(str(tmp_path / "out" / name) in out for name in FILES)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert json.loads((tmp_path / "out" / SARIF).read_text())["runs"][0]["properties"]["verdict"] == verdict


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        ("found", "Inconclusive; the most suspicious label is 1"),
        ("not_found", "The scan for a backdoor was inconclusive"),
    ],
)
def test_a_model_that_is_wrong_on_its_clean_images_is_told(command, talk, stub, tmp_path, verdict, words):
    code, out, err = talk(command("--verdict", verdict, clean=tmp_path / "mixed up.npz"))
    assert code == 2
    assert out.startswith(f"{words}\nThe model is right on 0 of 40 clean images")
    assert "--mean and --std" in err
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    assert (record["diagnosis"]["verdict"], record["diagnosis"]["accuracy"]["count"]) == ("inconclusive", 0)
    properties = json.loads((tmp_path / "out" / SARIF).read_text())["runs"][0]["properties"]
    assert properties["accuracy"] == record["diagnosis"]["accuracy"]
    assert "The model is right on 0 of 40 clean images" in (tmp_path / "out" / REPORT).read_text()


@pytest.mark.usefixtures("short_searches")
@pytest.mark.parametrize("method", SCANNERS)
def test_record_tells_all_about_the_scan(command, talk, tmp_path, method):
    arguments = command("--method", method, *QUICK[method], "--seed", "3", "--samples-per-class", "2", "--quiet")
    code, _, err = talk(arguments)
    assert err == ""
    record = ScanRecord.load(tmp_path / "out" / RECORD)
    assert code == {"not_found": 0, "found": 1, "inconclusive": 2}[record.diagnosis.verdict]
    model = tmp_path / "model.safetensors"
    assert (record.method.name, record.seed) == (method, 3)
    assert list(record.method.fields) == [field.name for field in fields(SCANNERS[method])]
    assert (record.model.path, record.model.net, record.model.classes) == (str(model), NET, 10)
    assert record.model.sha256 == sha256(model.read_bytes())
    assert record.model.state_sha256 == state_sha256(Checkpoint.read(model).tensors)
    assert (record.clean.path, record.clean.per_class) == (str(tmp_path / "clean.npz"), [2] * 10)
    assert shlex.split(record.command) == ["untrojan", *arguments]
    assert record.diagnosis.runs or record.diagnosis.patches
    page = (tmp_path / "out" / REPORT).read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "scan report" in page


def test_printed_json_and_sarif_are_the_files(command, talk, stub, tmp_path):
    for option, name in (("--json", RECORD), ("--sarif", SARIF)):
        code, out, err = talk(command(option, "--force", "--quiet"))
        assert (code, err) == (1, "")
        assert out == (tmp_path / "out" / name).read_text()
    jsonschema.Draft4Validator(SCHEMA).validate(json.loads(out))


@pytest.mark.parametrize("method", SCANNERS)
def test_help_lists_every_option_of_the_method_with_its_default(talk, method):
    code, out, err = talk(["scan", "--method", method, "--help"])
    assert (code, err) == (0, "")
    shared, own = out.split(f"Options of {method}:")
    assert "--sarif" in shared
    assert all(name in shared for name in SCANNERS)
    for field in fields(SCANNERS[method]):
        assert f"--{field.name.replace('_', '-')} " in own
        assert f"[default: {field.default}]" in " ".join(own.split())


@pytest.mark.parametrize(
    ("options", "code", "fragment"),
    [
        (("--method", "rnp"), 4, "no method is named 'rnp'; expected one of neural-cleanse, triggers, unlearning"),
        (("--mask-epochs", "3"), 4, "--mask-epochs"),
        (("--floor", "2"), 4, "floor"),
        (("--json", "--sarif"), 4, "got both"),
        (("--net", "digits-cnn:classes=7"), 3, "the file has 10 classes"),
        (("--clean", "missing.npz"), 3, "missing.npz"),
        (("missing.pt",), 4, "unexpected extra argument"),
    ],
)
def test_bad_input_is_told_and_writes_nothing(command, talk, tmp_path, options, code, fragment):
    came, out, err = talk(command(*options))
    assert (came, out) == (code, "")
    assert fragment in err
    assert err.startswith("untrojan: ")
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_refused_without_force(command, talk, stub, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    code, _, err = talk(command())
    assert (code, os.listdir(tmp_path / "out")) == (4, ["notes.txt"])  # noqa: PTH208
    assert "--force" in err
    assert talk(command("--force"))[0] == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES | {"notes.txt"}


def test_interrupted_scan_leaves_nothing(command, talk, stub, tmp_path):
    before = sorted(tmp_path.iterdir())
    assert talk(command("--verdict", "interrupted"))[0] == 130
    assert sorted(tmp_path.iterdir()) == before


def test_scan_is_listed(talk):
    assert "scan " in talk(["--help"])[1]
