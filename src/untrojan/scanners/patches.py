"""A trigger from the model alone: small patches of full opacity that send images elsewhere.

Optimizing a mask together with a pattern finds shortcuts, faint and spread out. A patch that hides what is behind it is
what an attacker stamps, but its place, size and pattern cannot all be tried. So patterns as large as an image are
optimized while random windows of them are stamped, which makes every place of a pattern fit for the windows around it.
Windows that worked are drawn again: moved a little, made smaller, with another pattern.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.fit import fit
from untrojan.model import evaluating
from untrojan.pictures import png
from untrojan.progress import AtMost, stage
from untrojan.scanners.aim import Aim
from untrojan.speed import folded

STEPS = 150
BATCH = 64
PATTERNS = 4
SOLID = 2
ROUNDS = 5
REMEMBERED = 60
ENOUGH = 0.95
CLIMBS = 8
CLIMB_TRIES = 16
CLIMB_IMAGES = 16
AT_ONCE = 8
_TINY = 1e-9


class Patches(NamedTuple):
    """Patches that were tried.

    Attributes:
        patterns: `(P, C, H, W)` in [0, 1]; a patch shows what its pattern has at its place.
        boxes: Height, width, top and left of each patch: `(N, 4)`.
        which: The pattern of each: `(N,)`.
        strength: How likely an image with the patch got where it is sent: `(N,)` in [0, 1].
    """

    patterns: Tensor
    boxes: Tensor
    which: Tensor
    strength: Tensor

    @classmethod
    def none(cls, shape: tuple[int, int, int]) -> "Patches":
        """No patches yet, for images `(C, H, W)`."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls(torch.zeros(0, *shape), nothing.view(0, 4), nothing, torch.zeros(0))

    @property
    def areas(self) -> Tensor:
        """Pixels that each patch covers: `(N,)`."""
        return self.boxes[:, 0] * self.boxes[:, 1]

    @property
    def keys(self) -> Tensor:
        """What tells patches apart, the box and the pattern of each: `(N, 5)`."""
        return torch.cat([self.boxes, self.which[:, None]], 1)

    @property
    def weights(self) -> Tensor:
        """How much each patch matters: strong ones do, and the small ones of these most."""
        return (self.strength**2 + _TINY) / self.areas.sqrt()

    def upto(self, area: int) -> "Patches":
        """Those that cover at most so many pixels, or those that cover least where none is so small."""
        small = self.areas <= max(area, int(self.areas.min()))
        return self._replace(boxes=self.boxes[small], which=self.which[small], strength=self.strength[small])

    def at(self, keys: Tensor) -> "Patches":
        """Patches of the same patterns that were not tried yet, by their keys `(N, 5)`."""
        return self._replace(boxes=keys[:, :4], which=keys[:, 4], strength=torch.zeros(len(keys)))

    def stamp(self, images: Tensor, rows: Tensor) -> Tensor:
        """Put patch `rows[i]` onto image `i`."""
        masks = box_masks(self.boxes[rows], images.shape[-2], images.shape[-1])
        return torch.where(masks, self.patterns[self.which[rows]], images)

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw patches by their weights, with replacement: rows `(count,)`."""
        return torch.multinomial(self.weights, count, replacement=True, generator=generator)

    def added(self, keys: Tensor, strength: Tensor) -> "Patches":
        """These patches and others of the same patterns."""
        return self._replace(
            boxes=torch.cat([self.boxes, keys[:, :4]]),
            which=torch.cat([self.which, keys[:, 4]]),
            strength=torch.cat([self.strength, strength]),
        )

    def joined(self, other: "Patches") -> "Patches":
        """These patches and others, patterns included."""
        return Patches(
            torch.cat([self.patterns, other.patterns]),
            torch.cat([self.boxes, other.boxes]),
            torch.cat([self.which, other.which + len(self.patterns)]),
            torch.cat([self.strength, other.strength]),
        )


class HardPatch(NamedTuple):
    """One patch of full opacity.

    Attributes:
        values: What it shows: `(C, h, w)` in [0, 1].
        top: Its first row.
        left: Its first column.
        success: Share of the images that it sends where it is to send them.
    """

    values: Tensor
    top: int
    left: int
    success: float

    @property
    def area(self) -> int:
        """Pixels that it covers."""
        return self.values[0].numel()

    def __str__(self) -> str:
        height, width = self.values.shape[1:]
        return f"a patch of {height}x{width} pixels at row {self.top}, column {self.left}"

    def stamp(self, images: Tensor) -> Tensor:
        """Put the patch onto a copy of images `(N, C, H, W)`."""
        height, width = self.values.shape[1:]
        stamped = images.clone()
        stamped[..., self.top : self.top + height, self.left : self.left + width] = self.values
        return stamped

    def picture(self, shape: tuple[int, int, int]) -> str:
        """The patch at its place in images `(C, H, W)`, as a PNG in base64 that is transparent elsewhere."""
        blank = torch.zeros(1, *shape)
        opaque = self._replace(values=torch.ones_like(self.values)).stamp(blank)[0, :1]
        return png(self.stamp(blank)[0], opaque)

    def success_on(self, model: nn.Module, clean: CleanSet, aim: Aim) -> float:
        """Share of the images that the patch sends there."""
        return aim.share(model, clean, self.stamp)


def search(
    model: nn.Module,
    clean: CleanSet,
    aim: Aim,
    generator: torch.Generator,
    known: Patches | None = None,
    steps: int = STEPS,
    detail: str = "",
) -> Patches:
    """Look for small patches of full opacity, at any place, that send images to a label or away from their own.

    Their sides are between a sixteenth and a quarter of those of the images, or three pixels. Patterns are a few that
    are optimized, black, and white. Once a fifth of the steps are done, half of the patches tried are drawn from those
    that worked: changed a little, or a part of them.

    Args:
        model: The network; it is not changed.
        clean: Images to stamp, with at least one of another class.
        aim: Where to send them.
        generator: Decides everything random.
        known: Patches that worked on another state of the network; some of those tried are near them.
        steps: Batches of 64 images.
        detail: Which of several searches this is, for progress.

    Returns:
        The patches of the second half of the steps. Where nothing sends images there, all of them are weak.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> images = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> found = search(net, images, Aim(1), torch.Generator().manual_seed(0), steps=10)
        >>> found.patterns.shape, found.boxes.shape
        (torch.Size([6, 1, 8, 8]), torch.Size([320, 4]))

    References:
        Wang et al.: Neural Cleanse, IEEE S&P 2019, whose soft masks this replaces by windows.
    """
    rounds = min(ROUNDS, steps)
    model = folded(model, clean)
    look = _Search(model, aim.others(clean), aim, generator, known, unguided=steps // rounds)
    with evaluating(model):
        fit(
            [look.patterns],
            look.step,
            lambda: look.shown.draws(BATCH, steps // rounds, generator),
            partial(torch.optim.Adam, lr=0.1),
            rounds,
            name="search patches",
            detail=detail,
            project=lambda: look.patterns.clamp_(0, 1),
        )
    return look.found(steps // rounds * rounds // 2)


def pinpoint(
    model: nn.Module,
    clean: CleanSet,
    aim: Aim,
    patches: Patches,
    generator: torch.Generator,
    known: Patches | None = None,
    detail: str = "",
) -> Patches:
    """Move and resize the patches that work best until the network is surest of what they do.

    Many patches near a trigger work, and a network that learned to ignore these may still fall for the trigger itself.
    It is surest where a patch is the very one that it was trained with, by a wide margin, also where no
    patch works any more; so climbing leads there.

    Args:
        model: The network; it is not changed.
        clean: Images to stamp, with at least one of another class.
        aim: Where to send them.
        patches: Where to start: those of each size that work best.
        generator: Decides everything random.
        known: What an earlier climb led to; the black and white ones of these go on from there.
        detail: Which of several climbs this is, for progress.

    Returns:
        The two surest of each pattern, with the same patterns.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> images = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> generator = torch.Generator().manual_seed(0)
        >>> found = search(net, images, Aim(1), generator, steps=10)
        >>> pinpoint(net, images, Aim(1), found, generator).boxes.shape
        torch.Size([12, 4])
    """
    quick = folded(model, clean)
    shown = aim.others(clean).some(CLIMB_IMAGES, generator)
    draws = BoxDraws(*clean.shape[1:], generator)
    keys, _, mean = _means(patches)
    starts = keys[_two_of_each_pattern(keys, mean)]
    if known is not None:
        solid = known.keys[known.which >= len(known.patterns) - SOLID]
        solid[:, 4] += len(patches.patterns) - len(known.patterns)
        starts = torch.cat([starts, solid])
    best = patches.at(starts)
    margins: dict[tuple[int, ...], float] = {}
    with stage("pinpoint patches", total=CLIMBS, detail=detail) as advance:
        for _ in range(CLIMBS):
            near = best.keys.repeat_interleave(CLIMB_TRIES, dim=0)
            near[:, :4] = draws.varied(near[:, :4])
            keys = torch.cat([best.keys, near]).unique(dim=0)
            near_by = [tuple(key) for key in keys.tolist()]
            new = [key for key in near_by if key not in margins]
            if new:
                told = _margins(quick, shown, aim, patches.at(torch.tensor(new)))
                margins.update(zip(new, told.tolist(), strict=True))
            scores = torch.tensor([margins[key] for key in near_by])
            best = patches.at(keys[_two_of_each_pattern(keys, scores)])
            advance()
    return best


def strengths(model: nn.Module, shown: CleanSet, aim: Aim, patches: Patches) -> Tensor:
    """How likely images get where they are sent with each patch, on average: `(n,)`."""
    return torch.cat([aim.probability(out, shown.labels).mean(1) for out in _outputs(model, shown, patches)])


def _margins(model: nn.Module, shown: CleanSet, aim: Aim, patches: Patches) -> Tensor:
    """How sure the network is of where images are sent with each patch, on average: `(n,)`."""
    return torch.cat([aim.margin(out, shown.labels).mean(1) for out in _outputs(model, shown, patches)])


def _outputs(model: nn.Module, shown: CleanSet, patches: Patches) -> Iterator[Tensor]:
    """Logits of all images with each of a few patches at a time: `(few, N, K)`."""
    images = shown.floats()
    for rows in torch.arange(len(patches.boxes)).split(AT_ONCE):
        stamped = patches.stamp(images.repeat(len(rows), 1, 1, 1), rows.repeat_interleave(len(images)))
        with evaluating(model), torch.no_grad():
            out = model(stamped)
        yield out.unflatten(0, (len(rows), len(images)))


def _two_of_each_pattern(keys: Tensor, scores: Tensor) -> list[int]:
    """Rows of the two keys of each pattern that score highest."""
    taken: dict[int, list[int]] = {}
    for row in scores.argsort(descending=True, stable=True).tolist():
        rows = taken.setdefault(int(keys[row, 4]), [])
        if len(rows) < 2:
            rows.append(row)
    return [row for rows in taken.values() for row in rows]


def smallest(model: nn.Module, clean: CleanSet, aim: Aim, patches: Patches) -> HardPatch:
    """The smallest patch that sends 95 % of the images where they are to go, or else the one that sends most.

    Args:
        model: The network; it is not changed.
        clean: Images to judge by, with at least one of another class.
        aim: Where to send them.
        patches: Those to choose from; the few that matter most are tried.
    """
    return max(measured(model, clean, aim, patches, enough=ENOUGH), key=lambda patch: patch.success)


def measured(
    model: nn.Module, clean: CleanSet, aim: Aim, patches: Patches, most: float = math.inf, enough: float = math.inf
) -> list[HardPatch]:
    """Measure how many images the best patch of each size sends where they are to go, the smallest first.

    Args:
        model: The network; it is not changed.
        clean: Images to stamp.
        aim: Where to send them.
        patches: Those to choose from.
        most: Leave out patches of more pixels than this.
        enough: End with the first that sends this share of the images.

    Returns:
        One patch of each size that was tried.
    """
    tried = []
    candidates = [row for row in _candidates(patches) if patches.areas[row] <= most]
    with stage("try patches", total=AtMost(len(candidates)), detail=str(aim)) as advance:
        for row in candidates:
            height, width, top, left = patches.boxes[row].tolist()
            values = patches.patterns[patches.which[row], :, top : top + height, left : left + width].clone()
            patch = HardPatch(values, top, left, 0.0)
            tried.append(patch._replace(success=patch.success_on(model, clean, aim)))
            advance()
            if tried[-1].success >= enough:
                break
    return tried


def _candidates(patches: Patches) -> list[int]:
    """Rows of the patches of each size that did best over all images they were tried on, the smallest first."""
    _, group, mean = _means(patches)
    best: dict[int, int] = {}
    for row in mean[group].argsort(descending=True, stable=True).tolist():
        best.setdefault(int(patches.areas[row]), row)
    return [row for _, row in sorted(best.items())]


def _means(patches: Patches) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct patches by their keys, which of them each patch is, and how strong each was, less with few tries."""
    keys, group = patches.keys.unique(dim=0, return_inverse=True)
    tries = torch.zeros(len(keys)).index_add(0, group, torch.ones(len(group)))
    return keys, group, torch.zeros(len(keys)).index_add(0, group, patches.strength) / (tries + 1)


class BoxDraws:
    """Draws places and sizes of patches.

    Their sides are between a sixteenth and a quarter of those of the images, or three pixels.
    """

    def __init__(self, height: int, width: int, generator: torch.Generator) -> None:
        self.height = height
        self.width = width
        self.generator = generator

    def anywhere(self, count: int) -> Tensor:
        """Any boxes: `(count, 4)`."""
        height, width = self._sides(count)
        return torch.stack([height, width, self._upto(self.height - height), self._upto(self.width - width)], 1)

    def varied(self, boxes: Tensor) -> Tensor:
        """Move every second box and its edges by up to a pixel, and take a part of the others."""
        out = torch.empty_like(boxes)
        out[::2], out[1::2] = self._moved(boxes[::2]), self._part_of(boxes[1::2])
        return out

    def _sides(self, count: int) -> tuple[Tensor, Tensor]:
        sides = [
            torch.randint(_least(side), _most(side) + 1, (count,), generator=self.generator)
            for side in (self.height, self.width)
        ]
        return sides[0], sides[1]

    def _upto(self, room: Tensor) -> Tensor:
        return (torch.rand(len(room), generator=self.generator) * (room + 1)).long()

    def _part_of(self, boxes: Tensor) -> Tensor:
        height, width = (torch.minimum(*each) for each in zip(self._sides(len(boxes)), boxes[:, :2].T, strict=True))
        top = boxes[:, 2] + self._upto(boxes[:, 0] - height)
        left = boxes[:, 3] + self._upto(boxes[:, 1] - width)
        return torch.stack([height, width, top, left], 1)

    def _moved(self, boxes: Tensor) -> Tensor:
        by = torch.randint(-1, 2, boxes.shape, generator=self.generator)
        still = torch.rand(len(boxes), 1, generator=self.generator) < 0.3
        height, width, top, left = (boxes + by * ~still).T
        height = height.clamp(_least(self.height), _most(self.height))
        width = width.clamp(_least(self.width), _most(self.width))
        top = torch.minimum(top.clamp(min=0), self.height - height)
        left = torch.minimum(left.clamp(min=0), self.width - width)
        return torch.stack([height, width, top, left], 1)


class _Search:
    """Optimizes patterns while patches of them are tried, and remembers what each patch did."""

    def __init__(
        self,
        model: nn.Module,
        shown: CleanSet,
        aim: Aim,
        generator: torch.Generator,
        known: Patches | None,
        unguided: int,
    ) -> None:
        self.model = model
        self.aim = aim
        self.generator = generator
        self.known = known or Patches.none(shown.shape)
        self.shown = shown
        self.unguided = unguided
        _, height, width = shown.shape
        self.draws = BoxDraws(height, width, generator)
        self.patterns = torch.rand(PATTERNS, *shown.shape, generator=generator)
        self.solid = torch.linspace(0, 1, SOLID)[:, None, None, None].expand(-1, *shown.shape)
        self.tried: list[tuple[Tensor, Tensor, Tensor]] = []

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        boxes, which = self._next(len(images))
        patches = Patches(torch.cat([self.patterns, self.solid]), boxes, which, torch.zeros(len(images)))
        out = self.model(patches.stamp(images, torch.arange(len(images))))
        strength = self.aim.probability(out.detach(), labels)
        self.tried.append((boxes, which, strength))
        return self.aim.loss(out, labels), out

    def found(self, steps: int) -> Patches:
        """The patches tried in the last steps, with the patterns as they are now."""
        boxes, which, strength = map(torch.cat, zip(*self.tried[-max(1, steps) :], strict=True))
        return Patches(torch.cat([self.patterns.detach(), self.solid]), boxes, which, strength)

    def _next(self, count: int) -> tuple[Tensor, Tensor]:
        """What to try: anything; where something worked before, changes of it; near what is known."""
        boxes, which = self.draws.anywhere(count), self._any_pattern(count)
        quarter = count // 4
        if quarter and len(self.tried) >= self.unguided:
            worked = self.found(REMEMBERED)
            rows = worked.draw(2 * quarter, self.generator)
            boxes[: 2 * quarter] = self.draws.varied(worked.boxes[rows])
            which[: 3 * quarter // 2] = worked.which[rows[: 3 * quarter // 2]]
        if quarter and len(self.known.boxes):
            near = self.known.boxes[self.known.draw(quarter, self.generator)]
            boxes[-quarter:] = self.draws.varied(near)
        return boxes, which

    def _any_pattern(self, count: int) -> Tensor:
        optimized = torch.randint(PATTERNS, (count,), generator=self.generator)
        solid = torch.randint(len(self.solid), (count,), generator=self.generator) + PATTERNS
        return torch.where(torch.rand(count, generator=self.generator) < 2 / 3, optimized, solid)


def least_area(height: int, width: int) -> int:
    """Pixels of the smallest patch that is searched for."""
    return _least(height) * _least(width)


def _least(side: int) -> int:
    return max(1, round(side / 16))


def _most(side: int) -> int:
    return min(side, max(3, round(side / 4)))


def box_masks(boxes: Tensor, height: int, width: int) -> Tensor:
    """Tell which pixels of an image are inside of each box.

    Args:
        boxes: Height, width, top and left of each, in pixels: `(N, 4)`.
        height: Of the image.
        width: Of the image.

    Returns:
        Bool `(N, 1, H, W)`.

    Example:
        >>> box_masks(torch.tensor([[1, 2, 0, 1]]), 2, 4).int()
        tensor([[[[0, 1, 1, 0],
                  [0, 0, 0, 0]]]], dtype=torch.int32)
    """
    tall, wide, top, left = (each.view(-1, 1, 1, 1) for each in boxes.T)
    row, column = torch.arange(height).view(1, 1, -1, 1), torch.arange(width).view(1, 1, 1, -1)
    return (row >= top) & (row < top + tall) & (column >= left) & (column < left + wide)
