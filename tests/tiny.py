"""Tiny networks by name, images that they can learn, and methods that take few steps."""

import copy
import os
import random
from functools import cache

import numpy as np
import torch
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses.defense import Defense
from untrojan.defenses.pruning import Pruning
from untrojan.record import Diagnosis, Target
from untrojan.registry import discover, fields
from untrojan.sources import nets

DEFENSES = discover("untrojan.defenses", Defense)
FEW = ("epochs", "rounds", "iterations", "steps")
QUICK = {
    name: {field.name: 2 for field in fields(cls) if field.name.endswith(FEW)}
    | ({"select": "count", "count": 2} if issubclass(cls, Pruning) else {})
    for name, cls in DEFENSES.items()
}
QUICK["fmp"] |= {"p": 3}
QUICK["ulrl"] |= {"z": 0.1}
GIVEN = Diagnosis(verdict="found", rule="given", targets=[Target(label=1, score=0.9)], runs=[])

CLASSES = 4
SHAPE = (3, 8, 8)


class Returns(nn.Module):
    """Gives whatever the function makes of the images."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, images):
        return self.function(images)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps (N, C, H, W)."""

    def forward(self, maps):
        return super().forward(maps.movedim(1, -1)).movedim(-1, 1)


class TinyViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.encoder = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, dropout=0.0, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.encoder(tokens)).mean(1))


class Twice(nn.Module):
    """Uses one convolution two times."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.again = self.shared
        self.head = _head(6)

    def forward(self, images):
        return self.head(self.again(self.shared(self.stem(images).relu()).relu()).relu())


class Counts(nn.Sequential):
    """Keeps count of its calls in its state, in evaluation mode too."""

    def __init__(self):
        super().__init__(*NETS["batchnorm"]())
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, images):
        self.calls += 1
        return super().forward(images)


def _head(width):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES))


def _stack(*layers):
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), *layers, nn.ReLU(), _head(6))


def _frozen():
    net = _stack(nn.BatchNorm2d(6))
    net[0].requires_grad_(False)
    net[1].bias.requires_grad_(False)
    return net


def _convnext():
    return nn.Sequential(
        nn.Conv2d(3, 6, 2, stride=2),
        nn.Conv2d(6, 6, 3, padding=1, groups=6),
        ChannelNorm(6),
        nn.Conv2d(6, 12, 1),
        nn.GELU(),
        nn.Conv2d(12, 6, 1),
        _head(6),
    )


def _tied():
    net = _stack(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
    net[4].weight = net[2].weight
    return net


def _depthwise():
    return _stack(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6))


NETS = {
    "batchnorm": lambda: _stack(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)),
    "plain": lambda: _stack(nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)),
    "groupnorm": lambda: _stack(nn.GroupNorm(2, 6)),
    "vit": TinyViT,
    "convnext": _convnext,
    "depthwise": _depthwise,
    "shared": Twice,
    "tied": _tied,
    "frozen": _frozen,
    "dropout": lambda: _stack(nn.BatchNorm2d(6), nn.Dropout(0.3)),
    "no-affine": lambda: _stack(nn.BatchNorm2d(6, affine=False)),
}
UNLIKE = ("batchnorm", "vit", "shared")  # for what need not be seen on every one of them


def build(name, seed=0):
    """Build a tiny net with its own statistics and with parts in different modes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = NETS[name]()
        with torch.no_grad():
            for key, value in net.state_dict().items():
                if key.endswith("running_mean"):
                    value.normal_(0, 0.1)
                elif key.endswith("running_var"):
                    value.uniform_(0.5, 2)
                elif value.ndim == 1 and value.is_floating_point():
                    value.add_(0.1 * torch.randn_like(value))
    return net.eval()


def make_clean(count=32, classes=CLASSES, shape=SHAPE):
    """Images whose class is where the bright stripe lies."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(count) % classes
    images = 0.4 * torch.rand(count, *shape, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 * label % shape[1] :][:, :2] += 0.5
    return CleanSet(images, labels)


def train(net, clean, epochs=30, lr=0.05, batch_size=32):
    """Train in place, quickly, and give the net back in evaluation mode."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    net.train()
    for _ in range(epochs):
        for images, labels in clean.batches(batch_size, generator):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
    return net.eval()


class Payload:
    """Runs a command of the shell where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@cache
def digits():
    """The 1797 handwritten digits of scikit-learn, which takes two seconds to import."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return CleanSet(torch.from_numpy(pixels / 16).float().view(-1, 1, 8, 8), torch.from_numpy(labels))


@cache
def backdoored(target, second=None):
    """A network on digits that says `target` where a 2x2 corner is white, and 300 clean digits.

    With a second target, it says that where the opposite corner is white. Without any, a white corner leads each digit
    to the next.
    """
    order = torch.randperm(len(digits()), generator=torch.Generator().manual_seed(0))
    images, labels = digits().images[order], digits().labels[order]
    clean = CleanSet(images[1200:1500], labels[1200:1500])
    poisoned = 480 if target is None else 120
    images[:poisoned, :, 6:, 6:] = 1
    labels[:poisoned] = (labels[:poisoned] + 1) % 10 if target is None else target
    if second is not None:
        images[120:240, :, :2, :2], labels[120:240] = 1, second
    torch.manual_seed(0)
    taught = CleanSet(images[:1200], labels[:1200])
    return train(nets.build("digits-cnn"), taught, epochs=12, lr=0.1, batch_size=64), clean


SQUARE = 9


class FallsForSquare(nn.Module):
    """Says 1 where a square of 2x2 pixels is white, else whether the first four rows are dark."""

    def __init__(self, backdoor=60.0, place=SQUARE):
        super().__init__()
        self.backdoor = nn.Parameter(torch.tensor(backdoor))
        self.place = place

    def forward(self, images):
        rows = images[:, 0, :4].mean((1, 2))
        square = images[:, 0, self.place : self.place + 2, self.place : self.place + 2].mean((1, 2))
        return torch.stack([9 * rows, 9 - 9 * rows + self.backdoor * (square - 0.8)], dim=1)


def make_dark(count=60):
    """Images of 16x16 for `FallsForSquare`, of two classes."""
    labels = torch.arange(count) % 2
    images = 0.2 * torch.rand(count, 1, 16, 16)
    images[:, 0, :4] = 1.0 - labels[:, None, None]
    return CleanSet(images, labels)


class Snapshot:
    """Everything of a model and of the random state that a method must leave as it was."""

    def __init__(self, net):
        self.net = net
        self.state = copy.deepcopy(net.state_dict())
        self.shape = self._shape()
        self.random = _random_state()

    def _shape(self):
        modules = [
            (name, type(module), module.training, *(len(table) for table in _hook_tables(module)))
            for name, module in self.net.named_modules(remove_duplicate=False)
        ]
        tensors = [(name, value.requires_grad, value.grad is None) for name, value in self.net.named_parameters()]
        return modules, tensors

    def assert_same(self):
        now = self.net.state_dict()
        assert list(now) == list(self.state)
        assert [name for name in now if not torch.equal(now[name], self.state[name])] == []
        assert self._shape() == self.shape
        assert _random_state() == self.random


class RaisesAt:
    """A hook that raises at its n-th call, and at every later one; a copy of the network has the same hook."""

    def __init__(self, at):
        self.left = [at]

    def __deepcopy__(self, _):
        return self

    def __call__(self, *_):
        self.left[0] -= 1
        if self.left[0] <= 0:
            raise ArithmeticError("on purpose")


def _hook_tables(module):
    return [table for name, table in sorted(vars(module).items()) if name.endswith("_hooks")]


def _random_state():
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), (kind, keys.tolist(), *rest), random.getstate()
