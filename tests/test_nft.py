"""NFT beyond the contract of every method."""

import copy
import math

import pytest
import torch
from tiny import UNLIKE, build, make_clean, train
from torch import nn
from torch.nn import functional

from untrojan.defenses.nft import NFT
from untrojan.errors import ConfigError, ModelError
from untrojan.mask import Mask
from untrojan.model import correct
from untrojan.record import Diagnosis, Target

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])


def tuned(method, net, clean, seed=0):
    torch.manual_seed(seed)
    return method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed).eval()


def multipliers(net, after):
    """What every masked parameter was multiplied by, layer by layer."""
    return [after.get_parameter(name) / net.get_parameter(name) for name in Mask.ones(net, "neuron").values]


def test_written_out(clean):
    """Descent on the scales of BatchNorm in training mode, on pairs of images drawn with replacement."""
    net = build("batchnorm")
    method = NFT(iterations=6, lr=0.3, alpha=0.9, beta=0.2, penalty=0.05, batch_size=10)
    slow = copy.deepcopy(net).train()
    norms = slow[1], slow[4]
    scales = [norm.weight.detach().clone() for norm in norms]
    masks, speeds = [torch.ones(6), torch.ones(6)], [torch.zeros(6), torch.zeros(6)]
    generator = torch.Generator().manual_seed(3)
    pixels = clean.floats()
    for iteration in range(6):
        rate = 0.3 * (0.4 + 0.6 * (1 + math.cos(math.pi * iteration / 6)) / 2)
        drawn = torch.randint(32, (10,), generator=generator)
        share = torch.rand((), generator=generator)
        other = drawn[torch.randperm(10, generator=generator)]
        slow.zero_grad()
        out = slow(share * pixels[drawn] + (1 - share) * pixels[other])
        mixed = share * functional.one_hot(clean.labels[drawn], 4) + (1 - share) * functional.one_hot(
            clean.labels[other], 4
        )
        (-(mixed * functional.log_softmax(out, 1)).sum(1).mean()).backward()
        for i, norm in enumerate(norms):
            slope = norm.weight.grad * scales[i] - 0.05 / 8 * torch.sign(1 - masks[i])
            speeds[i] = 0.95 * speeds[i] + slope
            masks[i] = (masks[i] - rate * speeds[i]).clamp(0.9 * math.exp(-0.2 * (i + 1)), 1)
            norm.weight.data = scales[i] * masks[i]
    assert all((mask < 1).any() for mask in masks)
    after = tuned(method, net, clean, seed=3)
    for key, value in slow.state_dict().items():
        assert torch.allclose(after.state_dict()[key], value, atol=1e-5), key


def test_only_scales_and_running_statistics_change(clean):
    net = build("batchnorm")
    after = tuned(NFT(iterations=5), net, clean).state_dict()
    changed = {key for key, value in net.state_dict().items() if not torch.equal(after[key], value)}
    statistics = {f"{norm}.{name}" for norm in (1, 4) for name in ("running_mean", "running_var")}
    assert changed == {"1.weight", "4.weight", *statistics, "1.num_batches_tracked", "4.num_batches_tracked"}
    assert after["1.num_batches_tracked"] == net[1].num_batches_tracked + 5


@pytest.mark.parametrize("name", ["batchnorm", "plain", "groupnorm", "vit", "convnext", "shared", "tied"])
def test_bounds_of_every_layer(name, clean):
    net = build(name)
    after = tuned(NFT(iterations=20, lr=50, alpha=0.6, beta=0.3, penalty=0), net, clean)
    found = multipliers(net, after)
    for layer, values in enumerate(found, start=1):
        low = 0.6 * math.exp(-0.3 * layer)
        assert values.min() > low - 1e-4
        assert values.max() < 1 + 1e-4
    assert any((values < 0.9).any() for values in found)


def test_masks_stay_soft(clean):
    net = train(build("batchnorm"), clean, epochs=5)
    values = torch.cat(multipliers(net, tuned(NFT(iterations=40), net, clean)))
    assert ((values > 0.3) & (values < 0.999)).any()


def test_a_high_penalty_keeps_the_masks(clean):
    net = train(build("batchnorm"), clean, epochs=5)
    free, held = (
        1 - torch.cat(multipliers(net, tuned(NFT(iterations=40, penalty=penalty), net, clean))).mean()
        for penalty in (0, 10)
    )
    assert held < free / 2


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize("count", [4, 5, 9])
def test_few_images(name, count):
    net, clean = build(name), make_clean(count)
    after = tuned(NFT(iterations=3), net, clean)
    assert all(torch.isfinite(value).all() for value in after.state_dict().values())
    steps = [after.get_buffer(key) - value for key, value in net.named_buffers() if key.endswith("batches_tracked")]
    assert all(each == 3 for each in steps)


def test_one_image_per_class_keeps_the_accuracy(clean):
    net = train(build("batchnorm"), clean, epochs=30)
    repair = NFT(iterations=100).repair(net, make_clean(4), GIVEN)
    assert any("too few images to hold any out" in text for text in repair.record.warnings)
    assert correct(repair.model, clean).float().mean() > 0.9


@pytest.mark.parametrize("name", UNLIKE)
def test_divergence_ends_finite(name, clean):
    net = build(name)
    with torch.no_grad():
        for weight in net.parameters():
            weight *= 1e5
    after = tuned(NFT(iterations=4, lr=1e38), net, clean)
    assert all(torch.isfinite(value).all() for value in after.state_dict().values())


def test_nothing_to_mask(clean):
    with pytest.raises(ModelError, match="nothing to mask by neuron"):
        NFT().repair(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), clean, GIVEN)


@pytest.mark.parametrize(
    "fields",
    [
        {"iterations": 0},
        {"lr": 0},
        {"alpha": 1.1},
        {"beta": -1},
        {"penalty": -1},
        {"batch_size": 1},
        {"color": "red"},
    ],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^nft: `{next(iter(fields))}`"):
        NFT(**fields)
