"""What a repaired model must satisfy before it is called repaired: checks that need no trigger."""

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.model import correct, logits
from untrojan.record import Check, Diagnosis
from untrojan.scanners.inversion import universal
from untrojan.scanners.patches import search, smallest
from untrojan.scanners.unlearning import UnlearningScanner

PATCHES = 1000
_ROUNDING = 1e-9


def within(drop: float, budget: float) -> bool:
    """Tell whether a loss of accuracy stays within a budget, both as fractions."""
    return drop <= budget + _ROUNDING


def lost_accuracy(right: Tensor, repaired: nn.Module, clean: CleanSet) -> float:
    """Accuracy of the original, which gets the images `right`, less that of the repaired model, as a fraction."""
    return float(right.double().mean() - correct(repaired, clean).double().mean())


def keeps_accuracy(before: Tensor, after: Tensor, lost: float, budget: float, held_out: bool) -> Check:
    """The clean accuracy stays within the budget, image by image against the original.

    Args:
        before: Which images the original gets right: bool `(n,)`.
        after: The same images for the repaired model.
        lost: The loss of the delivered weights on all images, as a fraction.
        budget: The accepted loss.
        held_out: Whether nothing was fitted on these images.
    """
    drop = float(before.double().mean() - after.double().mean())
    judged = "held-out images" if held_out else "the images that it was fitted on"
    text = f"clean accuracy {_moves(drop)} on {judged}"
    if held_out:
        text += f", and {_moves(lost)} on all of them with the weights delivered"
    passed = within(max(drop, lost), budget)
    return Check(name="keeps clean accuracy", passed=passed, detail=f"{text}; accepted are {budget:.1%}")


def _moves(drop: float) -> str:
    return f"falls by {drop:.1%}" if drop >= 0 else f"rises by {-drop:.1%}"


def loses_label(model: nn.Module, repaired: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Check:
    """Unlearn the repaired model: where the backdoor is gone, its label no longer stands out."""
    name = "loses the suspected label"
    again = UnlearningScanner(runs=2).scan(repaired, clean, seed)
    if diagnosis.suspect is None or not again.targets:
        return Check(name=name, passed=False, detail="unlearning left the numbers at once and says nothing")
    share = next(target.score for target in again.targets if target.label == diagnosis.suspect)
    allowed = _twice_fair(len(again.targets))
    before = f", {diagnosis.targets[0].score:.0%} before" if diagnosis.runs else ""
    return Check(
        name=name,
        passed=again.targets[0].label != diagnosis.suspect and share <= allowed,
        detail=(
            f"unlearning the repaired model leaves {share:.0%} of the predictions with label {diagnosis.suspect}"
            f"{before}; accepted are {allowed:.0%}, twice a fair share, behind another label"
        ),
    )


def resists_perturbation(
    model: nn.Module, repaired: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int
) -> Check:
    """A small perturbation into the suspected label uses the backdoor, and must have lost its effect."""
    name = "resists a recovered perturbation"
    label = diagnosis.suspect
    if label is None or bool((clean.labels == label).all()):
        return Check(name=name, passed=False, detail="there is no label to recover a perturbation into")
    found = universal(model, clean, label, seed)
    before, after = (found.success(each, clean, label) for each in (model, repaired))
    allowed = _twice_fair(logits(model, clean.take([0])).shape[1])
    return Check(
        name=name,
        passed=after <= allowed,
        detail=(
            f"a perturbation of l1 norm {found.norm:.3g} that sends {before:.0%} of the images to label {label} in the "
            f"original sends {after:.0%} there now; accepted are {allowed:.0%}, twice a fair share"
        ),
    )


def resists_patches(model: nn.Module, repaired: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Check:
    """Small patches of full opacity that the original falls for, and others at their places, must have lost effect."""
    name = "resists recovered patches"
    label = diagnosis.suspect
    if label is None or bool((clean.labels == label).all()):
        return Check(name=name, passed=False, detail="there is no label to recover patches for")
    generator = torch.Generator().manual_seed(seed + 1)
    found = search(model, clean, label, generator)
    patch = smallest(model, clean, label, found)
    rows = found.draw(PATCHES, generator)
    other = torch.randint(len(found.patterns), (PATCHES // 2,), generator=generator)
    tried = found._replace(boxes=found.boxes[rows], which=torch.cat([found.which[rows[: -len(other)]], other]))
    others = clean.take(clean.labels != label)
    images = others.take(torch.randint(len(others), (PATCHES,), generator=generator))
    stamped = CleanSet(tried.stamp(images.floats(), torch.arange(PATCHES)), images.labels)
    before, after = (float((logits(each, stamped).argmax(1) == label).double().mean()) for each in (model, repaired))
    single = patch.success_on(repaired, clean, label)
    allowed = _twice_fair(logits(model, clean.take([0])).shape[1])
    return Check(
        name=name,
        passed=max(after, single) <= allowed,
        detail=(
            f"{patch} sends {patch.success:.0%} of the images to label {label} in the original and {single:.0%} now, "
            f"all recovered patches and others at their places {before:.0%} and {after:.0%}; accepted are {allowed:.0%}"
        ),
    )


def _twice_fair(classes: int) -> float:
    return min(0.5, 2 / classes)
