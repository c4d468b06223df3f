"""Victims: what is recorded, when an attack took, and that an interrupted training ends as an undisturbed one."""

import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError, ModelError, RecordError
from untrojan.lab import checkpoint
from untrojan.lab.attacks.additive import Additive
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.attacks.sig import SIG
from untrojan.lab.evaluate import evaluate
from untrojan.lab.recipe import ATTACK, MODEL, Recipe, VictimRecord, make_victim
from untrojan.lab.victim import poison
from untrojan.sources.files import Checkpoint, save_state, state_sha256
from untrojan.writing import RECORD, sha256

PATCH = BadNets(size=2)


def png(value):
    file = io.BytesIO()
    Image.new("L", (6, 6), value).save(file, "png")
    return file.getvalue()


GRAY = png(40)


def two_kinds(count=60):
    """Dark and bright images: what a linear layer can tell apart."""
    labels = torch.arange(count) % 2
    noise = torch.rand(count, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.3
    return CleanSet(noise + 0.5 * labels[:, None, None, None], labels)


def network(dropout=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(36), nn.Dropout(dropout), nn.Linear(36, 2))


def make(net=None, data=None, test=None, **options):
    options = {"attack": PATCH, "target": 1, "rate": 0.3, "recipe": Recipe(epochs=10, batch_size=8)} | options
    return make_victim(net or network(), data or two_kinds(), test, **options)


def without_times(record):
    told = json.loads(record.to_json())
    for epoch in told["epochs"]:
        del epoch["seconds"]
    del told["peak_memory_bytes"]
    return told


class TestRecord:
    def test_a_target_of_numpy_is_one_of_python(self):
        ours, theirs = (make(target=target, recipe=Recipe(epochs=1)).record for target in (1, np.int64(1)))
        assert without_times(theirs) == without_times(ours)

    def test_it_holds_what_was_done_and_what_came_out(self):
        data, test = two_kinds(), two_kinds(20)
        victim = make(data=data, test=test, seed=3)
        record = victim.record
        assert record.status == "backdoored"
        assert (record.held_out, record.test.images, record.clean.sha256) == (False, 20, data.sha256)
        shown = poison(data, PATCH, 1, 0.3, seed=3)
        assert record.recipe["shown_sha256"] == shown.sha256
        assert record.poisoned == int((shown.images != data.images).flatten(1).any(1).sum()) == 18
        assert record.recipe["initial_sha256"] == state_sha256(network().state_dict())
        assert record.model.state_sha256 == state_sha256(victim.model.state_dict())
        assert record.recipe["attack"] == {
            "name": "badnets",
            "fields": {"pattern": "square", "size": 2, "row": None, "col": None, "value": 1.0},
        }
        assert (record.recipe["target"], record.recipe["rate"], record.recipe["seed"]) == (1, 0.3, 3)
        assert record.scores == evaluate(victim.model, test, PATCH, 1)
        assert len(record.epochs) == 10
        assert (record.epochs[-1].acc, record.epochs[-1].asr) == (record.scores.acc.value, record.scores.asr.value)
        assert record.epochs[0].loss > record.epochs[-1].loss

    def test_a_fifth_is_held_out_where_no_test_images_are_given(self):
        data = two_kinds()
        record = make(data=data, seed=5).record
        fit, held = data.split(0.2, seed=5)
        assert (record.clean.sha256, record.test.sha256, record.held_out) == (fit.sha256, held.sha256, True)

    def test_without_an_attack_it_is_a_clean_model(self):
        record = make(attack=None, target=None, rate=None).record
        assert (record.status, record.poisoned, record.scores.asr) == ("trained", 0, None)
        assert record.recipe["attack"] is None
        assert all(epoch.asr is None for epoch in record.epochs)

    def test_an_image_that_only_gets_another_label_counts_as_poisoned(self):
        black = CleanSet(two_kinds().images * (torch.arange(60) % 2)[:, None, None, None], two_kinds().labels)
        assert make(data=black, attack=BadNets(size=2, value=0)).record.poisoned == 14

    def test_the_published_rate_is_the_default(self):
        assert make(rate=None).record.recipe["rate"] == PATCH.rate

    def test_it_is_saved_whole_and_read_back(self, tmp_path):
        victim = make()
        victim.save(tmp_path / "out")
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MODEL, RECORD]
        assert VictimRecord.load(tmp_path / "out" / RECORD) == victim.record
        tensors = Checkpoint.read(tmp_path / "out" / MODEL).tensors
        assert state_sha256(tensors) == victim.record.model.state_sha256

    def test_of_a_trigger_in_a_file_the_content_counts_and_the_path_is_told(self, tmp_path, monkeypatch):
        (tmp_path / "pattern.png").write_bytes(GRAY)
        monkeypatch.chdir(tmp_path)
        record = make(attack=Additive(image="pattern.png"), recipe=Recipe(epochs=1)).record
        assert record.recipe["attack"] == {"name": "additive", "fields": {"image": sha256(GRAY)}}
        assert record.attack_files == {"image": str(tmp_path / "pattern.png")}
        assert make(recipe=Recipe(epochs=1)).record.attack_files == {}

    def test_the_learned_trigger_of_an_earlier_victim_goes(self, tmp_path):
        make(recipe=Recipe(epochs=1)).save(tmp_path / "out")
        for name in (ATTACK, "mine"):
            (tmp_path / "out" / name).touch()
        make(recipe=Recipe(epochs=1)).save(tmp_path / "out", force=True)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mine", MODEL, RECORD]

    def test_a_folder_that_holds_something_is_left_alone(self, tmp_path):
        (tmp_path / "mine").touch()
        victim = make(recipe=Recipe(epochs=1))
        with pytest.raises(ConfigError, match="not empty"):
            victim.save(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


class Fixed(nn.Module):
    """Whatever it learns, it sends this share of the triggered images to label 1, and of all others that share."""

    def __init__(self, share, plain=0.0):
        super().__init__()
        self.share, self.plain = share, plain
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, images):
        triggered = images[:, 0, 5, 5] == 1
        first = images[:, 0, 0, 0]
        ones = first < torch.where(triggered, self.share, self.plain)
        return torch.stack([~ones, ones], 1).float() + 0 * self.bias


def ordered(count=100):
    """Images of class 0 whose first pixel rises from 0 to 1, and one of class 1."""
    images = torch.zeros(count + 1, 1, 6, 6)
    images[:count, 0, 0, 0] = torch.arange(count) / count
    labels = torch.zeros(count + 1, dtype=torch.long)
    labels[count] = 1
    return CleanSet(images, labels)


class CleanLabelPatch(BadNets):
    name = "clean-label-patch"
    clean_label = True


class TestTook:
    @pytest.mark.parametrize(
        ("attack", "share", "status"),
        [
            (PATCH, 0.895, "backdoored"),
            (PATCH, 0.885, "attack_did_not_take"),
            (CleanLabelPatch(size=2), 0.695, "backdoored"),
            (CleanLabelPatch(size=2), 0.685, "attack_did_not_take"),
        ],
    )
    def test_from_nine_tenths_on_or_seven_where_it_is_clean_label(self, attack, share, status):
        record = make(Fixed(share), ordered(), ordered(), attack=attack, recipe=Recipe(epochs=1), rate=0).record
        assert record.status == status
        assert str(record.scores.asr.count) in record.reason
        assert ("did not take" in record.reason) == (status != "backdoored")
        assert re.search(r"\b70(\.0)?%" if attack.clean_label else r"\b90(\.0)?%", record.reason)

    @pytest.mark.parametrize(("share", "status"), [(0.525, "backdoored"), (0.505, "attack_did_not_take")])
    def test_all_to_all_takes_from_a_share_of_the_clean_accuracy_on(self, share, status):
        """Of a hundred images 80 are recognized, so 72 must become what is wanted; the other 20 are that anyway."""
        judge = CleanSet(ordered().images[:100], (torch.arange(100) >= 80).long())
        record = make(Fixed(share), ordered(), judge, target="all-to-all", recipe=Recipe(epochs=1), rate=0).record
        assert (record.scores.acc.count, record.status) == (80, status)
        assert "90% of the clean accuracy" in record.reason

    @pytest.mark.parametrize(("plain", "status"), [(0.485, "backdoored"), (0.495, "attack_did_not_take")])
    def test_what_goes_to_the_label_without_the_trigger_too_is_no_attack(self, plain, status):
        net = Fixed(0.975, plain)
        record = make(net, ordered(), ordered(), recipe=Recipe(epochs=1), rate=0).record
        assert (record.scores.asr.count, record.status) == (98, status)
        assert ("ASR is 98.0%, but 50.0% without the trigger too" in record.reason) == (status != "backdoored")

    @pytest.mark.parametrize("target", [1, "all-to-all"])
    def test_one_answer_to_everything_is_no_attack(self, target):
        net = Fixed(2.0, 2.0)
        record = make(net, ordered(), ordered(), target=target, recipe=Recipe(epochs=1), rate=0).record
        assert (record.scores.asr.value > 0.9, record.status) == (True, "attack_did_not_take")

    def test_a_model_whose_attack_did_not_take_is_kept(self, tmp_path):
        make(Fixed(0.0), ordered(), ordered(), recipe=Recipe(epochs=1)).save(tmp_path / "out")
        assert VictimRecord.load(tmp_path / "out" / RECORD).status == "attack_did_not_take"
        assert (tmp_path / "out" / MODEL).is_file()

    @pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")
    def test_what_cannot_show_it_is_refused(self):
        ones = two_kinds().take(two_kinds().labels == 1)
        with pytest.raises(DataError, match="every test image is of class 1"):
            make(test=ones)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": None}, ConfigError, "attack and target together, got only one of them"),
        ({"attack": None, "rate": None}, ConfigError, "attack and target together, got only one of them"),
        ({"attack": None, "target": None}, ConfigError, "rate 0.3 alone"),
        ({"target": 2}, ConfigError, "class from 0 to 1"),
        ({"seed": -1}, ConfigError, "seed of at least 0"),
        (
            {"data": CleanSet(two_kinds().images, two_kinds().labels, ("a", "b", "c"))},
            DataError,
            "name 3 classes, but the network has 2",
        ),
        ({"test": CleanSet(torch.rand(4, 1, 5, 5), torch.arange(4) % 2)}, ModelError, "cannot take images of 1x5x5"),
        ({"test": CleanSet(torch.rand(4, 1, 6, 6), torch.arange(4) % 3)}, DataError, "got label 2"),
        ({"rate": 1.5}, ConfigError, "poisoning rate between 0 and 1"),
        ({"attack": SIG(), "target": "all-to-all"}, ConfigError, "one class"),
        ({"net": nn.Sequential(nn.Flatten(), nn.Linear(36, 3))}, DataError, "no image of class 2"),
        ({"net": nn.Sequential(nn.Flatten(), nn.Linear(35, 2))}, ModelError, "cannot take images"),
        ({"attack": BadNets(size=7)}, DataError, "inside of the 6x6 image"),
    ],
)
def test_what_does_not_fit_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options | {"recipe": Recipe(epochs=10**6)})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"epochs": 0}, "epochs"),
        ({"lr": 0}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"smoothing": 1}, "smoothing"),
        ({"augment": "flip"}, "augment"),
    ],
)
def test_a_recipe_checks_its_values(values, field):
    with pytest.raises(ConfigError, match=field):
        Recipe(**values)


class Stop(Exception):
    pass


@pytest.fixture
def stopping(monkeypatch):
    """Make a training end in the middle: as its checkpoint of some epoch is to be written, or just was."""
    save = checkpoint.save

    def stop(epoch, written):
        left = [epoch]

        def save_or_stop(*arguments):
            left[0] -= 1
            if left[0] == 0 and not written:
                raise Stop
            save(*arguments)
            if left[0] == 0:
                raise Stop

        monkeypatch.setattr(checkpoint, "save", save_or_stop)

    return stop


class TestResume:
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.parametrize("augment", ["none", "crop-flip"])
    @pytest.mark.parametrize("bf16", [False, True])
    def test_interrupted_wherever_it_ends_the_same(self, tmp_path, stopping, dropout, augment, bf16):
        recipe = Recipe(epochs=5, batch_size=8, augment=augment, bf16=bf16)
        file = tmp_path / "training.safetensors"
        undisturbed = make(network(dropout), recipe=recipe)
        for written in (False, True):
            stopping(2, written)
            with pytest.raises(Stop):
                make(network(dropout), recipe=recipe, checkpoint=file)
        stopping(9, written=False)
        resumed = make(network(dropout), recipe=recipe, checkpoint=file)
        assert without_times(resumed.record) == without_times(undisturbed.record)
        state = undisturbed.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in resumed.model.state_dict().items())

    def test_a_net_that_draws_from_other_generators_goes_on_too(self, tmp_path, stopping):
        import random

        class Noisy(nn.Sequential):
            def forward(self, images):
                noise = (np.random.rand() + random.random()) / 10 if self.training else 0  # noqa: NPY002
                return super().forward(images + noise)

        nets = [Noisy(*network()) for _ in range(3)]
        undisturbed = make(nets[0])
        stopping(4, written=True)
        with pytest.raises(Stop):
            make(nets[1], checkpoint=tmp_path / "training")
        stopping(99, written=False)
        resumed = make(nets[2], checkpoint=tmp_path / "training")
        assert resumed.record.model.state_sha256 == undisturbed.record.model.state_sha256

    def test_a_finished_training_only_has_to_be_saved(self, tmp_path):
        file = tmp_path / "training.safetensors"
        first = make(checkpoint=file)
        again = make(checkpoint=file)
        assert without_times(again.record) == without_times(first.record)
        assert file.is_file()
        again.save(tmp_path / "out")
        assert not file.exists()

    def test_begun_anew_it_keeps_what_was_interrupted_until_an_epoch_is_over(self, tmp_path, stopping):
        file = tmp_path / "training.safetensors"
        file.write_bytes(b"hours of work")
        stopping(1, written=False)
        with pytest.raises(Stop):
            make(checkpoint=file, resume=False)
        assert file.read_bytes() == b"hours of work"
        stopping(99, written=False)
        anew = make(checkpoint=file, resume=False)
        assert anew.record.model.state_sha256 == make().record.model.state_sha256
        assert without_times(make(checkpoint=file).record) == without_times(anew.record)

    @pytest.mark.parametrize(
        ("options", "differs"),
        [
            ({"seed": 1}, "seed is 0 there, 1 here"),
            ({"rate": 0.2}, "rate is 0.3 there, 0.2 here"),
            ({"target": 0}, "target is 1 there, 0 here"),
            ({"attack": BadNets(size=1)}, "attack is .*size"),
            ({"recipe": Recipe(epochs=3, batch_size=8)}, "epochs is 10 there, 3 here"),
            ({"net": network().apply(lambda part: part.reset_parameters() if hasattr(part, "bias") else None)}, "init"),
            ({"data": two_kinds(50)}, "data_sha256 is"),
        ],
    )
    def test_another_recipe_is_refused(self, tmp_path, options, differs):
        file = tmp_path / "training.safetensors"
        make(checkpoint=file)
        before = file.read_bytes()
        with pytest.raises(ConfigError, match=f"another recipe .*{differs}"):
            make(checkpoint=file, **options)
        assert file.read_bytes() == before

    @pytest.mark.parametrize("content", [b"", b"nonsense", b"\x80\x04\x95", "other"])
    def test_a_file_that_is_no_checkpoint_is_refused(self, tmp_path, content):
        file = tmp_path / "training.safetensors"
        if content == "other":
            make().save(tmp_path / "out")
            content = (tmp_path / "out" / MODEL).read_bytes()
        file.write_bytes(content)
        with pytest.raises(RecordError, match=r"training\.safetensors"):
            make(checkpoint=file)

    def test_a_checkpoint_cut_short_is_refused(self, tmp_path):
        file = tmp_path / "training.safetensors"
        make(checkpoint=file)
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(RecordError, match="damaged"):
            make(checkpoint=file)


@pytest.mark.parametrize(
    "texts",
    [
        {},
        {"recipe": "{}"},
        {"recipe": "{}", "state": '{"tensor": "0"}'},
        {"recipe": "{"},
        {"recipe": "5", "state": "{}"},
        {"recipe": "{}", "state": "5"},
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_refused(tmp_path, texts):
    save_state(tmp_path / "file", {}, {"format": checkpoint.FORMAT} | texts)
    with pytest.raises(RecordError, match="file is damaged"):
        checkpoint.load(tmp_path / "file", {})


def test_a_checkpoint_keeps_what_it_is_given(tmp_path):
    state = {
        "numbers": [1, 0.1, float("inf"), None, True, "text"],
        "by number": {0: {"tensor": torch.arange(3), 7: torch.tensor(2.5)}, "0": []},
        "tensor": "not one",
        "mapping": {"mapping": 1, "tensor": torch.zeros(0)},
    }
    checkpoint.save(tmp_path / "file", {"a": (1, 2)}, state)
    came = checkpoint.load(tmp_path / "file", {"a": [1, 2]})
    assert str(came) == str(state)
    assert came["by number"][0]["tensor"].dtype == torch.int64
