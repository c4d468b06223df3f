"""Triggers that change the whole image in the same way: a perturbation, a warp, other colors.

Few numbers decide such a change, and several sets of them are optimized together on the images of one batch. While a
network learns to ignore them they go on climbing, so that it never learns to ignore just one.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.model import faster, mode
from untrojan.progress import stage

AT_ONCE = 8
BATCH = 64
STEPS = 20
OTHERS = 5
JUDGED = 128
SHIFT = 1 / 32
LEAST_SHIFT = 0.5
RECOLORED = 0.2
RATE = 0.3
CELLS = 4
_TINY = 1e-12


class Changes(ABC):
    """Some changes of one kind, and how they climb towards a label.

    Attributes:
        values: The numbers that decide each change: `(n, ...)`.
        reach: Share of the images that the last steps sent to the label, a moving average.

    Args:
        shape: Channels, height and width of the images.
        strengths: How far each change may go, in the unit of its kind: `(n,)`.
        generator: Decides where they begin.
    """

    name: ClassVar[str]

    def __init__(self, shape: tuple[int, int, int], strengths: Tensor, generator: torch.Generator) -> None:
        self.shape = shape
        self.generator = generator
        self.reach = 0.0
        self.values = torch.zeros(len(strengths), *self._numbers())
        self.strengths = strengths.view(-1, *[1] * (self.values.ndim - 1))
        self.begin(torch.ones(len(strengths), dtype=torch.bool))

    def begin(self, which: Tensor) -> None:
        """Begin anew with some of the changes, at random: bool `(n,)`."""
        drawn = torch.randn(self.values.shape, generator=self.generator)
        half = 0.5 * self.strengths * drawn / self._size(drawn).clamp(min=_TINY)
        self.values[which] = half[which]

    def put_on(self, images: Tensor, least: float = 1.0, most: float = 1.0) -> Tensor:
        """Change each image by one of the changes, drawn at random, to between `least` and `most` of its strength."""
        which = torch.randint(len(self.values), (len(images),), generator=self.generator)
        by = least + (most - least) * torch.rand(len(images), generator=self.generator)
        return self.changed(images, self.values[which] * by.view(-1, *[1] * (self.values.ndim - 1)))

    def share(self, model: nn.Module, images: Tensor, label: int) -> float:
        """Share of images `(N, C, H, W)` that the best of the changes sends to a label."""
        with mode(model, training=False), torch.no_grad():
            each = self.values.repeat_interleave(len(images), 0).split(len(images))
            sent = [model(self.changed(images, values)).argmax(1) == label for values in each]
        return max(float(hits.float().mean()) for hits in sent)

    def climb(self, model: nn.Module, images: Tensor, label: int) -> None:
        """Move every change one step towards sending its part of the images `(N, C, H, W)` to a label."""
        values = self.values.clone().requires_grad_()
        with mode(model, training=False):
            out = model(self.changed(images, values[torch.arange(len(images)) % len(values)]))
            loss = functional.cross_entropy(out, torch.full((len(images),), label))
            (slope,) = torch.autograd.grad(loss, values)
        self.values = self._within(self.values - RATE * self.strengths * slope / self._size(slope).clamp(min=_TINY))
        self.reach = 0.8 * self.reach + 0.2 * float((out.argmax(1) == label).float().mean())

    @abstractmethod
    def changed(self, images: Tensor, values: Tensor) -> Tensor:
        """Change each image `(N, C, H, W)` by its own numbers `(N, ...)`, and keep it in [0, 1]."""

    @abstractmethod
    def _numbers(self) -> tuple[int, ...]:
        """Shape of the numbers of one change."""

    @abstractmethod
    def _size(self, values: Tensor) -> Tensor:
        """How far each change goes, in a shape that broadcasts."""

    @abstractmethod
    def _within(self, values: Tensor) -> Tensor:
        """The nearest changes that go no further than their strengths."""


class Perturbations(Changes):
    """Add the same values to each image; the strength is the l2 norm of these, in units of the full pixel range."""

    name = "perturbation"

    def changed(self, images: Tensor, values: Tensor) -> Tensor:
        """Add to each image and clip."""
        return (images + values).clamp(0, 1)

    def _numbers(self) -> tuple[int, ...]:
        return self.shape

    def _size(self, values: Tensor) -> Tensor:
        return values.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def _within(self, values: Tensor) -> Tensor:
        return values * (self.strengths / self._size(values).clamp(min=_TINY)).clamp(max=1)


class Warps(Changes):
    """Shift pixels by a smooth field; the strength is the longest shift along one side, in pixels."""

    name = "warp"

    def changed(self, images: Tensor, values: Tensor) -> Tensor:
        """Sample each image bilinearly where its field says, which is given on a coarse grid."""
        height, width = images.shape[-2:]
        shifts = functional.interpolate(values, size=(height, width), mode="bicubic", align_corners=True)
        sides = [torch.linspace(-1, 1, side) for side in (width, height)]
        here = torch.stack(torch.meshgrid(*sides, indexing="xy"), -1)
        there = here + shifts.permute(0, 2, 3, 1) * 2 / torch.tensor([width - 1, height - 1]).clamp(min=1)
        return functional.grid_sample(images, there.clamp(-1, 1), align_corners=True)

    def _numbers(self) -> tuple[int, ...]:
        return (2, CELLS, CELLS)

    def _size(self, values: Tensor) -> Tensor:
        return _largest(values)

    def _within(self, values: Tensor) -> Tensor:
        return values.maximum(-self.strengths).minimum(self.strengths)


class Recolorings(Changes):
    """Mix the channels and shift them, everywhere alike; the strength is the largest coefficient."""

    name = "recoloring"

    def changed(self, images: Tensor, values: Tensor) -> Tensor:
        """Add a linear map of the channels of each pixel to it, and clip."""
        by = torch.einsum("nij,njhw->nihw", values[:, :, :-1], images) + values[:, :, -1, None, None]
        return (images + by).clamp(0, 1)

    def _numbers(self) -> tuple[int, ...]:
        return (self.shape[0], self.shape[0] + 1)

    def _size(self, values: Tensor) -> Tensor:
        return _largest(values)

    def _within(self, values: Tensor) -> Tensor:
        return values.maximum(-self.strengths).minimum(self.strengths)


def _largest(values: Tensor) -> Tensor:
    return values.flatten(1).abs().amax(1).view(-1, *[1] * (values.ndim - 1))


def of_each_kind(shape: tuple[int, int, int], norm: float, generator: torch.Generator) -> list[Changes]:
    """Some changes of each kind, half of which go half as far; `norm` is the largest l2 norm of a perturbation."""
    far = torch.cat([torch.full((AT_ONCE // 2,), 0.5), torch.ones(AT_ONCE // 2)])
    return [
        Perturbations(shape, norm * far, generator),
        Warps(shape, max(LEAST_SHIFT, SHIFT * min(shape[1:])) * far, generator),
        Recolorings(shape, RECOLORED * far, generator),
    ]


class Reached(NamedTuple):
    """Share of the images that the best change of a kind sends to a label, and the largest to any other label tried."""

    kind: str
    share: float
    elsewhere: float

    @property
    def further(self) -> float:
        """How much further the label is reached than the others."""
        return self.share - self.elsewhere


def compare(
    model: nn.Module, clean: CleanSet, label: int, norm: float, generator: torch.Generator, detail: str = ""
) -> list[Reached]:
    """See how far whole-image changes reach into a label, and into a few others.

    A change that sends as many images to some other label is no sign of a backdoor. One that sends many more does.

    Args:
        model: The network; it is not changed.
        clean: Images to search on, with at least one of another class.
        label: The label in question.
        norm: The largest l2 norm of a perturbation, in units of the full pixel range.
        generator: Decides everything random.
        detail: Which of several comparisons this is, for progress.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> images = CleanSet(torch.rand(30, 1, 8, 8), torch.arange(30) % 3)
        >>> [each.kind for each in compare(net, images, 1, 0.5, torch.Generator().manual_seed(0))]
        ['perturbation', 'warp', 'recoloring']
    """
    quick = faster(model, clean)
    present = clean.labels.unique()
    mixed = present[torch.randperm(len(present), generator=generator)].tolist()
    reachable = [other for other in mixed if other != label and bool((clean.labels != other).any())]
    labels = [label, *reachable[:OTHERS]]
    shares = []
    with stage("compare labels", total=len(labels), detail=detail) as advance:
        for each in labels:
            others = clean.take(clean.labels != each)
            changes = of_each_kind(clean.shape, norm, generator)
            for images, _ in others.draws(BATCH, STEPS, generator):
                for change in changes:
                    change.climb(quick, images, each)
            judged = others.take(torch.randperm(len(others), generator=generator)[:JUDGED]).floats()
            shares.append([change.share(quick, judged, each) for change in changes])
            advance()
    kinds = [change.name for change in of_each_kind(clean.shape, norm, generator)]
    elsewhere = [max(column) for column in zip(*shares[1:], strict=True)] or [0.0] * len(kinds)
    return [Reached(*row) for row in zip(kinds, shares[0], elsewhere, strict=True)]
