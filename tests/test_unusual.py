"""Networks and diagnoses of unusual kinds: methods, scanners and detectors take them, or say why they do not."""

import pytest
import torch
from tiny import CLASSES, DEFENSES, GIVEN, QUICK, Snapshot, build, make_clean
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from untrojan.errors import ConfigError, ModelError
from untrojan.model import check
from untrojan.record import Rate, Target, Trigger
from untrojan.registry import discover
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.scanner import Scanner
from untrojan.scanners.suspects import Suspects

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

SCANNERS = discover("untrojan.scanners", Scanner)
DETECTORS = discover("untrojan.scanners.detectors", Detector)
SHORT = {
    "triggers": {"unlearn_epochs": 2, "runs": 2, "search_steps": 2, "refine_steps": 2},
    "unlearning": {"unlearn_epochs": 2, "runs": 2},
    "neural-cleanse": {"mask_epochs": 2},
    "unlearned": {"unlearn_epochs": 2},
    "strip": {"blends": 3},
    "cognitive-distillation": {"iterations": 2},
}


class ByBatch(nn.Module):
    """Normalizes by the batch in evaluation mode too, which a single image has no variance for."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm1d(6, track_running_stats=False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images):
        return self.head(self.norm(self.body(images).mean((2, 3))).relu())


class IsALayer(nn.Linear):
    """A network that is itself a linear layer."""

    def __init__(self):
        super().__init__(192, CLASSES)

    def forward(self, images):
        return super().forward(images.flatten(1))


class ComputedHead(nn.Module):
    """Computes the weight of its last layer from others."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.late = nn.Conv2d(6, 6, 3)
        self.head = weight_norm(nn.Linear(6, CLASSES))

    def forward(self, images):
        return self.head(self.late(self.body(images).relu()).relu().mean((2, 3)))


class Indexed(nn.Module):
    """Puts its channels in an order that is a parameter of whole numbers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.order = nn.Parameter(torch.randperm(6), requires_grad=False)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images):
        return self.head(self.norm(self.body(images))[:, self.order].relu().mean((2, 3)))


NETS = [ByBatch, IsALayer, ComputedHead, Indexed]
NO_STATISTICS = "compares clean images with BatchNorm running statistics, and the network has none"
SAYS = {
    **{(name, IsALayer): "nothing to mask by neuron" for name in ("rnp", "anp", "bnp", "nft")},
    **{(name, IsALayer): "nothing to mask by weight" for name in ("awm", "tsbd")},
    ("clp", IsALayer): "nothing to mask by filter",
    ("bnp", ByBatch): NO_STATISTICS,
    ("bnp", ComputedHead): NO_STATISTICS,
    ("clp", ByBatch): "CLP bounds channels that a convolution or linear layer makes, and no channel here is one",
    ("fine-pruning", IsALayer): "in a network that is more than that layer",
    ("fine-pruning", ComputedHead): "expected the last layer, head, to have a weight of its own",
    ("nad", IsALayer): "no layer of the network has an output with positions",
    ("ulrl", ComputedHead): "a row for each class, got head with 0 rows of its own",
}

nets = pytest.mark.parametrize("kind", NETS)


@nets
@pytest.mark.parametrize("name", DEFENSES)
def test_methods_repair_it_or_say_why_not(name, kind, clean):
    torch.manual_seed(2)
    net = kind().eval()
    before, method = Snapshot(net), DEFENSES[name](**QUICK[name])
    if (name, kind) in SAYS:
        with pytest.raises(ModelError, match=SAYS[name, kind]):
            method.repair(net, clean, GIVEN)
    else:
        assert method.repair(net, clean, GIVEN).record.model.classes == CLASSES
    before.assert_same()


@nets
@pytest.mark.parametrize("name", SCANNERS)
def test_scanners_scan_it(name, kind):
    record = SCANNERS[name](**SHORT[name]).examine(kind().eval(), make_clean())
    assert record.model.classes == CLASSES


@nets
@pytest.mark.parametrize("name", DETECTORS)
def test_detectors_score_with_it(name, kind, clean):
    scores = DETECTORS[name](**SHORT.get(name, {})).score(kind().eval(), clean, Suspects.of(clean), GIVEN)
    assert len(scores.unique()) > 1


class InPlace(nn.Module):
    """Normalizes the images that it is given, not a copy of them."""

    def __init__(self):
        super().__init__()
        self.net = build("batchnorm")

    def forward(self, images):
        return self.net(images.sub_(0.5).div_(0.25))


class Cut(nn.Module):
    """Lets no gradient through its first layer."""

    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 6, 3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images):
        with torch.no_grad():
            features = self.body(images).relu().mean((2, 3))
        return self.head(features)


@pytest.mark.parametrize("kind", [InPlace, Cut])
def test_without_gradients_to_images_left_as_they_are_nothing_is_learned(kind, clean):
    net = kind().eval()
    (problem,) = check(net, clean)
    assert problem.error is ModelError
    assert check(net, clean, learns=False) == []
    for use in (
        lambda: DEFENSES["nad"](**QUICK["nad"]).repair(net, clean, GIVEN),
        lambda: SCANNERS["triggers"](**SHORT["triggers"]).scan(net, clean),
        lambda: DETECTORS["cognitive-distillation"]().score(net, clean, Suspects.of(clean), GIVEN),
    ):
        with pytest.raises(ModelError, match="expected gradients from the logits to the images"):
            use()


@pytest.mark.parametrize(("dtype", "told"), [(torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 1)])
def test_weights_too_coarse_for_small_updates_are_told_once(dtype, told, clean):
    net = build("plain").to(dtype)
    net.register_forward_pre_hook(lambda _, inputs: inputs[0].to(dtype))
    net.register_forward_hook(lambda _, __, out: out.float())
    warned = DEFENSES["sau"](**QUICK["sau"]).repair(net, clean, GIVEN).record.warnings
    assert sum("round small updates away" in text for text in warned) == told


@pytest.mark.parametrize("label", [CLASSES, 9, -1])
@pytest.mark.parametrize("name", ["neural-cleanse", "nad"])
def test_a_diagnosis_of_a_label_that_the_model_does_not_have_is_refused(name, label, clean):
    given = GIVEN.model_copy(update={"targets": [Target(label=label, score=0.9)]})
    with pytest.raises(ConfigError, match=f"suspects label {label}, but the model has {CLASSES} classes, 0 to 3"):
        DEFENSES[name](**QUICK[name]).repair(build("batchnorm"), clean, given)


@pytest.mark.parametrize(
    ("targets", "told"),
    [([1, 0], "has targets for 2 classes"), ([1, 2, 9, 0], "suspects label 9"), ([1, 2, 0, -1], "suspects label -1")],
)
def test_a_diagnosis_with_targets_for_other_classes_than_the_model_has_is_refused(targets, told, clean):
    known = {"label": None, "targets": targets, "success": Rate.of(9, 9)}
    trigger = Trigger(**known, kind="patch", what="", picture="", examples="")
    given = GIVEN.model_copy(update={"triggers": [trigger]})
    with pytest.raises(ConfigError, match=f"{told}, but the model has {CLASSES} classes, 0 to 3"):
        DEFENSES["auto"](**QUICK["auto"]).repair(build("batchnorm"), clean, given)
