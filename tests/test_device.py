"""Where a run happens. What needs a GPU skips where there is none."""

import copy
import subprocess
import sys

import pytest
import torch
from test_online import ONLINE, named, network, stripes
from tiny import DEFENSES, GIVEN, QUICK, Snapshot, backdoored, build, make_clean
from torch import nn

from untrojan.cli import run
from untrojan.data import CleanSet
from untrojan.device import chosen, device_of, flushes, new_generator, running_on
from untrojan.errors import ConfigError
from untrojan.lab import checkpoint
from untrojan.lab.attack import Attack
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.evaluate import evaluate
from untrojan.lab.recipe import Recipe, make_victim
from untrojan.model import correct
from untrojan.record import Diagnosis
from untrojan.registry import discover
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.samples import screen
from untrojan.scanners.scanner import Scanner
from untrojan.sources.files import Checkpoint
from untrojan.sources.undo import restore
from untrojan.speed import faster

pytestmark = pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning")

GPU = torch.device("cuda", 0)
SCANNERS = discover("untrojan.scanners", Scanner)
DETECTORS = discover("untrojan.scanners.detectors", Detector)
TRIGGERS = {
    name: cls
    for name, cls in discover("untrojan.lab.attacks", Attack).items()
    if name not in ("additive", "masked", "input-aware", "lira", "ssba")
}
SHORT = {
    "triggers": {"runs": 2, "search_steps": 4, "refine_steps": 4},
    "unlearning": {"runs": 2, "unlearn_epochs": 2},
    "neural-cleanse": {"mask_epochs": 2},
    "unlearned": {"unlearn_epochs": 2},
    "strip": {"blends": 3},
    "cognitive-distillation": {"iterations": 2},
}


class Killed(Exception):
    pass


def there(model):
    """A copy of the network on the GPU."""
    return copy.deepcopy(model).to(GPU)


def places(model):
    return {tensor.device for tensor in model.state_dict().values()}


class TestChosen:
    def test_without_a_name_it_is_the_gpu_where_there_is_one(self):
        assert chosen() == chosen("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta"])
    def test_what_torch_cannot_use_is_refused(self, name):
        with pytest.raises(ConfigError, match=f"expected one of auto, cpu.* as device, got '{name}'$"):
            chosen(name)

    def test_capitals_do(self):
        assert chosen("CPU") == torch.device("cpu")
        assert chosen("Auto") == chosen()

    def test_the_command_line_refuses_it_too(self, tmp_path, capsys):
        call = ["lab", "train", "--net", "digits-cnn", "--data", "none.npz", "--out", str(tmp_path / "out")]
        assert run([*call, "--device", "gpu"]) == 4
        assert "got 'gpu'" in capsys.readouterr().err


class TestRunningOn:
    def test_tensors_and_generators_are_made_there(self):
        with running_on(torch.device("meta")), running_on(torch.device("cpu")):
            assert new_generator(0).device == torch.rand(2).device == torch.device("cpu")
        with running_on(torch.device("meta")):
            assert torch.as_tensor([1, 2]).device.type == "meta"
        assert torch.zeros(1).device.type == "cpu"

    def test_the_model_says_where(self):
        assert device_of(nn.BatchNorm2d(2, affine=False, device="meta")).type == "meta"
        assert device_of(nn.Linear(2, 2, device="meta")).type == "meta"


@pytest.mark.parametrize("before", [False, True])
def test_tiny_numbers_are_zero_in_a_run_and_afterwards_what_they_were(before):
    outside = flushes()
    torch.set_flush_denormal(before)
    try:
        with running_on(torch.device("cpu")):
            with pytest.raises(Killed), running_on(torch.device("cpu")):
                raise Killed
            assert flushes()
        assert flushes() == before
    finally:
        torch.set_flush_denormal(outside)


def test_tiny_numbers_are_told_in_any_default_type(float64):
    outside = flushes()
    torch.set_flush_denormal(True)
    try:
        assert flushes()
    finally:
        torch.set_flush_denormal(outside)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class TestWhateverTheCallerHasSet:
    """Results are the same where gradients are off, and where tensors are made in double precision."""

    @pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
    def test_a_run_has_gradients(self, off):
        with off():
            with running_on(torch.device("cpu")):
                weight = torch.ones(2, requires_grad=True)
                assert (2 * weight).requires_grad
                assert not weight.is_inference()
            with pytest.raises(Killed), running_on(torch.device("cpu")):
                raise Killed
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled() == (off is torch.inference_mode)
        assert torch.is_grad_enabled()

    def test_a_run_makes_float32(self, float64):
        with running_on(torch.device("cpu")):
            assert torch.zeros(1).dtype == torch.float32
        with pytest.raises(Killed), running_on(torch.device("cpu")):
            raise Killed
        assert torch.zeros(1).dtype == torch.float64

    @pytest.mark.usefixtures("no_checks")
    @pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("name", ["i-bau", "nad", "neural-cleanse"])
    def test_repairs_without_gradients(self, name, off):
        net, clean, method = build("batchnorm"), make_clean(), DEFENSES[name](**QUICK[name])
        wanted = method.repair(net, clean, GIVEN).record
        with off():
            assert method.repair(net, make_clean(), GIVEN).record.repaired == wanted.repaired

    @pytest.mark.usefixtures("no_checks")
    @pytest.mark.parametrize("name", ["npd", "nft", "neural-cleanse"])
    def test_repairs_in_float64(self, name, request):
        net, clean, method = build("batchnorm"), make_clean(), DEFENSES[name](**QUICK[name])
        wanted = method.repair(net, clean, GIVEN).record
        request.getfixturevalue("float64")
        assert method.repair(net, clean, GIVEN).record.repaired == wanted.repaired

    @pytest.mark.usefixtures("short_searches")
    @pytest.mark.parametrize("name", SCANNERS)
    def test_scans(self, name, request):
        net, clean, scanner = build("batchnorm"), make_clean(), SCANNERS[name](**SHORT[name])
        wanted = scanner.scan(net, clean)
        with torch.inference_mode():
            assert scanner.scan(net, clean) == wanted
        request.getfixturevalue("float64")
        assert scanner.scan(net, clean) == wanted

    def test_screenings(self, request):
        net, clean = build("batchnorm"), make_clean()
        detectors = [cls(**SHORT.get(name, {})) for name, cls in DETECTORS.items()]
        wanted = screen(net, clean, clean, detectors=detectors, diagnosis=GIVEN).scores
        with torch.inference_mode():
            scores = screen(net, clean, clean, detectors=detectors, diagnosis=GIVEN).scores
        request.getfixturevalue("float64")
        again = screen(net, clean, clean, detectors=detectors, diagnosis=GIVEN).scores
        for name, each in wanted.items():
            assert torch.equal(scores[name], each)
            assert torch.equal(again[name], each)


def test_the_command_line_has_tiny_numbers_zero_in_every_thread():
    code = """
import torch
from untrojan.cli import run
torch.set_num_threads(2)
run(["methods"])
assert (torch.full((4_000_000,), 2e-38) * 0.1 == 0).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_clean_images_that_are_there_are_not_copied():
    clean = make_clean()
    assert clean.to("cpu") is clean


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use")
class TestGPU:
    def test_images_and_labels_go_there_and_serve_from_there(self):
        clean = make_clean()
        moved = clean.to(GPU)
        assert moved.images.device == moved.labels.device == moved.take([0, 3]).images.device == GPU
        assert CleanSet(moved.images, clean.labels).labels.device == GPU
        assert moved.sha256 == clean.sha256
        assert [len(part) for part in moved.split(0.25, 0)] == [24, 8]
        images, labels = next(moved.batches(5, torch.Generator().manual_seed(1)))
        expected, its = next(clean.batches(5, torch.Generator().manual_seed(1)))
        assert torch.equal(images.cpu(), expected)
        assert torch.equal(labels.cpu(), its)

    @pytest.mark.usefixtures("short_searches")
    @pytest.mark.parametrize("net", ["batchnorm", "vit"])
    @pytest.mark.parametrize("name", DEFENSES)
    def test_every_method_repairs_there(self, name, net, tmp_path):
        if (name, net) in {("bnp", "vit"), ("clp", "vit")}:
            pytest.skip("the method has no meaning for this network and says so")
        model = there(build(net))
        before = Snapshot(model)
        repair = DEFENSES[name](**QUICK[name]).repair(model, make_clean(), GIVEN)
        before.assert_same()
        assert places(repair.model) == {GPU}
        assert repair.record.environment["device"] == torch.cuda.get_device_name(GPU)
        assert repair.record.peak_memory_bytes > 0
        repair.save(tmp_path / "run")
        saved = Checkpoint.read(tmp_path / "run" / "repaired.safetensors").tensors
        assert all(torch.equal(saved[key], value.cpu()) for key, value in repair.model.state_dict().items())

    @pytest.mark.parametrize("name", SCANNERS)
    def test_every_scanner_scans_there(self, name):
        model, clean = backdoored(7)
        record = SCANNERS[name](**SHORT[name]).examine(there(model), clean.take(range(100)))
        assert record.environment["device"] == torch.cuda.get_device_name(GPU)
        assert record.diagnosis.verdict in ("found", "not_found", "inconclusive")

    def test_a_backdoor_is_found_and_removed_there(self, tmp_path):
        model, clean = backdoored(7)
        repair = DEFENSES["auto"]().repair(there(model), clean)
        assert repair.record.diagnosis.found == [7]
        attack = BadNets(size=2, row=6, col=6, value=1)
        assert evaluate(there(model), clean, attack, 7).asr.value > 0.9
        assert evaluate(repair.model, clean, attack, 7).asr.value < 0.1
        repair.save(tmp_path / "run")
        child = Checkpoint.read(tmp_path / "run" / "repaired.safetensors").tensors
        parent = restore(child, tmp_path / "run" / "changes.safetensors")
        assert all(torch.equal(parent[key], value) for key, value in model.state_dict().items())

    def test_samples_are_screened_there(self):
        model, clean = backdoored(7)
        given = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        detectors = [cls(**SHORT.get(name, {})) for name, cls in DETECTORS.items()]
        done = screen(there(model), clean, clean, detectors=detectors, diagnosis=given)
        assert all(len(scores) == len(clean) for scores in done.scores.values())
        assert torch.equal(done.predicted == clean.labels, correct(model, clean))
        assert done.table().num_rows == len(clean)

    @pytest.mark.parametrize("name", TRIGGERS)
    def test_triggers_are_the_same_there(self, name):
        images, attack = torch.rand(4, 3, 32, 32), TRIGGERS[name]()
        with running_on(GPU):
            triggered = attack.trigger(images.to(GPU)).cpu()
        assert (triggered - attack.trigger(images)).abs().max() < 1e-4

    @pytest.mark.parametrize("attack", [BadNets(size=2), *ONLINE], ids=named)
    def test_victims_train_there_and_go_on_where_they_were_killed(self, attack, tmp_path, monkeypatch):
        def trained():
            recipe, file = Recipe(epochs=3, batch_size=16), tmp_path / "training"
            net = there(network())
            return make_victim(net, stripes(), attack=attack, target=1, rate=0.2, recipe=recipe, checkpoint=file)

        def save_and_die(*arguments):
            save(*arguments)
            raise Killed

        save = checkpoint.save
        monkeypatch.setattr(checkpoint, "save", save_and_die)
        with pytest.raises(Killed):
            trained()
        monkeypatch.undo()
        victim = trained()
        assert places(victim.model) == {GPU}
        assert len(victim.record.epochs) == 3
        victim.save(tmp_path / "victim")

    def test_the_faster_network_says_much_the_same(self):
        model, clean = backdoored(7)
        moved, images = there(model), clean.to(GPU).floats()
        said = faster(moved, clean.to(GPU))(images).softmax(1)
        assert (said - moved(images).softmax(1)).abs().max() < 0.1
