"""Triggers that change the whole image in the same way: a perturbation, a warp, other colors.

Few numbers decide such a change, and several sets of them are optimized together on the images of one batch. While a
network learns to ignore them they go on climbing, so that it never learns to ignore just one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.model import evaluating
from untrojan.pictures import png
from untrojan.progress import stage
from untrojan.record import ChangeKind, Comparison
from untrojan.scanners.aim import Aim
from untrojan.scanners.inversion import Perturbation
from untrojan.speed import folded

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
    """Some changes of one kind, and how they climb.

    Attributes:
        values: The numbers that decide each change: `(n, ...)`.

    Args:
        shape: Channels, height and width of the images.
        strengths: How far each change may go, in the unit of its kind: `(n,)`.
        generator: Decides where they begin.
    """

    name: ClassVar[ChangeKind]

    def __init__(self, shape: tuple[int, int, int], strengths: Tensor, generator: torch.Generator) -> None:
        self.shape = shape
        self.generator = generator
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

    def best(self, model: nn.Module, shown: CleanSet, aim: Aim) -> tuple[Tensor, float]:
        """The change that sends most of the images where they are to go, `(1, ...)`, and the share of them."""
        images = shown.floats()
        with evaluating(model), torch.no_grad():
            each = self.values.repeat_interleave(len(images), 0).split(len(images))
            sent = [aim.sent(model(self.changed(images, values)), shown.labels) for values in each]
        shares = torch.stack([hits.float().mean() for hits in sent])
        first = int(shares.argmax())
        return self.values[first : first + 1], float(shares[first])

    def climb(self, model: nn.Module, images: Tensor, labels: Tensor, aim: Aim) -> None:
        """Move every change one step towards sending its part of the images `(N, C, H, W)` where they are to go."""
        values = self.values.clone().requires_grad_()
        with evaluating(model):
            out = model(self.changed(images, values[torch.arange(len(images)) % len(values)]))
            (slope,) = torch.autograd.grad(aim.loss(out, labels), values)
        slope = slope.nan_to_num(0, 0, 0)
        self.values = self._within(self.values - RATE * self.strengths * slope / self._size(slope).clamp(min=_TINY))

    @abstractmethod
    def changed(self, images: Tensor, values: Tensor) -> Tensor:
        """Change each image `(N, C, H, W)` by its own numbers `(N, ...)`, and keep it in [0, 1]."""

    @abstractmethod
    def told(self, values: Tensor) -> str:
        """One change `(1, ...)` in words."""

    @abstractmethod
    def picture(self, values: Tensor) -> Tensor:
        """What one change `(1, ...)` does, as an image `(C, H, W)`."""

    @abstractmethod
    def _numbers(self) -> tuple[int, ...]:
        """Shape of the numbers of one change."""

    def _size(self, values: Tensor) -> Tensor:
        """How far each change goes, in a shape that broadcasts: its largest number."""
        return values.flatten(1).abs().amax(1).view(-1, *[1] * (values.ndim - 1))

    def _within(self, values: Tensor) -> Tensor:
        """The nearest changes that go no further than their strengths."""
        return values.maximum(-self.strengths).minimum(self.strengths)


class Perturbations(Changes):
    """Add the same values to each image; the strength is the l2 norm of these, in units of the full pixel range."""

    name = "perturbation"

    def changed(self, images: Tensor, values: Tensor) -> Tensor:
        """Add to each image and clip."""
        return (images + values).clamp(0, 1)

    def told(self, values: Tensor) -> str:
        """Say its norm."""
        return str(_alone(values))

    def picture(self, values: Tensor) -> Tensor:
        """Amplified to the full range around gray."""
        return _alone(values).amplified

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

    def told(self, values: Tensor) -> str:
        """Say how far it shifts."""
        return f"a warp by up to {float(values.abs().max()):.2g} pixels"

    def picture(self, values: Tensor) -> Tensor:
        """A chessboard, warped."""
        return self.changed(_chessboard(self.shape), values)[0]

    def _numbers(self) -> tuple[int, ...]:
        return (2, CELLS, CELLS)


class Recolorings(Changes):
    """Mix the channels and shift them, everywhere alike; the strength is the largest coefficient."""

    name = "recoloring"

    def changed(self, images: Tensor, values: Tensor) -> Tensor:
        """Add a linear map of the channels of each pixel to it, and clip."""
        by = torch.einsum("nij,njhw->nihw", values[:, :, :-1], images) + values[:, :, -1, None, None]
        return (images + by).clamp(0, 1)

    def told(self, values: Tensor) -> str:
        """Say how far it shifts and mixes."""
        return f"a recoloring that shifts and mixes channels by up to {float(values.abs().max()):.2g}"

    def picture(self, values: Tensor) -> Tensor:
        """Ramps from black to each channel alone and to white, one below the other, recolored."""
        return self.changed(_ramps(self.shape), values)[0]

    def _numbers(self) -> tuple[int, ...]:
        return (self.shape[0], self.shape[0] + 1)


def of_each_kind(shape: tuple[int, int, int], norm: float, generator: torch.Generator) -> list[Changes]:
    """Some changes of each kind, half of which go half as far; `norm` is the largest l2 norm of a perturbation."""
    far = torch.cat([torch.full((AT_ONCE // 2,), 0.5), torch.ones(AT_ONCE // 2)])
    return [
        Perturbations(shape, norm * far, generator),
        Warps(shape, max(LEAST_SHIFT, SHIFT * min(shape[1:])) * far, generator),
        Recolorings(shape, RECOLORED * far, generator),
    ]


class Change(NamedTuple):
    """The change of one kind that sends most images to a label, and how that compares with other labels."""

    comparison: Comparison
    kind: Changes
    values: Tensor

    def __str__(self) -> str:
        return self.kind.told(self.values)

    def add(self, images: Tensor) -> Tensor:
        """Change images `(N, C, H, W)`."""
        return self.kind.changed(images, self.values.expand(len(images), *self.values.shape[1:]))

    def picture(self) -> str:
        """What it does, as a PNG in base64."""
        return png(self.kind.picture(self.values))


def with_others(first: Iterable[int], clean: CleanSet, generator: torch.Generator) -> list[int]:
    """Labels to compare: the first ones, and others drawn at random up to six in all."""
    labels = list(dict.fromkeys(first))
    present = clean.labels.unique()
    mixed = present[torch.randperm(len(present), generator=generator)].tolist()
    others = [label for label in mixed if label not in labels and bool((clean.labels != label).any())]
    return labels + others[: max(0, 1 + OTHERS - len(labels))]


def compare(
    model: nn.Module,
    shown: CleanSet,
    held: CleanSet,
    labels: Sequence[int],
    norm: float,
    generator: torch.Generator,
    detail: str = "",
) -> list[Change]:
    """See how far whole-image changes reach into labels, and whether into one of them further than into the others.

    A change that sends as many images to some other label is no sign of a backdoor. One that sends many more does.

    Args:
        model: The network; it is not changed.
        shown: Images to search on, for each label with at least one of another class.
        held: Images to judge by, likewise; they may be the same.
        labels: Those to compare.
        norm: The largest l2 norm of a perturbation, in units of the full pixel range.
        generator: Decides everything random.
        detail: Which of several comparisons this is, for progress.

    Returns:
        For each label the best change of each kind.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> images = CleanSet(torch.rand(30, 1, 8, 8), torch.arange(30) % 3)
        >>> found = compare(net, images, images, [1, 2], 0.5, torch.Generator().manual_seed(0))
        >>> [each.comparison.kind for each in found if each.comparison.label == 1]
        ['perturbation', 'warp', 'recoloring']
    """
    quick = folded(model, shown)
    best: list[tuple[int, Changes, Tensor]] = []
    shares: dict[tuple[str, int], float] = {}
    with stage("compare labels", total=len(labels), detail=detail) as advance:
        for label in labels:
            aim = Aim(label)
            changes = of_each_kind(shown.shape, norm, generator)
            for images, own in aim.others(shown).draws(BATCH, STEPS, generator):
                for change in changes:
                    change.climb(quick, images, own, aim)
            some = aim.others(held).some(JUDGED, generator)
            for change in changes:
                values, shares[change.name, label] = change.best(quick, some, aim)
                best.append((label, change, values))
            advance()

    def compared(kind: ChangeKind, label: int) -> Comparison:
        elsewhere = max((shares[kind, other] for other in labels if other != label), default=0.0)
        return Comparison(label=label, kind=kind, share=shares[kind, label], elsewhere=elsewhere)

    return [Change(compared(change.name, label), change, values) for label, change, values in best]


def against_others(
    model: nn.Module, clean: CleanSet, label: int, norm: float, generator: torch.Generator, detail: str = ""
) -> list[Comparison]:
    """Compare one label with others drawn at random, by the images that are searched on.

    Args:
        model: The network; it is not changed.
        clean: Images with at least one of another class.
        label: The label in question.
        norm: The largest l2 norm of a perturbation, in units of the full pixel range.
        generator: Decides everything random.
        detail: Which of several comparisons this is, for progress.

    Returns:
        How far each kind of change reaches into the label.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> images = CleanSet(torch.rand(30, 1, 8, 8), torch.arange(30) % 3)
        >>> found = against_others(net, images, 1, 0.5, torch.Generator().manual_seed(0))
        >>> [each.kind for each in found]
        ['perturbation', 'warp', 'recoloring']
    """
    labels = with_others([label], clean, generator)
    changes = compare(model, clean, clean, labels, norm, generator, detail)
    return [each.comparison for each in changes if each.comparison.label == label]


def _alone(values: Tensor) -> Perturbation:
    return Perturbation(values[0], float(values.norm()))


def _chessboard(shape: tuple[int, int, int]) -> Tensor:
    """Squares of a sixteenth of the shorter side or a pixel: `(1, C, H, W)`."""
    side = max(1, min(shape[1:]) // 16)
    rows, columns = (torch.arange(length) // side for length in shape[1:])
    return ((rows[:, None] + columns) % 2).float().expand(1, *shape)


def _ramps(shape: tuple[int, int, int]) -> Tensor:
    """From black on the left to each channel alone and, in the last rows, to white on the right: `(1, C, H, W)`."""
    channels, height, width = shape
    bands = torch.cat([torch.eye(channels), torch.ones(1, channels)])
    rows = (torch.arange(height) * len(bands) // height).clamp(max=len(bands) - 1)
    return (bands[rows].T[:, :, None] * torch.linspace(0, 1, width))[None]
