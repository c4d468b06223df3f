import contextlib
import copy

import pytest
import torch
from tiny import NETS, Returns, Snapshot, build, make_clean
from torch import nn

from untrojan.errors import ConfigError, ModelError
from untrojan.mask import HeldOut, Mask, budget, curve_point, norm_after, products, require_effect, sweep
from untrojan.model import correct

UNITS = ("neuron", "filter", "weight")

unit = pytest.mark.parametrize("unit", UNITS)


def randomly(mask):
    generator = torch.Generator().manual_seed(5)
    return mask.map(lambda value: torch.rand(value.shape, generator=generator))


def outputs(function, *arguments):
    torch.manual_seed(0)
    with torch.no_grad():
        return function(*arguments)


def batch():
    return make_clean(12).floats()


@unit
@pytest.mark.parametrize("training", [False, True])
def test_ones_change_nothing(net, unit, training):
    mask = Mask.ones(net, unit)
    masked = outputs(mask.call, net.train(training), batch())
    assert torch.equal(masked, outputs(copy.deepcopy(net), batch()))
    baked = mask.bake(net).state_dict()
    assert all(torch.equal(value, baked[name]) for name, value in net.state_dict().items())


@unit
@pytest.mark.parametrize("training", [False, True])
def test_call_is_bake_bit_for_bit(net, unit, training):
    mask = randomly(Mask.ones(net, unit))
    masked = outputs(mask.call, net.train(training), batch())
    assert torch.equal(masked, outputs(mask.bake(net), batch()))
    assert not torch.equal(masked, outputs(copy.deepcopy(net), batch()))


@unit
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_keep_their_type(unit, dtype):
    net = build("batchnorm").to(dtype)
    mask = randomly(Mask.ones(net, unit)).map(lambda value: value.requires_grad_())
    masked = mask.call(net, batch().to(dtype))
    assert masked.dtype == dtype
    assert torch.equal(masked, outputs(mask.bake(net), batch().to(dtype)))
    gradients = torch.autograd.grad(masked.square().mean(), list(mask.values.values()))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)


@unit
def test_bake_keeps_names_modes_and_the_rest(net, unit):
    mask = randomly(Mask.ones(net, unit))
    next(net.children()).train()
    before = Snapshot(net)
    baked = mask.bake(net)
    before.assert_same()
    assert [module.training for module in baked.modules()] == [module.training for module in net.modules()]
    assert [value.requires_grad for value in baked.parameters()] == [value.requires_grad for value in net.parameters()]
    assert list(baked.state_dict()) == list(net.state_dict())
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, baked.state_dict()[name])}
    aliases = {name for name in changed if name not in dict(net.named_parameters())}
    if unit != "filter":
        assert changed - aliases == set(mask.values)
    assert {name.rpartition(".")[0] for name in changed - aliases} == {name.rpartition(".")[0] for name in mask.values}


@unit
def test_gradients_reach_the_multipliers_only(net, unit):
    mask = Mask.ones(net, unit).map(lambda value: value.requires_grad_())
    net.train()
    before = Snapshot(net)
    with torch.random.fork_rng():
        loss = nn.functional.cross_entropy(mask.call(net, batch()), torch.arange(12) % 4)
    gradients = torch.autograd.grad(loss, list(mask.values.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert any(gradient.abs().max() > 1e-6 for gradient in gradients)
    before.assert_same()


def test_running_statistics_stay_when_only_a_part_trains():
    net = build("batchnorm")
    net[1].train()
    before = Snapshot(net)
    Mask.ones(net, "neuron").call(net, batch())
    before.assert_same()


@pytest.mark.parametrize(
    ("name", "neuron", "weight"),
    [
        ("batchnorm", ["1.weight", "4.weight"], ["0.weight", "3.weight"]),
        ("plain", ["0.weight", "2.weight"], ["0.weight", "2.weight"]),
        ("groupnorm", ["1.weight"], ["0.weight"]),
        (
            "vit",
            ["encoder.norm1.weight", "encoder.norm2.weight", "norm.weight"],
            ["patches.weight", "encoder.self_attn.out_proj.weight", "encoder.linear1.weight", "encoder.linear2.weight"],
        ),
        ("convnext", ["2.weight"], ["0.weight", "1.weight", "3.weight", "5.weight"]),
        ("depthwise", ["1.weight", "4.weight"], ["0.weight", "3.weight"]),
        ("shared", ["stem.weight", "shared.weight"], ["stem.weight", "shared.weight"]),
        ("tied", ["0.weight", "2.weight"], ["0.weight", "2.weight"]),
        ("frozen", ["1.weight"], ["0.weight"]),
        ("dropout", ["1.weight"], ["0.weight"]),
        ("no-affine", ["0.weight"], ["0.weight"]),
    ],
)
def test_units(name, neuron, weight):
    net = build(name)
    parameters = dict(net.named_parameters())
    for kind, names in zip(UNITS, (neuron, neuron, weight), strict=True):
        mask = Mask.ones(net, kind)
        assert list(mask.values) == names
        shapes = [parameters[each].shape if kind == "weight" else parameters[each].shape[:1] for each in names]
        assert [value.shape for value in mask.values.values()] == shapes
        assert mask.total == sum(shape.numel() for shape in shapes)


@pytest.mark.parametrize("layer", ["0", "2", "4.2"])
def test_a_weight_that_is_computed_is_no_unit_and_leaves_the_last_layer_the_last(layer):
    net = build("plain")
    nn.utils.parametrizations.spectral_norm(net.get_submodule(layer))
    inner = [name for name in ("0", "2") if name != layer]
    assert products(net) == [*inner, "4.2"]
    for kind in UNITS:
        assert list(Mask.ones(net, kind).values) == [f"{name}.weight" for name in inner]


@unit
def test_places_of_a_map_are_no_units(unit):
    conv, head = nn.Conv2d(3, 5, 3, padding=1), (nn.Flatten(), nn.Linear(320, 4))
    assert list(Mask.ones(nn.Sequential(conv, nn.LayerNorm((8, 8)), *head), unit).values) == ["0.weight"]
    channels = Mask.ones(nn.Sequential(conv, nn.LayerNorm((5, 8, 8)), *head), unit).values
    assert {name: len(value) for name, value in channels.items()} == {"0.weight" if unit == "weight" else "1.weight": 5}


@pytest.mark.parametrize("training", [False, True])
def test_masked_batchnorm_is_gamma_zeroed_batchnorm(training):
    net = build("batchnorm").train(training)
    mask = randomly(Mask.ones(net, "neuron")).threshold(0.5)
    assert 0 < mask.pruned < mask.total
    zeroed = copy.deepcopy(net)
    with torch.no_grad():
        for layer, value in zip((zeroed[1], zeroed[4]), mask.values.values(), strict=True):
            layer.weight[value == 0] = 0
    assert torch.equal(outputs(mask.call, net, batch()), outputs(zeroed, batch()))


@pytest.mark.parametrize("name", [name for name in NETS if name != "vit"])
def test_filter_silences_and_neuron_leaves_the_bias(name):
    net = build(name)
    first = next(iter(Mask.ones(net, "neuron").values))
    layer = first.removesuffix(".weight")
    bias = net.get_parameter(f"{layer}.bias")[0].item()
    for kind, constant in (("neuron", bias), ("filter", 0.0)):
        mask = Mask.ones(net, kind)
        mask.values[first][0] = 0
        baked = mask.bake(net)
        seen = []
        baked.get_submodule(layer).register_forward_hook(lambda _, __, out, seen=seen: seen.append(out[:, 0]))
        outputs(baked, batch())
        assert all((maps == constant).all() for maps in seen)
        assert seen[0].numel() > 0
    assert bias != 0


def test_threshold_count_total_and_pruned():
    mask = Mask({"a": torch.tensor([0.0, 0.5, 1.0]), "b": torch.tensor([[-0.5, 0.5], [0.2, 1.0]])}, "weight")
    assert (mask.total, mask.pruned) == (7, 1)
    for threshold, kept in [
        (-1, ([1, 1, 1], [[1, 1], [1, 1]])),
        (0, ([0, 1, 1], [[0, 1], [1, 1]])),
        (0.5, ([0, 0, 1], [[0, 0], [0, 1]])),
        (1, ([0, 0, 0], [[0, 0], [0, 0]])),
    ]:
        cut = mask.threshold(threshold)
        assert [value.tolist() for value in cut.values.values()] == list(kept)
        assert cut.pruned == mask.total - sum(int(value.sum()) for value in cut.values.values())
    assert [value.tolist() for value in mask.count(4).values.values()] == [[0, 0, 1], [[0, 1], [0, 1]]]
    for count in range(8):
        assert mask.count(count).pruned == count
    assert mask.count(3).equal(mask.threshold(0.2))
    assert not mask.count(3).equal(mask.count(4))


@pytest.mark.parametrize("count", [-1, 8])
def test_count_out_of_range(count):
    mask = Mask({"a": torch.ones(7)}, "neuron")
    with pytest.raises(ConfigError, match=f"expected a count between 0 and 7 units, got {count}"):
        mask.count(count)


@unit
def test_nothing_to_mask(unit):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    with pytest.raises(ModelError, match=f"nothing to mask by {unit}: expected"):
        Mask.ones(net, unit)


def test_sweep_is_the_slow_obvious_way(clean):
    net = build("batchnorm")
    scores = randomly(Mask.ones(net, "neuron"))
    parts = [HeldOut(scores, clean.take(range(10))), HeldOut(scores.map(lambda v: 1 - v), clean.take(range(10, 32)))]
    cuts = [lambda mask, count=count: mask.count(count) for count in (0, 3, 3, 12)]
    before = Snapshot(net)
    right = sweep(net, parts, cuts)
    before.assert_same()
    expected = [torch.cat([correct(cut(part.scores).bake(net), part.clean) for part in parts]) for cut in cuts]
    assert torch.equal(right, torch.stack(expected))


@pytest.mark.parametrize(
    ("lost", "drop", "chosen"),
    [
        ([0, 1, 2, 5], 0.2, 2),
        ([0, 3, 0, 0], 0.2, 0),
        ([3, 0, 0], 0.2, None),
        ([0, 0, 0], 0.1, 2),
        ([-1, 0, 1], 0.1, 2),
        ([0, 1], 0.01, 0),
    ],
)
def test_budget_is_the_last_cut_before_the_first_excess(lost, drop, chosen):
    before = torch.arange(10) < 5
    right = torch.stack([torch.arange(10) < 5 - each for each in lost])
    assert budget(right, before, drop) == chosen


def test_a_loss_of_exactly_the_budget_is_accepted():
    for images, lost in [(100, 1), (500, 10), (50, 1), (250, 5), (1000, 30)]:
        before = torch.arange(images) < images - 3
        right = (torch.arange(images) < images - 3 - lost)[None]
        assert budget(right, before, lost / images) == 0
        assert budget(right, before, lost / images - 1e-6) is None
        assert curve_point(*[Mask({"a": torch.zeros(1)}, "neuron")] * 2, before, right[0]).drop == lost / images


def test_curve_point():
    scores = Mask({"a": torch.tensor([-0.5, 0.3, 0.9])}, "neuron")
    before, right = torch.tensor([1, 1, 1, 0]).bool(), torch.tensor([1, 0, 0, 1]).bool()
    point = curve_point(scores, scores.count(2), before, right)
    assert (point.pruned, point.accuracy, point.drop) == (2, 0.5, 0.25)
    assert point.threshold == pytest.approx(0.3)
    half = 1.96 * torch.tensor([0.0, 1, 1, -1]).std(correction=0).item() / 2
    assert (point.drop_low, point.drop_high) == pytest.approx((0.25 - half, 0.25 + half))
    assert curve_point(scores, scores.count(0), before, right).pruned == 0


class PreActivation(nn.Module):
    """Normalizes before it convolves, and adds its input to what comes out, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.norm, self.conv = nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, maps):
        out = self.conv(self.norm(maps))
        if not self.in_place:
            return out + maps
        out += maps
        return out


@pytest.mark.parametrize("in_place", [False, True])
def test_what_is_changed_in_place_does_not_go_straight_into_a_normalization(in_place):
    blocks = [PreActivation(in_place) for _ in range(2)]
    last = nn.ReLU(in_place), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(384, 4)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *blocks, nn.Conv2d(6, 6, 1), *last).eval()
    assert norm_after(net, batch()) == {"0": "1.norm"}


def test_normalization_is_found_in_inference_mode_too():
    with torch.inference_mode():
        assert norm_after(build("batchnorm"), batch()) == {"0": "1", "3": "4"}


def test_normalization_is_found_by_what_runs():
    pairs = {name: norm_after(build(name), batch()) for name in ("batchnorm", "plain", "groupnorm", "convnext")}
    assert pairs == {"batchnorm": {"0": "1", "3": "4"}, "plain": {}, "groupnorm": {"0": "1"}, "convnext": {"1": "2"}}


def test_normalization_is_found_where_layers_are_called_by_keyword():
    net = build("batchnorm")
    by_keyword = Returns(lambda images: net[2:](net[1](input=net[0](input=images))))
    by_keyword.net = net
    assert norm_after(by_keyword, batch()) == {"net.0": "net.1", "net.3": "net.4"}


def test_normalization_is_found_behind_weights_that_are_computed_or_shared():
    net = nn.Sequential(*build("batchnorm")[:5], nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6))
    net[5].weight = net[3].weight
    nn.utils.parametrizations.spectral_norm(net[0])
    assert norm_after(net, batch()) == {"0": "1", "3": "4", "5": "6"}


def images_and(*layers):
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *layers, nn.Flatten(), nn.Linear(384, 4))


@pytest.mark.parametrize(
    ("net", "refused"),
    [
        (images_and(nn.BatchNorm2d(6, affine=False)), True),
        (images_and(nn.BatchNorm2d(6, affine=False, track_running_stats=False)), True),
        (images_and(nn.InstanceNorm2d(6)), True),
        (images_and(nn.LayerNorm((8, 8))), True),
        (images_and(nn.LayerNorm((6, 8, 8), elementwise_affine=False)), False),
        (images_and(nn.GroupNorm(2, 6, affine=False)), False),
        (images_and(nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 6, 1)), False),
        (images_and(), False),
        (images_and(nn.BatchNorm2d(6)), False),
    ],
)
def test_networks_whose_normalization_undoes_every_scale(net, refused):
    """In training mode, a quarter of a neuron's scale then changes nothing but by rounding."""
    before = Snapshot(net)
    with pytest.raises(ModelError, match="ANY learns how far to scale") if refused else contextlib.nullcontext():
        require_effect(net, batch()[:2], "ANY")
    before.assert_same()
    quarter = Mask.ones(net, "neuron")
    for value in quarter.values.values():
        value[0] = 0.25
    assert torch.allclose(outputs(quarter.call, net, batch()), outputs(net, batch()), atol=0.02) == refused
