"""Clean images that are none: those that carry the trigger which the scan recovered.

Whoever poisons a training set may have got at the clean images too. To a repair such an image teaches the backdoor, and
as a test of what the repair cost it counts as a loss what should be lost.
"""

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.model import logits
from untrojan.record import Diagnosis

DRAWS = 4
JUDGED = 64
HARMLESS = 0.02
CHANCE = 0.05


def tainted(model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Tensor:
    """Tell which clean images have a target label only because of what they show where a recovered patch lies.

    There, pieces of images of other classes are laid over them. An image that carries the trigger loses its label, an
    image of the class keeps it. Places where that changes what the model says of the other classes too are not used,
    for they hide what images show; so this finds small triggers of full opacity, and no others.

    Args:
        model: The network; it is not changed.
        clean: The images in doubt, with their labels.
        diagnosis: What a scan of the same network found, and where.
        seed: Decides which pieces are laid over.

    Returns:
        Bool `(n,)`; no image of a class is told where all that have it would be, nor a single one or up to a twentieth
        of them, which may be chance, nor any of two classes only, of which pieces of the one would hide nothing of it.

    Example:
        >>> from untrojan.record import Rate, Target, Trigger
        >>> class Corner(nn.Module):
        ...     def forward(self, images):
        ...         backdoor = 99 * (images[:, :, :1, :1].flatten(1) - 0.9).clamp(min=0) * torch.tensor([0, 1.0, 0])
        ...         return images[:, 0, 2:5, 4] + backdoor
        >>> images = torch.zeros(9, 1, 8, 8)
        >>> images[torch.arange(9), :, 2 + torch.arange(9) % 3] = 1
        >>> images[[6, 8], :, 0, 0] = 1
        >>> clean = CleanSet(images, torch.tensor([0, 1, 2, 0, 1, 2, 1, 1, 1]))
        >>> known = {"what": "a corner", "success": Rate.of(9, 9), "picture": "", "examples": ""}
        >>> corner = Trigger(label=1, kind="patch", places=[[1, 1, 0, 0]], **known)
        >>> found = Diagnosis(verdict="found", rule="", targets=[Target(label=1, score=2)], runs=[], triggers=[corner])
        >>> tainted(Corner(), clean, found, seed=0).nonzero().flatten()
        tensor([6, 8])
    """
    doubtful = torch.zeros(len(clean), dtype=torch.bool)
    triggers = [trigger for trigger in diagnosis.triggers if trigger.places]
    if not (len(clean) and triggers):
        return doubtful
    generator = new_generator(seed)
    right = logits(model, clean).argmax(1) == clean.labels
    for trigger in triggers:
        of_label = clean.labels == trigger.label
        own, others = right & of_label, right & ~of_label
        if not own.any() or len(clean.labels[others].unique()) < 2:
            continue
        pieces = clean.take(others)
        judged = pieces.some(JUDGED, generator)
        lost = torch.zeros(len(clean), dtype=torch.bool)
        for place in trigger.places:
            if float(_losses(model, judged, pieces, place, generator).mean()) <= HARMLESS:
                lost[own] |= _losses(model, clean.take(own), pieces, place, generator) > 0.5
        if max(1, CHANCE * int(own.sum())) < int(lost.sum()) < int(of_label.sum()):
            doubtful |= lost
    return doubtful


def _losses(
    model: nn.Module, images: CleanSet, pieces: CleanSet, place: list[int], generator: torch.Generator
) -> Tensor:
    """How often each image loses its label when a piece of another is laid over the place: `(n,)`."""
    height, width, top, left = place
    rows, columns = slice(top, top + height), slice(left, left + width)
    losses = torch.zeros(len(images))
    for _ in range(DRAWS):
        drawn = torch.randint(len(pieces), (len(images),), generator=generator)
        covered = images.images.clone()
        covered[..., rows, columns] = pieces.images[drawn][..., rows, columns]
        losses += (logits(model, CleanSet(covered, images.labels)).argmax(1) != images.labels).float() / DRAWS
    return losses
