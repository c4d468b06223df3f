"""CLP and BNP beyond the contract of every method."""

import copy

import pytest
import torch
from tiny import build, make_clean
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses.bnp import BNP, divergence
from untrojan.defenses.clp import CLP
from untrojan.errors import ConfigError, ModelError
from untrojan.mask import Mask
from untrojan.record import Diagnosis, Target
from untrojan.sources.architectures import PreActResNet18, SmallVGG

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("short_searches")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])
NOTHING = CleanSet(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.long))

both = pytest.mark.parametrize("cls", [CLP, BNP])


def wide(width=24):
    """Two convolutions with BatchNorm, wide enough for a z-value above 3."""
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 4),
    )
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.1, 2)
    return net.eval()


def by_hand(layer, norm, eps):
    """The published loop over channels, with explicit singular value decompositions."""
    bounds = []
    for kernel, gamma, variance in zip(layer.weight, norm.weight, norm.running_var, strict=True):
        matrix = kernel.detach().reshape(kernel.shape[0], -1) * (gamma.detach() / (variance + eps).sqrt()).abs()
        bounds.append(torch.linalg.svd(matrix.double()).S.max())
    return torch.stack(bounds).float()


def z_values(values):
    return (values - values.mean()) / values.std()


def changed_of(repair):
    return {layer.name: layer.changed for layer in repair.record.layers}


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_bounds_are_those_of_explicit_decompositions(variant):
    net = wide()
    for norm in (net[1], net[4]):
        norm.eps = 0.01
    method = CLP(variant=variant, select="threshold")
    measured = method.measure(net, NOTHING, seed=0)
    scores = method.score(net, NOTHING, seed=0).values
    assert list(measured) == list(scores) == ["1.weight", "4.weight"]
    for conv, norm in ((0, 1), (3, 4)):
        bounds = by_hand(net[conv], net[norm], 0.01 if variant == "fixed" else 0.0)
        assert torch.allclose(measured[f"{norm}.weight"], bounds, rtol=1e-5)
        assert torch.allclose(scores[f"{norm}.weight"], -z_values(bounds), atol=1e-5)


@pytest.mark.parametrize("clean", [NOTHING, make_clean(8)], ids=["no images", "images"])
@pytest.mark.parametrize("u", [0.5, 1.5, 3.0])
def test_clp_silences_what_stands_out(clean, u):
    net = wide()
    with torch.no_grad():
        net[3].weight[5] *= 30
    repair = CLP(select="threshold", threshold=u).repair(net, clean, GIVEN)
    changed = changed_of(repair)
    for conv, norm in ((0, 1), (3, 4)):
        out = z_values(by_hand(net[conv], net[norm], net[norm].eps)) > u
        assert changed[str(norm)] == out.nonzero().flatten().tolist()
        for part in ("weight", "bias"):
            expected = getattr(net[norm], part).detach().clone()
            expected[out] = 0
            assert torch.equal(getattr(repair.model[norm], part), expected)
    assert 5 in changed["4"]


def test_without_images_the_result_is_not_verified():
    repair = CLP(select="count", count=3).repair(wide(), NOTHING, GIVEN)
    assert repair.record.units_changed == 3
    assert repair.record.reason == "there are no clean images to verify the result on"
    net = wide()
    with torch.no_grad():
        net[3].weight[5] *= 30
    assert changed_of(CLP().repair(net, NOTHING)) == {"1": [], "4": [5]}


def test_convolutions_are_paired_by_what_runs():
    """In a pre-activation network the shortcut is defined last, and its output goes into no normalization."""
    net = PreActResNet18().eval()
    measured = CLP().measure(net, CleanSet(torch.rand(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)), seed=0)
    assert torch.allclose(
        measured["layer2.0.bn2.weight"], by_hand(net.layer2[0].conv1, net.layer2[0].bn2, net.layer2[0].bn2.eps)
    )
    scores = CLP().score(net, CleanSet(torch.rand(1, 3, 16, 16), torch.zeros(1, dtype=torch.long)), seed=0)
    unfed = scores.values.keys() - measured.keys()
    assert unfed == {f"layer{stage}.{block}.bn1.weight" for stage in range(1, 5) for block in (0, 1)} - {
        "layer1.0.bn1.weight"
    }
    assert all((scores.values[name] == 0).all() for name in unfed)
    assert scores.threshold(-1e-6).pruned == sum(int((z_values(bound) > 1e-6).sum()) for bound in measured.values())


@pytest.mark.parametrize(
    ("name", "unit", "layer", "factor"),
    [
        ("plain", "2.weight", "2", lambda _: 1),
        ("groupnorm", "1.weight", "0", lambda net: net[1].weight.abs()),
        ("convnext", "2.weight", "1", lambda net: net[2].weight.abs()),
        ("depthwise", "4.weight", "3", lambda net: net[4].weight.abs() / (net[4].running_var + net[4].eps).sqrt()),
        ("no-affine", "0.weight", "0", lambda net: 1 / (net[1].running_var + net[1].eps).sqrt()),
        ("shared", "shared.weight", "shared", lambda _: 1),
    ],
)
def test_bounds_of_other_networks(name, unit, layer, factor):
    net = build(name).requires_grad_(False)
    measured = CLP().measure(net, NOTHING, seed=0)
    kernels = net.get_submodule(layer).weight.flatten(2)
    bounds = torch.stack([torch.linalg.svd(each).S.max() for each in kernels]) * factor(net)
    assert torch.allclose(measured[unit], bounds, rtol=1e-5)


def test_linear_layers_are_bounded_by_the_norm_of_their_rows():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
    nn.init.normal_(net[2].weight)
    bounds = net[1].weight.norm(dim=1) * net[2].weight.abs()
    assert torch.allclose(CLP().measure(net, NOTHING, seed=0)["2.weight"], bounds, rtol=1e-5)


@pytest.mark.parametrize("how", ["shared", "computed"])
def test_a_weight_that_is_computed_or_shared_is_bounded_too(how):
    net = nn.Sequential(*wide(8)[:6], nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(512, 4))
    if how == "shared":
        net[6].weight = net[3].weight
    else:
        nn.utils.parametrizations.spectral_norm(net[6])
    measured = CLP().measure(net.train(), NOTHING, seed=0)
    assert torch.allclose(measured["7.weight"], by_hand(net.eval()[6], net[7], net[7].eps), rtol=1e-5)


@pytest.mark.parametrize("clean", [NOTHING, make_clean()], ids=["no images", "images"])
@pytest.mark.parametrize("name", ["tokens", "places"])
def test_clp_needs_a_channel_to_bound(name, clean):
    places = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.LayerNorm((8, 8)), nn.Flatten(), nn.Linear(320, 4))
    with pytest.raises(
        ModelError, match="CLP bounds channels that a convolution or linear layer makes, and no channel"
    ):
        CLP().repair(build("vit") if name == "tokens" else places, clean, GIVEN)


@both
@pytest.mark.parametrize("case", ["alike", "one channel", "no variance"])
def test_layers_that_say_nothing_score_0(cls, case):
    net = wide(1 if case == "one channel" else 24)
    with torch.no_grad():
        for layer in net[:5]:
            for value in layer.state_dict().values():
                if case == "alike" and value.is_floating_point():
                    value.fill_(0.5)
                elif case == "no variance" and isinstance(layer, nn.BatchNorm2d):
                    layer.running_var.zero_()
    scores = cls(variant="released", select="threshold").score(net, make_clean(), seed=0)
    assert scores.threshold(-1e-6).pruned == 0


@both
def test_no_outlier_among_ten(cls):
    scores = cls().score(wide(10), make_clean(), seed=0)
    assert all(value.min() > -9 / 10**0.5 - 1e-6 for value in scores.values.values())
    assert scores.threshold(-3).pruned == 0


@both
def test_budget_goes_on_to_one_deviation(cls):
    repair = cls(select="budget", budget=0.99).repair(wide(), make_clean(), GIVEN)
    scores = torch.cat([torch.tensor(layer.values) for layer in repair.record.layers])
    assert repair.record.units_changed == (scores <= -1).sum()
    assert repair.record.selection.rule.startswith("budget")


@both
@pytest.mark.parametrize("fields", [{"threshold": 0}, {"threshold": -3}, {"count": -1}, {"budget": 1}, {"folds": 1}])
def test_fields_out_of_range(cls, fields):
    with pytest.raises(ConfigError, match=f"^{cls.name}: `{next(iter(fields))}`"):
        cls(**fields)


def test_images_are_judged_on_whole_for_clp():
    for variant in ("fixed", "released"):
        repair = CLP(variant=variant, select="count", count=2).repair(wide(), make_clean(), GIVEN)
        assert repair.record.after.held_out
        assert repair.record.after.accuracy.total == 32


# BNP


def inputs_of(net, images):
    """What goes into the two normalizations of `wide`."""
    with torch.no_grad():
        first = net[0](images)
        return first, net[3](net[2](net[1](first)))


def gaussian(mean, variance):
    return torch.distributions.Normal(mean, variance.sqrt())


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_divergences_written_out(variant):
    """Against the formula of torch.distributions, on 600 images in several batches; `released` takes 500 of them."""
    net, clean = wide(), make_clean(600)
    seen = clean.floats()
    if variant == "released":
        seen = seen[torch.randperm(600, generator=torch.Generator().manual_seed(4))[:500]]
    measured = BNP(variant=variant, select="threshold").measure(net, clean, seed=4)
    eps = net[1].eps if variant == "fixed" else 0.0
    for norm, values in zip((1, 4), inputs_of(net, seen), strict=True):
        variance = values.var((0, 2, 3), correction=0 if variant == "fixed" else 1)
        now = gaussian(values.mean((0, 2, 3)), variance + eps)
        then = gaussian(net[norm].running_mean, net[norm].running_var + eps)
        assert torch.allclose(
            measured[f"{norm}.weight"], torch.distributions.kl_divergence(now, then), rtol=1e-4, atol=1e-6
        )


def test_divergence_is_0_at_equal_moments():
    generator = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(9, generator=generator), torch.rand(9, generator=generator) + 0.1
    assert torch.equal(divergence(mean, variance, mean, variance), torch.zeros(9))
    net, clean = wide(), make_clean()
    for norm, values in zip((1, 4), (0, 1), strict=True):
        seen = inputs_of(net, clean.floats())[values]
        net[norm].running_mean.copy_(seen.mean((0, 2, 3)))
        net[norm].running_var.copy_(seen.var((0, 2, 3), correction=0))
    assert all(value.abs().max() < 1e-5 for value in BNP().measure(net, clean, seed=0).values())


def test_bnp_zeroes_scales_only():
    net, clean = wide(), make_clean()
    net[4].running_mean[7] += 50
    repair = BNP(select="threshold", threshold=4).repair(net, clean, GIVEN)
    assert changed_of(repair) == {"1": [], "4": [7]}
    after = repair.model.state_dict()
    for name, before in net.state_dict().items():
        expected = before.clone()
        if name == "4.weight":
            expected[7] = 0
        assert torch.equal(after[name], expected)


def test_one_pass_over_the_images():
    net, counts = wide(), []
    net.register_forward_pre_hook(lambda _, images: counts.append(len(images[0])))
    BNP().score(net, make_clean(300), seed=0)
    assert sum(counts) == 300
    counts.clear()
    CLP().score(net, make_clean(300), seed=0)
    assert sum(counts) == 2


def test_batchnorm_of_linear_layers_and_shared_ones():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(12)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 12), norm, nn.ReLU(), nn.Linear(12, 12), norm, nn.Linear(12, 4))
    norm.running_var.uniform_(0.5, 2)
    net.eval()
    clean = make_clean()
    with torch.no_grad():
        both = [net[:2](clean.floats()), net[:5](clean.floats())]
    values = torch.cat(both)
    now = gaussian(values.mean(0), values.var(0, correction=0) + norm.eps)
    then = gaussian(norm.running_mean, norm.running_var + norm.eps)
    measured = BNP().measure(net, clean, seed=0)
    assert torch.allclose(measured["2.weight"], torch.distributions.kl_divergence(now, then), rtol=1e-4, atol=1e-6)


def test_a_convolution_stands_for_batchnorm_without_scale():
    net, clean = build("no-affine"), make_clean()
    assert list(BNP().measure(net, clean, seed=0)) == ["0.weight"]
    repair = BNP(select="count", count=2).repair(net, clean, GIVEN)
    assert (repair.model[0].weight == 0).flatten(1).all(1).sum() == 2
    assert torch.equal(repair.model[0].bias, net[0].bias)


def test_batchnorm_without_statistics():
    net = copy.deepcopy(wide())
    net[4] = nn.BatchNorm2d(24, track_running_stats=False)
    scores = BNP().score(net, make_clean(), seed=0)
    assert (scores.values["4.weight"] == 0).all()
    assert (scores.values["1.weight"] != 0).all()


@pytest.mark.parametrize("name", ["plain", "groupnorm", "vit", "convnext", "shared", "tied"])
def test_bnp_needs_running_statistics(name):
    with pytest.raises(ModelError, match="BNP compares clean images with BatchNorm running statistics, and the net"):
        BNP(select="count", count=1).repair(build(name), make_clean(), GIVEN)


@both
def test_the_network_is_left_alone(cls):
    net = SmallVGG().eval()
    before = copy.deepcopy(net.state_dict())
    mask = cls().score(net, CleanSet(torch.rand(4, 3, 32, 32), torch.arange(4)), seed=0)
    assert mask.values.keys() == Mask.ones(net, "neuron").values.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
