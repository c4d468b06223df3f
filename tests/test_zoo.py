"""The zoo: what its file may hold, what is trained, kept, resumed and refused, and what opening a model checks."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import digits

from untrojan.cli import run
from untrojan.data import CleanSet
from untrojan.errors import ConfigError, ModelError, RecordError
from untrojan.lab import zoo as module
from untrojan.lab.evaluate import evaluate
from untrojan.lab.recipe import ATTACK, MODEL, VictimRecord
from untrojan.lab.zoo import MANIFEST, Manifest, Zoo, fill, load, manifest
from untrojan.sources.files import Checkpoint, save_state
from untrojan.writing import RECORD

FILE = """
seeds = [0, 1]

[data.digits]
train = "{folder}/train.npz"
test = "{folder}/test.npz"
nets.cnn = "digits-cnn"
attacks = ["square", "lira"]
recipe = {{ epochs = 2, batch_size = 64, lr = 0.05 }}

[attacks.square]
attack = "badnets:size=2"
target = 7

[attacks.lira]
attack = "lira:eps=0.1,lr=0.01"
target = 7
rate = 0.5
"""
NAMES = [f"digits/cnn/{attack}/{seed}" for seed in (0, 1) for attack in ("clean", "square", "lira")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("zoo")
    images, labels = digits().images, digits().labels
    np.savez(made / "train.npz", images=images[:400], labels=labels[:400])
    np.savez(made / "test.npz", images=images[400:600], labels=labels[400:600])
    (made / "zoo.toml").write_text(FILE.format(folder=made))
    return made


@pytest.fixture(scope="module")
def filled(folder):
    """A zoo that is there; no test may change it."""
    assert [outcome.error for outcome in fill(Zoo.load(folder / "zoo.toml"), folder / "filled")] == [""] * 6
    return folder / "filled"


@pytest.fixture
def small(folder, tmp_path):
    """The command for a zoo of one data set, one seed and one attack, in a folder of its own."""

    def command(**replaced):
        text = FILE.format(folder=folder).replace("[0, 1]", "[0]").replace('"square", "lira"', '"square"')
        for old, new in replaced.values():
            assert old in text
            text = text.replace(old, new)
        (tmp_path / "zoo.toml").write_text(text)
        return ["lab", "zoo", str(tmp_path / "zoo.toml"), "--out", str(tmp_path / "zoo"), "--quiet"]

    return command


def zoo_of(text, folder):
    (folder / "zoo.toml").write_text(text)
    return Zoo.load(folder / "zoo.toml")


def test_it_lists_data_by_net_by_attack_by_seed_with_clean_models(folder):
    members = Zoo.load(folder / "zoo.toml").members()
    assert [member.name for member in members] == NAMES
    assert [member.seed for member in members] == [0, 0, 0, 1, 1, 1]
    assert [member.attack and member.attack.name for member in members[:3]] == [None, "badnets", "lira"]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seeds", "seed", "`seed` is not a field"),
        ("[0, 1]", "[-1]", "`seeds.0`: input should be greater than or equal to 0"),
        ("epochs = 2", "epochs = 0", "`data.digits.recipe.epochs`"),
        ("rate = 0.5", "rate = 2", "`attacks.lira.rate`"),
        ("nets.cnn", 'nets."../cnn"', "`data.digits.nets.../cnn"),
        ("target = 7", 'target = "seven"', "`attacks.square.target"),
        ("badnets:size=2", "badnet", "no attack is named 'badnet'"),
        ("badnets:size=2", "badnets:size=0", "size"),
        ('"square", "lira"', '"circle"', "data.digits: no attack is named 'circle'"),
        ('"square", "lira"', '"square", "square"', "digits/cnn/square/0 twice"),
        ("attacks.square", "attacks.clean", "attacks.clean: this is what the models without an attack are called"),
        ("seeds =", "seeds", "expected TOML"),
    ],
)
def test_a_file_that_is_no_zoo_is_refused(folder, tmp_path, old, new, told):
    with pytest.raises(ConfigError) as caught:
        zoo_of(FILE.format(folder=folder).replace(old, new), tmp_path).members()
    assert told in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(ConfigError, match=r"cannot read nowhere\.toml: No such file"):
        Zoo.load("nowhere.toml")


def test_every_model_has_a_folder_and_an_entry(filled):
    assert sorted(NAMES) == sorted(path.parent.relative_to(filled).as_posix() for path in filled.rglob(RECORD))
    told = Manifest.load(filled / MANIFEST)
    assert told == manifest(filled)
    assert list(told.victims) == sorted(NAMES)
    for name, entry in told.victims.items():
        record = VictimRecord.load(filled / name / RECORD)
        assert (entry.status, entry.recipe, entry.net) == (record.status, record.recipe, "digits-cnn")
        assert entry.acc == record.scores.acc.value
        assert entry.asr == (record.scores.asr.value if record.scores.asr else None)
        assert entry.recipe["seed"] == int(name[-1])
        assert (entry.attack_sha256 is not None) == ("lira" in name) == (filled / name / ATTACK).exists()
    assert told.victims["digits/cnn/clean/0"].state_sha256 != told.victims["digits/cnn/clean/1"].state_sha256
    assert told.victims["digits/cnn/lira/0"].recipe["rate"] == 0.5


@pytest.mark.parametrize("attack", ["clean", "square", "lira"])
def test_a_model_that_is_opened_scores_as_its_record_says(filled, folder, attack):
    victim = load(f"digits/cnn/{attack}/0", filled)
    assert not victim.model.training
    test = CleanSet.load(folder / "test.npz")
    scores = evaluate(victim.model, test, victim.attack, victim.record.recipe["target"])
    assert (scores.acc, scores.asr) == (victim.record.scores.acc, victim.record.scores.asr)


def copied(filled, tmp_path):
    return Path(shutil.copytree(filled, tmp_path / "copied"))


def rewritten(filled, tmp_path, name, old, new):
    """A copy whose manifest and whose record of one model hold a text in place of another."""
    root = copied(filled, tmp_path)
    record = root / name / RECORD
    record.write_text(record.read_text().replace(old, new))
    (root / MANIFEST).write_text(manifest(root).to_json())
    return root


def test_what_differs_from_the_manifest_is_not_opened(filled, tmp_path):
    root = copied(filled, tmp_path)
    name, other = NAMES[1], NAMES[4]
    (root / name).rename(root / "aside")
    (root / other).rename(root / name)
    with pytest.raises(RecordError, match=r"is not what .*manifest.json tells of: .*state_sha256"):
        load(name, root)
    (root / name / RECORD).unlink()
    with pytest.raises(RecordError, match="cannot read record"):
        load(name, root)
    with pytest.raises(ConfigError, match="the zoo has no digits/cnn/circle/0; it has digits/cnn/clean/0, "):
        load("digits/cnn/circle/0", root)
    with pytest.raises(RecordError, match="cannot read record"):
        load(name, tmp_path / "nowhere")


@pytest.mark.parametrize("file", [MODEL, ATTACK])
def test_a_weight_that_was_changed_is_noticed(filled, tmp_path, file):
    root = copied(filled, tmp_path)
    path = root / NAMES[2] / file
    tensors = Checkpoint.read(path).tensors
    first = next(iter(tensors))
    save_state(path, tensors | {first: tensors[first] + 1})
    with pytest.raises(RecordError, match=f"{file} is not what its record tells of"):
        load(NAMES[2], root)
    assert NAMES[2] not in manifest(root).victims
    path.write_bytes(b"broken")
    with pytest.raises(ModelError):
        load(NAMES[2], root)
    path.unlink()
    with pytest.raises(ModelError):
        load(NAMES[2], root)


def test_a_manifest_cannot_choose_what_code_runs(filled, tmp_path):
    root = rewritten(filled, tmp_path, NAMES[0], '"net": "digits-cnn"', '"net": "os:getcwd"')
    with pytest.raises(ConfigError, match="somebody's own code, 'os:getcwd'"):
        load(NAMES[0], root)
    assert load(NAMES[0], root, net="digits-cnn").record.net == "os:getcwd"


def test_what_is_there_is_kept_and_told(small, tmp_path, capsys):
    assert run(small()) == 0
    first, _ = capsys.readouterr()
    assert first.splitlines()[0].startswith("digits/cnn/clean/0: trained, ACC ")
    assert first.splitlines()[-1] == f"wrote {tmp_path / 'zoo' / MANIFEST}"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "zoo").rglob("*.*") if path.name != MANIFEST}
    told = (tmp_path / "zoo" / MANIFEST).read_bytes()
    assert run(small()) == 0
    again, err = capsys.readouterr()
    assert (again.count(", was there\n"), err) == (2, "")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert (tmp_path / "zoo" / MANIFEST).read_bytes() == told


def test_what_is_there_but_not_asked_for_is_told_and_left_alone(small, tmp_path, capsys):
    assert run(small()) == 0
    told = (tmp_path / "zoo" / MANIFEST).read_bytes()
    capsys.readouterr()
    assert run(small(rate=("size=2", "size=3"), epochs=("lr = 0.05", "lr = 0.04"))) == 2
    out, _ = capsys.readouterr()
    assert "clean/0: failed: " in out
    assert "holds another model than the zoo asks for (lr); remove it" in out
    assert "asks for (attack, lr)" in out
    assert out.endswith("manifest.json; 2 failed\n")
    assert (tmp_path / "zoo" / MANIFEST).read_bytes() == told


@pytest.fixture
def drawn(small, tmp_path):
    """A zoo of one attack whose trigger is a file, and a way to draw that anew."""

    def draw(place):
        pixels = np.zeros((8, 8), np.uint8)
        pixels[place : place + 2, place : place + 2] = 255
        Image.fromarray(pixels).save(tmp_path / "trigger.png")

    draw(0)
    command = small(attack=("badnets:size=2", f"additive:image={tmp_path / 'trigger.png'}"))
    assert run(command) == 0
    return command, draw


SQUARE = "digits/cnn/square/0"


def test_a_trigger_that_was_drawn_anew_is_another_one(drawn, tmp_path, capsys):
    command, draw = drawn
    draw(5)
    assert run(command) == 2
    assert f"{SQUARE} holds another model than the zoo asks for (attack)" in capsys.readouterr().out
    with pytest.raises(RecordError, match=r"not known to be trained with what is in .*trigger\.png now"):
        load(SQUARE, tmp_path / "zoo")
    draw(0)
    assert load(SQUARE, tmp_path / "zoo").record.status


def test_where_the_file_of_a_trigger_is_does_not_count(drawn, tmp_path, monkeypatch):
    command, _ = drawn
    file = Path(command[2])
    file.write_text(file.read_text().replace(str(tmp_path / "trigger.png"), "trigger.png"))
    monkeypatch.chdir(tmp_path)
    assert run(command) == 0
    shutil.rmtree(tmp_path / "zoo" / SQUARE)
    assert run(command) == 0
    monkeypatch.chdir(tmp_path / "zoo")
    assert load(SQUARE, tmp_path / "zoo").attack.image == tmp_path / "trigger.png"


def test_a_record_that_does_not_tell_what_the_trigger_was_is_read_but_not_believed(drawn, tmp_path):
    record = VictimRecord.load(tmp_path / "zoo" / SQUARE / RECORD)
    record.recipe["attack"]["fields"] = dict(record.attack_files)
    (tmp_path / "zoo" / SQUARE / RECORD).write_text(record.model_copy(update={"attack_files": {}}).to_json())
    (tmp_path / "zoo" / MANIFEST).write_text(manifest(tmp_path / "zoo").to_json())
    assert SQUARE in Manifest.load(tmp_path / "zoo" / MANIFEST).victims
    with pytest.raises(RecordError, match="not known to be trained with"):
        load(SQUARE, tmp_path / "zoo")


def test_an_attack_of_a_later_version_is_told_so(filled, tmp_path):
    root = rewritten(filled, tmp_path, NAMES[1], '"badnets"', '"later-attack"')
    with pytest.raises(RecordError, match="an attack that is not known here, 'later-attack'; update untrojan"):
        load(NAMES[1], root)


def test_a_model_that_fails_does_not_stop_the_others(small, tmp_path, capsys):
    command = small(nets=("nets.cnn = ", 'nets = { broken = "digits-cnn:classes=2", cnn = "digits-cnn" }\n#'))
    assert run(command) == 2
    out, _ = capsys.readouterr()
    assert [": failed: " in line for line in out.splitlines()[:4]] == [True, True, False, False]
    assert "digits/broken/square/0: failed: " in out
    assert list(Manifest.load(tmp_path / "zoo" / MANIFEST).victims) == ["digits/cnn/clean/0", "digits/cnn/square/0"]


def test_an_error_that_nobody_expected_is_told_too(folder, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(module, "make_victim", broken)
    outcomes = list(fill(Zoo.load(folder / "zoo.toml"), tmp_path / "zoo"))
    assert [str(each) for each in outcomes] == [f"{name}: failed: ArithmeticError: on purpose" for name in NAMES]
    assert Manifest.load(tmp_path / "zoo" / MANIFEST).victims == {}


def test_a_network_that_ends_the_program_fails_alone(folder, tmp_path):
    text = FILE.format(folder=folder).replace("[0, 1]", "[0]").replace('"square", "lira"', "")
    text = text.replace("nets.cnn = ", 'nets = { exits = "sys:exit", cnn = "digits-cnn:classes=2" }\n#')
    outcomes = list(fill(zoo_of(text, tmp_path), tmp_path / "zoo"))
    assert [outcome.name for outcome in outcomes] == ["digits/exits/clean/0", "digits/cnn/clean/0"]
    assert "sys:exit ended the program with sys.exit; name a callable" in outcomes[0].error
    assert "sys.exit" not in outcomes[1].error


def test_images_that_are_not_there_fail_for_every_model_of_them(small, capsys):
    assert run(small(train=("train.npz", "gone.npz"))) == 2
    assert capsys.readouterr().out.count("failed: no such file or folder: ") == 2


@pytest.mark.slow
def test_killed_and_called_again_it_ends_as_if_nothing_had_been(small, tmp_path):
    def told(root):
        victims = Manifest.load(root / MANIFEST).model_dump()["victims"]
        return {name: {**entry, "record_sha256": None} for name, entry in victims.items()}  # it holds seconds

    command = small(epochs=("epochs = 2", "epochs = 6"))
    undisturbed = [*command[:4], str(tmp_path / "undisturbed")]
    assert run([*undisturbed, "--quiet"]) == 0
    child = subprocess.Popen([sys.executable, "-m", "untrojan", *command])
    interrupted = tmp_path / "zoo/digits/cnn/square/.0.training.safetensors"
    while not interrupted.exists() and child.poll() is None:
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert interrupted.exists()
    assert run(command) == 0
    assert told(tmp_path / "zoo") == told(tmp_path / "undisturbed")
    assert not interrupted.exists()


def test_stopped_in_between_it_leaves_a_true_manifest(folder, tmp_path):
    growing = fill(Zoo.load(folder / "zoo.toml"), tmp_path / "zoo")
    assert next(growing).name == NAMES[0]
    growing.close()
    assert list(Manifest.load(tmp_path / "zoo" / MANIFEST).victims) == NAMES[:1]


def test_a_wrong_file_is_a_wrong_call(tmp_path, capsys):
    assert run(["lab", "zoo", str(tmp_path / "no.toml"), "--out", str(tmp_path / "zoo")]) == 4
    assert "cannot read" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()


def test_a_zoo_does_not_go_into_a_file(small, tmp_path, capsys):
    (tmp_path / "zoo").write_text("mine")
    assert run(small()) == 4
    assert "zoo is a file; give a folder" in capsys.readouterr().err
    assert (tmp_path / "zoo").read_text() == "mine"
