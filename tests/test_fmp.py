"""FMP beyond the contract of every method."""

import copy
import warnings

import pytest
import torch
from tiny import build, make_clean
from torch import nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.fine_tuning import FineTuning
from untrojan.defenses.fmp import BATCH, FMP, Ranking
from untrojan.errors import ConfigError, UnreliableWarning
from untrojan.model import correct
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def wide(*widths, kernel=3):
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, kernel, padding=kernel // 2), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    torch.manual_seed(1)
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 4))
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.5)
    return net.eval()


def fooled(net, images, labels, layer, channel, method, noise):
    """One map alone, the way it is published: two passes over everything, one gradient step, one scoring pass."""
    maps = []
    handle = net.get_submodule(layer).register_forward_hook(lambda _, __, out: maps.append(out.clone()))
    released = method.variant == "released"
    noise = noise.sign() if released else noise
    start = (images + method.alpha * noise).clamp(0, 1).requires_grad_()
    net(images)
    calls = len(maps)
    net(start)
    handle.remove()
    axis = -1 if isinstance(net.get_submodule(layer), nn.Linear) else 1
    loss = sum(
        functional.mse_loss(one.select(axis, channel), other.select(axis, channel), reduction="sum")
        for one, other in zip(maps[calls:], maps[:calls], strict=True)
    )
    if loss.requires_grad:
        loss.backward()
    made = start.detach() + method.eps * (0 if start.grad is None else start.grad.sign())
    if not released:
        made = torch.maximum(torch.minimum(made, images + method.eps), images - method.eps)
    with torch.no_grad():
        out = net(made.clamp(0, 1))
    others = out.clone()
    others[torch.arange(len(labels)), labels] = -torch.inf
    margin = out[torch.arange(len(labels)), labels] - others.amax(1)
    return (out.argmax(1) == labels).sum(), margin.sum()


class InPlace(nn.Module):
    """Adds and rectifies in place what its convolutions give."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        first = functional.relu_(self.one(images))
        second = self.two(first)
        second += first
        return self.head(functional.relu_(second).mean((2, 3)))


NETS = ["batchnorm", "plain", "vit", "convnext", "depthwise", "shared", "tied", "no-affine", "in place"]


@pytest.mark.parametrize("variant", ["fixed", "released"])
@pytest.mark.parametrize("name", NETS)
def test_ranking_is_the_slow_obvious_way(name, variant):
    net = InPlace().eval() if name == "in place" else build(name)
    clean = make_clean(40)
    method = FMP(p=4, variant=variant, images=36, alpha=0.05, eps=0.2)
    rankings = method.rank(net, clean, seed=6)
    assert rankings
    generator = torch.Generator().manual_seed(6)
    shown = clean.take(torch.randperm(40, generator=generator)[: 32 if variant == "released" else 36])
    parts = [(*part, 2 * torch.rand(part[0].shape, generator=generator) - 1) for part in shown.batches(BATCH)]
    slow = copy.deepcopy(net)
    for layer, ranking in rankings.items():
        for channel in range(len(ranking.right)):
            counts = [fooled(slow, images, labels, layer, channel, method, noise) for images, labels, noise in parts]
            right, margin = (sum(each) for each in zip(*counts, strict=True))
            assert ranking.right[channel] == right
            assert torch.allclose(ranking.margin[channel], margin, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("batchnorm", {"0": 6, "3": 6}),
        ("vit", {"patches": 8, "encoder.linear1": 16, "encoder.linear2": 8}),
        ("convnext", {"0": 6, "1": 6, "3": 12, "5": 6}),
        ("shared", {"stem": 6, "shared": 6}),
    ],
)
def test_layers_that_are_ranked(name, layers):
    rankings = FMP(p=6).rank(build(name), make_clean(), seed=0)
    assert {layer: len(ranking.right) for layer, ranking in rankings.items()} == layers
    assert {layer for layer, width in layers.items() if width >= 12} == set(
        FMP(p=12).rank(build(name), make_clean(), seed=0)
    )


def test_passes_are_those_needed():
    """Two shared passes per image, and one scoring pass per image and map."""
    net, counts = wide(6, 12), []
    net.register_forward_pre_hook(lambda _, images: counts.append(len(images[0])))
    for images, maps in ((70, 18), (20, 18)):
        counts.clear()
        FMP(p=6, images=images).rank(net, make_clean(80), seed=0)
        assert sum(counts) == images * (maps + 2)
    counts.clear()
    FMP(p=12, images=70).rank(net, make_clean(80), seed=0)
    assert sum(counts) == 70 * (12 + 2)
    counts.clear()
    assert FMP().rank(net, make_clean(80), seed=0) == {}
    assert counts == []


def test_ties_fall_to_the_lower_margin():
    ranking = Ranking(torch.tensor([3.0, 1, 2, 1, 1]), torch.tensor([-9.0, 5, 0, 2, 2]))
    assert ranking.lowest(4).tolist() == [3, 4, 1, 2]
    assert ranking.lowest(4, by_margin=False).tolist() == [1, 3, 4, 2]
    assert ranking.lowest(0).tolist() == []


def pruned(net, model):
    """Per convolution the rows that are zero after but were not before."""
    return {
        name: (model.get_submodule(name).weight == 0).flatten(1).all(1).nonzero().flatten().tolist()
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d)
    }


def test_count_rule():
    net, clean = wide(32, 63, 64, 127, 128, 256, 512, kernel=1), CleanSet(torch.rand(4, 3, 2, 2), torch.arange(4))
    method = FMP(images=1, epochs=1)
    tuned = method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed=0)
    counts = {len(net.get_submodule(name).weight): len(rows) for name, rows in pruned(net, tuned).items()}
    assert counts == {32: 0, 63: 0, 64: 1, 127: 1, 128: 2, 256: 4, 512: 8}
    rankings = method.rank(net, clean, seed=0)
    assert list(rankings) == ["6", "9", "12", "15", "18"]
    for name, ranking in rankings.items():
        assert pruned(net, tuned)[name] == sorted(ranking.lowest(len(ranking.right) // 64).tolist())


@pytest.mark.parametrize("variant", ["fixed", "released"])
def test_pruned_maps_stay_at_zero(variant):
    """`released` holds nothing, but zero rows and zero scales are a fixed point of SGD without weight decay."""
    net, clean = wide(6, 12), make_clean()
    method = FMP(p=3, variant=variant, epochs=4, lr=0.1)
    tuned = method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed=0)
    rankings = method.rank(net, clean, seed=0)
    for conv, norm, count in (("0", "1", 2), ("3", "4", 4)):
        lowest = rankings[conv].lowest(count, by_margin=variant == "fixed")
        rows = tuned.get_submodule(conv), tuned.get_submodule(norm)
        assert pruned(net, tuned)[conv] == sorted(lowest.tolist())
        for layer in rows:
            assert (layer.weight[lowest] == 0).all()
            assert (layer.bias[lowest] == 0).all() == (variant == "fixed")
            kept = torch.ones(len(layer.weight), dtype=torch.bool)
            kept[lowest] = False
            assert (layer.weight[kept] != 0).all()
            assert (layer.bias[kept] != 0).all()


def test_maps_without_normalization_need_the_hold():
    net, clean = build("plain"), make_clean()
    regrown = FMP(p=3, variant="released", epochs=2, lr=0.1).tune(copy.deepcopy(net), clean, clean, GIVEN, seed=0)
    held = FMP(p=3, epochs=2, lr=0.1).tune(copy.deepcopy(net), clean, clean, GIVEN, seed=0)
    assert sum(map(len, pruned(net, regrown).values())) < 4
    assert [len(rows) for rows in pruned(net, held).values()] == [2, 2]
    for name, rows in pruned(net, held).items():
        assert (held.get_submodule(name).bias[rows] == 0).all()


def test_tokens_lose_a_column():
    net, clean = build("vit"), make_clean()
    method = FMP(p=8, epochs=2)
    tuned = method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed=0)
    rankings = method.rank(net, clean, seed=0)
    seen = []
    tuned.encoder.linear1.register_forward_hook(lambda _, __, out: seen.append(out))
    correct(tuned.train(), clean)
    assert (seen[0] == 0).all((0, 1)).nonzero().flatten().tolist() == sorted(
        rankings["encoder.linear1"].lowest(2).tolist()
    )


def test_normalization_over_places_is_left():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LayerNorm((8, 8)), nn.Flatten(), nn.Linear(256, 4)).eval()
    tuned = FMP(p=4, epochs=1).tune(net, make_clean(), make_clean(), GIVEN, seed=0)
    assert (tuned[0].weight == 0).flatten(1).all(1).sum() == 1
    assert (tuned[1].weight != 0).all()


def test_ablation_is_fine_tuning():
    net, clean = wide(64), make_clean()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ablated = FMP(prune=False, epochs=3).tune(copy.deepcopy(net), clean, clean, GIVEN, seed=2)
    plain = copy.deepcopy(net).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.01, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3, eta_min=1e-4)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        for images, labels in FineTuning().batches(clean, generator):
            optimizer.zero_grad()
            functional.cross_entropy(plain(images), labels).backward()
            optimizer.step()
        schedule.step()
    assert same(ablated.state_dict(), plain.state_dict())
    assert not same(FMP(epochs=3).tune(net, clean, clean, GIVEN, seed=2).state_dict(), plain.state_dict())
    assert FMP(prune=False, epochs=1).repair(plain.eval(), clean, GIVEN).record.method.fields["prune"] is False


def test_narrow_networks_are_only_fine_tuned():
    net, clean = build("batchnorm"), make_clean()
    with pytest.warns(UnreliableWarning, match="no layer with a weight of its own has 64 feature maps: nothing is"):
        repair = FMP(epochs=2).repair(net, clean, GIVEN, seed=1)
    assert any("plain fine-tuning" in text for text in repair.record.warnings)
    plain = FMP(epochs=2, prune=False).repair(net, clean, GIVEN, seed=1)
    assert same(repair.model.state_dict(), plain.model.state_dict())


def test_rankings_do_not_depend_on_the_callers_mode():
    net, clean = wide(6), make_clean()
    ranking = FMP(p=6).rank(net, clean, seed=0)["0"]
    with torch.inference_mode():
        assert same(FMP(p=6).rank(net, clean, seed=0)["0"]._asdict(), ranking._asdict())
    assert same(FMP(p=6).rank(net.train(), clean, seed=0)["0"]._asdict(), ranking._asdict())


class ByKeyword(nn.Module):
    """Normalizes by the batch also in evaluation, and calls its layers by keyword."""

    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(192, 6), nn.BatchNorm1d(6, track_running_stats=False)
        self.head = nn.Linear(6, 4)

    def forward(self, images):
        return self.head(input=self.norm(input=self.inner(input=images.flatten(1))).relu())


def test_the_channel_of_a_normalization_by_the_batch_goes_too_also_where_layers_are_called_by_keyword(clean):
    tuned = FMP(p=3, epochs=1).tune(ByKeyword(), clean, clean, GIVEN, seed=0)
    assert (tuned.inner.weight == 0).all(1).sum() == (tuned.norm.weight == 0).sum() == 2


def test_images_stay_in_the_ball_and_in_range():
    clean = make_clean(16)
    images = clean.floats()
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(images.shape, generator=generator)
    for variant, most in (("fixed", 0.1), ("released", 0.15)):
        method = FMP(variant=variant, alpha=0.05, eps=0.1)
        start = method._start(images, generator)
        made = method._step(images, start, gradient)
        assert (start - images).abs().max() <= 0.05 + 1e-6
        assert most - 0.01 < (made - images).abs().max() <= most + 1e-6
        assert made.min() == 0 <= made.max() <= 1
        corner = ((start - images).abs() > 0.05 - 1e-6) | (start == 0) | (start == 1)
        assert corner.all() == (variant == "released")
    assert same({"a": method._step(images, start, gradient * 0)}, {"a": start})


@pytest.mark.parametrize("count", [4, 5, 9])
def test_few_images(count):
    net = wide(8)
    repair = FMP(p=4, epochs=1, batch_size=2).repair(net, make_clean(count), GIVEN)
    assert repair.record.values_changed > 0
    assert len(pruned(net, repair.model)["0"]) == 2


def test_divergence_does_not_crash():
    repair = FMP(p=4, lr=1e30, epochs=2).repair(wide(8), make_clean(), GIVEN)
    assert all(torch.isfinite(value).all() for value in repair.model.state_dict().values())


@pytest.mark.parametrize(
    "fields",
    [{"p": 1}, {"images": 0}, {"alpha": 0}, {"eps": 0}, {"eps": 2}, {"lr": 0}, {"epochs": 0}, {"variant": "other"}],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^fmp: `{next(iter(fields))}`"):
        FMP(**fields)


@pytest.mark.parametrize("most", [40, 4])
def test_ranking_goes_on_with_fewer_images_at_a_time_where_the_memory_does_not_suffice(most):
    net, clean, sizes = wide(6), make_clean(), []

    def short(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    net.register_forward_pre_hook(short)
    with pytest.warns(UnreliableWarning, match="out of memory: images go through the network 16 at a time now, not 32"):
        rankings = FMP(p=6, images=32).rank(net, clean, seed=0)
    assert [len(ranking.right) for ranking in rankings.values()] == [6]
    assert (rankings["0"].right <= 32).all()
    assert sizes[-1] <= most
