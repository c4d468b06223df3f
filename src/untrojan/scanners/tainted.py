"""Clean images that are none: those that carry a trigger of the suspected label.

Whoever poisons a training set may have got at the clean images too. To a repair such an image teaches the backdoor, and
as a test of what the repair cost it counts as a loss what should be lost.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.model import correct, logits
from untrojan.record import Diagnosis
from untrojan.speed import folded

DRAWS = 16
AT_ONCE = 256
DECIDES = 0.9
NEARLY = 0.8
JUDGED = 64
HARMLESS = 0.02
CHANCE = 0.05
_TRIES = 4


class Window(NamedTuple):
    """Rows and columns of an image."""

    rows: slice
    columns: slice


def tainted(model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Tensor:
    """Tell which clean images have a suspected label because of something that decides by itself.

    A quarter of each image, at nine places, is laid over images of other classes. A quarter of an object decides
    little, one that holds a trigger takes its label along. Places at which images of other classes take theirs along
    as well, or nearly so, are not used. A trigger needs no form for that, but to fit into a quarter, or to work by what
    of it does.

    Args:
        model: The network; it is not changed.
        clean: The images in doubt, with their labels.
        diagnosis: What a scan of the same network found.
        seed: Decides what is laid over what.

    Returns:
        Bool `(n,)`; no image of a class is told where all that have it would be, nor a single one or up to a twentieth
        of them, which may be chance, nor any of two classes only, of which the one could not be judged by the other.
        Where the backdoor is all-to-all no label is suspected, and no image is told.

    Example:
        >>> from untrojan.record import Target
        >>> class Corner(nn.Module):
        ...     def forward(self, images):
        ...         backdoor = 99 * (images[:, :, :1, :1].flatten(1) - 0.9).clamp(min=0) * torch.tensor([0, 1.0, 0])
        ...         return images[:, 0, 2:5].mean(2) + backdoor
        >>> images = torch.zeros(9, 1, 8, 8)
        >>> images[torch.arange(9), :, 2 + torch.arange(9) % 3] = 1
        >>> images[[6, 8], :, 0, 0] = 1
        >>> clean = CleanSet(images, torch.tensor([0, 1, 2, 0, 1, 2, 1, 1, 1]))
        >>> found = Diagnosis(verdict="found", rule="", targets=[Target(label=1, score=2)], runs=[])
        >>> tainted(Corner(), clean, found, seed=0).nonzero().flatten()
        tensor([6, 8])
    """
    doubtful = torch.zeros(len(clean), dtype=torch.bool)
    if not len(clean) or not diagnosis.suspects:
        return doubtful
    generator = new_generator(seed)
    right, quick = correct(model, clean), folded(model, clean)
    for label in diagnosis.suspects:
        of_label = clean.labels == label
        own, others = right & of_label, right & ~of_label
        if not own.any() or len(clean.labels[others].unique()) < 2:
            continue
        hosts = clean.take(others)
        judges = hosts.some(JUDGED, generator)
        decided = torch.zeros(len(clean), dtype=torch.bool)
        for window in _quarters(*clean.shape[1:]):
            told = _taken_along(quick, clean.take(own), hosts, window, generator) >= DECIDES
            if told.any():
                naturally = _taken_along(quick, judges, hosts, window, generator) >= NEARLY
                decided[own] |= told & (naturally.float().mean() <= HARMLESS)
        if max(1, CHANCE * int(own.sum())) < int(decided.sum()) < int(of_label.sum()):
            doubtful |= decided
    return doubtful


def _quarters(height: int, width: int) -> list[Window]:
    """Windows of half the height and half the width, each overlapping its neighbors by half."""
    rows, columns = (
        [slice(start, start + (side + 1) // 2) for start in (0, side // 4, side // 2)] for side in (height, width)
    )
    return [Window(*each) for each in product(rows, columns)]


def _taken_along(
    model: nn.Module, images: CleanSet, hosts: CleanSet, window: Window, generator: torch.Generator
) -> Tensor:
    """How often a window of each image takes its label along to images of other classes: `(n,)` in [0, 1]."""
    hits, tries = (torch.zeros(len(images)) for _ in range(2))
    every = torch.randint(len(hosts), (DRAWS, _TRIES, len(images)), generator=generator)
    for drawn in every.split(max(1, AT_ONCE // len(images))):
        other = hosts.labels[drawn] != images.labels
        drawn = drawn.gather(1, other.int().argmax(1, keepdim=True))[:, 0]
        laid = hosts.images[drawn]
        laid[..., window.rows, window.columns] = images.images[..., window.rows, window.columns]
        labels, counted = images.labels.expand(len(drawn), -1), other.any(1)
        told = logits(model, CleanSet(laid.flatten(0, 1), labels.flatten())).argmax(1).view_as(labels)
        hits += ((told == labels) & counted).sum(0)
        tries += counted.sum(0)
    return hits / tries.clamp(min=1)
