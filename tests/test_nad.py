"""NAD beyond the contract of every method."""

import copy

import pytest
import torch
from tiny import CLASSES, UNLIKE, backdoored, build, make_clean
from torch import nn

from untrojan.augmentation import crop_flip
from untrojan.defenses.nad import NAD
from untrojan.errors import ConfigError, ModelError, UnreliableWarning
from untrojan.record import Diagnosis, Target
from untrojan.sources import nets

pytestmark = [pytest.mark.filterwarnings("ignore::untrojan.UntrojanWarning"), pytest.mark.usefixtures("no_checks")]

GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])


def tune(method, net, clean, seed=0):
    torch.manual_seed(seed)
    return method.tune(copy.deepcopy(net), clean, clean, GIVEN, seed)


def close(one, other, atol=1e-5):
    return all(torch.allclose(value, other[name], atol=atol) for name, value in one.items())


class Counter:
    """A hook that counts the images through a network and its copies."""

    def __init__(self):
        self.images = 0

    def __deepcopy__(self, _):
        return self

    def __call__(self, _, inputs, __):
        self.images += len(inputs[0])


def by_hand(net, clean, augment, batch_size, teacher_epochs, epochs, betas):
    """The method for a network whose convolutions are 0, 3 and 6, with the teacher run anew for every batch."""

    def forward(model, images):
        maps = []
        for number, layer in enumerate(model):
            images = layer(images)
            if number in (0, 3, 6):
                maps.append(images)
        return images, maps

    def attention(maps):
        energy = torch.stack([(image.abs() ** 2).sum(0) / len(image) for image in maps]).reshape(len(maps), -1)
        return energy / (energy**2).sum(1, keepdim=True).sqrt()

    def train(model, epochs, loss):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
        generator = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            optimizer.param_groups[0]["lr"] = 0.1 if epoch < 2 else 0.01
            for images, labels in clean.batches(batch_size, generator, augment):
                optimizer.zero_grad()
                loss(images, labels).backward()
                optimizer.step()

    teacher, student = copy.deepcopy(net).train(), copy.deepcopy(net).train()
    train(teacher, teacher_epochs, lambda images, labels: nn.functional.cross_entropy(teacher(images), labels))
    teacher.eval()

    def distance(images, labels):
        out, maps = forward(student, images)
        with torch.no_grad():
            _, goals = forward(teacher, images)
        loss = nn.functional.cross_entropy(out, labels)
        for beta, mine, theirs in zip(betas, maps, goals, strict=True):
            loss = loss + beta * ((attention(mine) - attention(theirs)) ** 2).mean()
        return loss

    train(student, epochs, distance)
    return student


def three_convolutions():
    torch.manual_seed(5)
    body = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]
    return nn.Sequential(*body, nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(16, CLASSES))


@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_written_out(clean, augment):
    net = three_convolutions()
    method = NAD(augment=augment, batch_size=8, teacher_epochs=4, epochs=4, beta1=3, beta2=5, beta3=7)
    expected = by_hand(net, clean, crop_flip if augment == "crop-flip" else None, 8, 4, 4, (3, 5, 7))
    assert close(tune(method, net, clean).state_dict(), expected.state_dict(), atol=1e-4)


def test_without_attention_it_is_training(clean):
    """The student then goes the way of the teacher."""
    net = three_convolutions()
    method = NAD(teacher_epochs=1, epochs=3, beta1=0, beta2=0, beta3=0)
    assert close(
        tune(method, net, clean).state_dict(), by_hand(net, clean, None, 8, 1, 3, (0, 0, 0)).state_dict(), 1e-4
    )


def test_attention_comes_closer_to_that_of_the_teacher():
    net, clean = backdoored(7)
    clean = clean.take(range(100))
    teacher = copy.deepcopy(net).eval()
    layers = NAD()._stages(teacher, clean)

    def distance(**betas):
        student = build_like(net)
        torch.manual_seed(0)
        NAD(lr=0.005, epochs=3, **betas)._distill(teacher, student.train(), clean, 0)
        one, other = (NAD()._maps_of_all(model, clean, layers) for model in (student.eval(), teacher))
        return float(sum((one[name] - other[name]).pow(2).mean() for name in layers))

    assert distance() < 0.5 * distance(beta1=0, beta2=0, beta3=0)


def build_like(net):
    """The network with other weights."""
    torch.manual_seed(7)
    other = copy.deepcopy(net)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(0.3 * value.abs().mean() * torch.randn_like(value))
    return other


STAGES = {
    "batchnorm": ["0", "3"],
    "plain": ["0", "2"],
    "groupnorm": ["0"],
    "convnext": ["1", "3", "5"],
    "shared": ["stem", "shared"],
    "tied": ["0", "2"],
}


@pytest.mark.parametrize("name", STAGES)
def test_stages_of_tiny_networks(name, clean):
    found = NAD()._stages(build(name), clean)
    assert list(found)[-1] == STAGES[name][-1]
    assert set(found) <= set(STAGES[name])
    assert list(found.values())[-1] == 1000


@pytest.mark.parametrize(
    ("net", "layers"),
    [
        ("small-vgg", ["features.3", "features.11", "features.19"]),
        ("wrn-16-1", ["block1.layer.1.conv2", "block2.layer.1.conv2", "block3.layer.1.conv2"]),
    ],
)
def test_stages_of_published_networks(net, layers):
    """Where the published code has its three groups."""
    network = nets.build(net).eval()
    assert NAD()._stages(network, make_clean(shape=(3, 32, 32))) == dict(zip(layers, (500, 1000, 1000), strict=True))


def test_tokens_give_one_value_each(clean):
    net, method = build("vit"), NAD()
    layers = method._stages(net, clean)
    for maps in method._see(net, clean.floats(), layers).values():
        assert maps.shape == (len(clean), 4)
        assert torch.allclose(maps.norm(dim=1), torch.ones(len(clean)))
    tokens = torch.rand(2, 4, 16)
    linear = nn.Sequential(nn.Linear(8, 16))
    expected = tokens.pow(2).mean(2)
    assert torch.allclose(
        method._attention(linear, "0", tokens), expected / expected.norm(dim=1, keepdim=True), atol=1e-6
    )


def test_a_higher_power_counts_the_peaks():
    output = torch.tensor([[[[1.0, 2.0]]]])
    conv = nn.Sequential(nn.Conv2d(1, 1, 1))
    ratios = [NAD(p=p)._attention(conv, "0", output)[0] for p in (1, 2, 4)]
    assert [round(float(map_[1] / map_[0])) for map_ in ratios] == [2, 4, 16]


@pytest.mark.parametrize(("augment", "teacher"), [("none", 1), ("crop-flip", 3)])
def test_images_through_the_network(clean, augment, teacher):
    net, counter = build("batchnorm"), Counter()
    net.register_forward_hook(counter)
    tune(NAD(augment=augment, teacher_epochs=2, epochs=3), net, clean)
    assert counter.images == (2 + 3 + teacher) * len(clean) + 2


class Changes(nn.Module):
    """Changes what its layers give, in place or not."""

    def __init__(self, in_place):
        super().__init__()
        self.body = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU(in_place)
        self.late = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(192, CLASSES)
        self.in_place = in_place

    def forward(self, images):
        images = self.act(self.body(images))
        out = self.late(images)
        if self.in_place:
            out += images
        else:
            out = out + images
        return self.head(out.flatten(1))


def test_attention_is_read_before_anything_changes_it_in_place(clean):
    torch.manual_seed(5)
    net, same = Changes(False), Changes(True)
    same.load_state_dict(net.state_dict())
    method = NAD(teacher_epochs=2, epochs=2)
    one, other = (tune(method, each, clean).state_dict() for each in (net, same))
    assert close(one, other, atol=1e-6)
    assert not close(one, net.state_dict(), atol=1e-3)


class Skips(nn.Module):
    """Skips layers at random in training."""

    def __init__(self, share):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(192, CLASSES)
        self.share = share

    def forward(self, images):
        for layer in self.layers:
            if not self.training or torch.rand(()) >= self.share:
                images = images + layer(images).relu()
        return self.head(images.flatten(1))


@pytest.mark.parametrize(("share", "attended"), [(0.5, True), (1.0, False)])
def test_a_layer_counts_in_the_batches_that_it_is_not_skipped_in(share, attended, clean):
    torch.manual_seed(5)
    net = Skips(share)
    with_maps, without = (
        tune(NAD(teacher_epochs=1, epochs=3, batch_size=8, **betas), net, clean).state_dict()
        for betas in ({}, {"beta1": 0, "beta2": 0, "beta3": 0})
    )
    assert close(with_maps, without, atol=0) != attended


def test_networks_without_maps():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    with pytest.raises(ModelError, match="NAD compares attention maps, and no layer of the network has an output"):
        NAD(teacher_epochs=1).repair(net, make_clean(), GIVEN)


@pytest.mark.parametrize("name", UNLIKE)
@pytest.mark.parametrize(("count", "batch_size"), [(4, 64), (9, 8), (7, 2)])
def test_few_images(name, count, batch_size):
    net = build(name)
    after = tune(NAD(batch_size=batch_size, teacher_epochs=1, epochs=1), net, make_clean(count))
    assert any(not torch.equal(value, net.state_dict()[key]) for key, value in after.named_parameters())


@pytest.mark.parametrize("name", ["batchnorm", "vit"])
def test_divergence_leaves_numbers(name, clean):
    with pytest.warns(UnreliableWarning, match="NaN or infinity"):
        after = tune(NAD(lr=1e30, teacher_epochs=2, epochs=2), build(name), clean)
    assert all(value.isfinite().all() for value in after.state_dict().values())


@pytest.mark.parametrize(
    "fields",
    [{"lr": 0}, {"teacher_epochs": 0}, {"epochs": 0}, {"beta2": -1}, {"p": 0.5}, {"weight_decay": -1}, {"betas": 1}],
)
def test_fields_out_of_range(fields):
    with pytest.raises(ConfigError, match=f"^nad: `{next(iter(fields))}`"):
        NAD(**fields)
