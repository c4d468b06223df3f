"""`untrojan screen` end to end, and its page."""

import base64
import io
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny import backdoored

import untrojan.scanners.samples
from untrojan.cli import run
from untrojan.cli.screen import _summary
from untrojan.record import Diagnosis, Rate, Target, Trigger
from untrojan.registry import discover
from untrojan.report.screening import render
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.samples import ScreeningRecord
from untrojan.scanners.triggers import TriggerScanner
from untrojan.sources.files import save_state

pytestmark = pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")

FILES = {"scores.parquet", "report.html", "record.json"}
HOSTILE = "</b><script>document.title='owned'</script><img src=x onerror=alert(1)>&\"' \u202e"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A backdoored model, clean images, and suspects of which the last ten are poisoned."""
    folder = tmp_path_factory.mktemp("site")
    net, clean = backdoored(7)
    save_state(folder / "model.safetensors", net.state_dict())
    images, labels = clean.floats().numpy(), clean.labels.numpy()
    np.savez(folder / "clean.npz", images=images[:200], labels=labels[:200])
    poisoned = images[200:].copy()
    poisoned[-10:, :, 6:, 6:] = 1
    given = np.concatenate([labels[200:-10], np.full(10, 7)])
    np.savez(folder / "suspects.npz", images=poisoned, labels=given)
    np.savez(folder / "other.npz", images=poisoned[:, :, :4], labels=given)
    return folder


@pytest.fixture
def call(site, tmp_path, capsys):
    """Run a screening in this process: the exit code, stdout and stderr."""

    def screen(*options, suspects="suspects.npz", net="digits-cnn"):
        arguments = ["screen", site / "model.safetensors", "--net", net, "--clean", site / "clean.npz"]
        arguments += ["--suspects", site / suspects, "--out", tmp_path / "out", *options]
        capsys.readouterr()
        return run([*map(str, arguments)]), *capsys.readouterr()

    return screen


@pytest.fixture
def verdict(monkeypatch):
    """Let the scan find what it is told to."""

    def tell(word):
        targets = [Target(label=7, score=0.9), Target(label=1, score=0.1)]
        found = Diagnosis(verdict=word, rule="as told", targets=targets, runs=[])
        monkeypatch.setattr(TriggerScanner, "scan", lambda *_: found)

    return tell


@pytest.mark.usefixtures("short_searches")
def test_a_screening(call, verdict, tmp_path):
    code, out, _ = call("--seed", 1, "--shown", 12)
    record = ScreeningRecord.load(tmp_path / "out" / "record.json")
    assert code == {"found": 1, "inconclusive": 2}[record.diagnosis.verdict]
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert "ranked 100 samples by unlearned; of the 12 most suspicious" in out
    assert shlex.split(record.command)[:2] == ["untrojan", "screen"]
    assert (record.model.net, record.seed, len(record.top)) == ("digits-cnn", 1, 12)
    table = pq.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    assert list(table) == ["index", "label", "predicted", "unlearned", "rank"]
    assert np.mean(table["rank"][-10:]) < 20

    verdict(record.diagnosis.verdict)
    again = call("--seed", 1, "--shown", 12, "--force")
    assert again[0] == code
    assert pq.read_table(tmp_path / "out" / "scores.parquet").to_pydict() == table


@pytest.mark.parametrize(("word", "code"), [("not_found", 0), ("found", 1), ("inconclusive", 2)])
def test_the_exit_code_is_that_of_the_scan(call, verdict, word, code, tmp_path):
    verdict(word)
    got, out, _ = call("--detector", "strip:blends=2", "--detector", "spectral-signatures", "--json", "--quiet")
    assert got == code
    record = ScreeningRecord.model_validate_json(out)
    assert record == ScreeningRecord.load(tmp_path / "out" / "record.json")
    assert record.method.fields["blends"] == 2
    assert [other.name for other in record.others] == ["spectral-signatures"]
    assert json.loads(out)["kind"] == "screening"


@pytest.mark.parametrize(
    ("options", "given", "code", "text"),
    [
        (["--detector", "strap"], {}, 4, "no detector is named 'strap'; expected one of activation-clustering"),
        (["--detector", "strip:blends=0"], {}, 4, "`blends`"),
        (["--detector", "strip", "--detector", "strip"], {}, 4, "each once, got strip, strip"),
        (["--shown", "0"], {}, 4, "--shown"),
        ([], {"suspects": "no.npz"}, 3, "no such file"),
        ([], {"suspects": "other.npz"}, 3, "size of the clean images, 1x8x8, got 1x4x8"),
    ],
    ids=["detector", "field", "twice", "shown", "missing", "size"],
)
def test_bad_input(call, options, given, code, text, tmp_path):
    got, out, err = call(*options, **given)
    assert (got, out) == (code, "")
    assert text in err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_help_names_every_detector(capsys):
    assert run(["screen", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.replace("-\n", "-").split()).replace("- ", "-")
    assert f"Detectors are {', '.join(discover('untrojan.scanners.detectors', Detector))}." in told


def test_an_earlier_screening_stays(call, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, _, err = call()
    assert (code, [path.name for path in (tmp_path / "out").iterdir()]) == (4, ["mine"])
    assert "is not empty" in err


def test_nothing_is_left_of_a_screening_that_fails(call, verdict, monkeypatch, tmp_path):
    verdict("found")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(untrojan.scanners.samples, "write_atomic", full)
    code, _, err = call("--detector", "spectral-signatures")
    assert (code, list(tmp_path.iterdir())) == (5, [])
    assert "No space left" in err


# The page


@pytest.fixture
def page(call, verdict, tmp_path):
    verdict("found")
    call("--detector", "spectral-signatures", "--shown", 5)
    return (tmp_path / "out" / "report.html").read_text(), ScreeningRecord.load(tmp_path / "out" / "record.json")


def test_the_page_shows_the_images(page, site):
    text, record = page
    held = np.load(site / "suspects.npz")["images"]
    shown = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="sample (\d+)"', text)
    assert [int(index) for _, index in shown] == [sample.index for sample in record.top]
    for picture, index in shown:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        assert np.array_equal(pixels, (held[int(index), 0] * 255).round())
    assert "Backdoor found in the model" in text
    assert "Scan of the model:</b> Backdoor found: target label 7." in text
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert "<script" not in text
    assert "http" not in re.sub(r"base64,[^\"]+", "", text).replace("http-equiv", "")


def test_the_page_counts_the_labels_of_what_it_shows(page):
    _, record = page
    top = [record.top[0].model_copy(update={"label": label}) for label in (3, 7, 7)]
    text = render(record.model_copy(update={"top": top}), torch.zeros(3, 1, 8, 8))
    assert "Of the samples below, <b>2</b> have label 7, <b>1</b> has label 3." in text


@pytest.mark.parametrize(
    ("labels", "words"),
    [([7, 1], "Backdoor found: target labels 7, 1"), ([None], "Backdoor found, with a target for every class")],
)
def test_summary_and_page_name_every_target(page, labels, words):
    _, record = page
    triggers = [
        Trigger(label=label, kind="patch", what="", success=Rate.of(9, 10), picture="", examples="") for label in labels
    ]
    found = record.diagnosis.model_copy(update={"triggers": triggers})
    record = record.model_copy(update={"diagnosis": found})
    assert words in render(record, torch.zeros(5, 1, 8, 8))
    assert _summary(record, Path("out")).startswith(f"scan of the model: {words}")


def test_names_cannot_break_the_page(page):
    _, record = page
    names = [HOSTILE] * 10
    hostile = record.model_copy(
        update={
            "suspects": record.suspects.model_copy(update={"class_names": names, "path": HOSTILE}),
            "command": HOSTILE,
            "warnings": [HOSTILE],
        }
    )
    text = render(hostile, torch.zeros(5, 1, 8, 8))
    assert text.count("&lt;script&gt;") > 5
    assert "<script" not in text
    assert "onerror=alert(1)>" not in text
    assert "\u202e" not in text
    assert "<h3>Command</h3>" in text


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_any_images_are_shown(page, channels, kind):
    _, record = page
    images = torch.full((5, channels, 4, 6), 1).to(kind) * (255 if kind == torch.uint8 else 1)
    pictures = re.findall(r"base64,([^\"]+)", render(record, images))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[0]))))
    assert shown.shape == ((4, 6, 3) if channels == 3 else (4, 6))
    assert (shown == 255).all()
