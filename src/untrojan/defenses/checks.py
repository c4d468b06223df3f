"""What a repaired model must satisfy before it is called repaired: checks that need no trigger."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.views import mixed, shifted, varied
from untrojan.device import new_generator
from untrojan.model import classes_of, logits
from untrojan.record import Check, Diagnosis
from untrojan.scanners.aim import Aim
from untrojan.scanners.changes import against_others
from untrojan.scanners.inversion import Perturbation, bounded, universal
from untrojan.scanners.patches import search, smallest
from untrojan.scanners.reach import spread_over
from untrojan.scanners.triggers import faintest

FEW_JUDGES = 50
FOUND_AGAIN = 0.2
VIEWS = 512
AT_ONCE = 128
SURE = 0.9
SURE_VIEWS = 20
AGREED = 0.7
_ROUNDING = 1e-9

_Told = tuple[bool, str]


def within(drop: float, budget: float) -> bool:
    """Tell whether a loss of accuracy stays within a budget, both as fractions."""
    return drop <= budget + _ROUNDING


def losses(right: Tensor, now: Tensor) -> Tensor:
    """What a repair costs on each image: 1 where only the original was right, -1 where only the repaired model is.

    Args:
        right: Which images the original gets right: bool `(n,)`.
        now: The same for the repaired model.
    """
    return right.double() - now.double()


def reachable(diagnosis: Diagnosis, clean: CleanSet) -> list[Aim]:
    """Tell where triggers send images by what a scan found, as far as there are images that they could send there."""
    all_to_all = [Aim(None, tuple(each.targets)) for each in diagnosis.triggers if each.label is None]
    aims = all_to_all or [Aim(label) for label in diagnosis.suspects]
    return [aim for aim in aims if not bool(aim.there(clean.labels).all())]


def _judges(model: nn.Module, clean: CleanSet, aim: Aim) -> CleanSet:
    """The images that tell what a trigger does: what the model gets wrong by itself was not sent away by one."""
    return CleanSet(clean.images, logits(model, clean).argmax(1)) if aim.label is None else clean


def keeps_accuracy(judged: Tensor, everywhere: Tensor, budget: float, held_out: bool) -> Check:
    """The clean accuracy falls by no more than the budget, image by image against the original.

    A hundred images tell a loss to within some four points only. It exceeds the budget where all of its 95 % interval
    does.

    Args:
        judged: The :func:`losses` on the images that the method is judged by: `(n,)`.
        everywhere: Those of the delivered weights on all images.
        budget: The accepted loss, as a fraction.
        held_out: Whether nothing was fitted on the first.
    """
    text = f"clean accuracy {_moves(judged)} on {'held-out images' if held_out else 'the images that it was fitted on'}"
    if held_out:
        text += f", and {_moves(everywhere)} on all of them with the weights delivered"
    passed = all(within(float(each.mean()) - _half(each), budget) for each in (judged, everywhere))
    return Check(name="keeps clean accuracy", passed=passed, detail=f"{text}; accepted are {budget:.1%}")


def _moves(lost: Tensor) -> str:
    drop = float(lost.mean())
    return f"{'falls' if drop >= 0 else 'rises'} by {abs(drop):.1%} (give or take {_half(lost):.1%})"


def _half(lost: Tensor) -> float:
    """Half of the 95 % interval of a mean."""
    return 1.96 * float(lost.std(correction=0)) / math.sqrt(len(lost))


def keeps_answers(
    model: nn.Module, repaired: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int
) -> list[Check]:
    """Where the original is sure of other views of the images, the repaired model says the same of most.

    Few images can all be learned by heart while the accuracy on others is lost, and none may be held out to tell. Views
    with a suspected label are left out, for what makes the original sure of it may be the backdoor.

    Args:
        model: The original.
        repaired: The repaired model.
        clean: The images, which are shifted, mirrored, mixed, zoomed, recolored and pasted together.
        diagnosis: What the scan found.
        seed: Decides how.

    Returns:
        One check; none where the original is sure of hardly any view.
    """
    generator = new_generator(seed + 3)

    def view(images: Tensor, generator: torch.Generator) -> Tensor:
        return varied(mixed(shifted(images, generator), generator), generator)

    agreed = []
    for images, labels in clean.draws(AT_ONCE, VIEWS // AT_ONCE, generator, view):
        seen = CleanSet(images, labels)
        sure, said = logits(model, seen).softmax(1).max(1)
        suspected = torch.isin(said, said.new_tensor(diagnosis.suspects))
        agreed.append((logits(repaired, seen).argmax(1) == said)[(sure > SURE) & ~suspected])
    same = torch.cat(agreed)
    if len(same) < SURE_VIEWS:
        return []
    share = float(same.double().mean())
    text = (
        f"of {VIEWS} varied views of the images the original is sure that {len(same)} have a label that is not "
        f"suspected, and the repaired model says the same of {share:.0%} of these; at least {AGREED:.0%} are asked for"
    )
    return [Check(name="keeps its answers on other views", passed=share >= AGREED, detail=text)]


def resists_perturbation(
    model: nn.Module, repaired: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int
) -> Check:
    """A small perturbation into the suspected label uses the backdoor, and must have lost its effect."""
    allowed = _twice_fair(model, clean)

    def resists(aim: Aim) -> _Told:
        passed, told = True, []
        for ball, found in _perturbations(model, clean, aim, spread_over(diagnosis, aim.label), seed):
            before, after = (found.success(each, clean, aim) for each in (model, repaired))
            passed = passed and _at_most(allowed, after, clean, aim)
            told.append(
                f"a perturbation of {ball} norm {found.norm:.3g} that sends {before:.0%} of the images to {aim} in the "
                f"original sends {after:.0%} there now"
            )
        text = f"{', and '.join(told)}; accepted are {allowed:.0%}, twice a fair share"
        return passed, text + _too_few(allowed, clean, aim)

    return _of_all("resists a recovered perturbation", reachable(diagnosis, clean), resists)


def _perturbations(
    model: nn.Module, clean: CleanSet, aim: Aim, norm: float | None, seed: int
) -> Iterator[tuple[str, Perturbation]]:
    """The smallest in few pixels and, where the scan found the trigger spread over the image, one that is spread."""
    yield "l1", universal(model, clean, aim, seed)
    if norm is not None:
        yield "l2", bounded(model, clean, aim, norm, new_generator(seed), "l2")


def surrogates(
    model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int
) -> list[Callable[[nn.Module], float]]:
    """Recover triggers that stand in for the real one: what the model falls for most easily.

    They are the perturbations and the smallest patch that the checks look at, searched with another seed.

    Args:
        model: The original.
        clean: Images to search on.
        diagnosis: What the scan found.
        seed: Decides everything random.

    Returns:
        For each of them, what tells the share of the images that it sends where it leads in a pruned network; none
        where no label is suspected.
    """
    generator = new_generator(seed + 4)
    made: list[Callable[[nn.Module], float]] = []
    for aim in reachable(diagnosis, clean):
        judges = _judges(model, clean, aim)
        if aim.label is not None:
            norm = spread_over(diagnosis, aim.label)
            found = (each for _, each in _perturbations(model, clean, aim, norm, seed + 4))
            made += [partial(each.success, clean=clean, aim=aim) for each in found]
        patch = smallest(model, judges, aim, search(model, judges, aim, generator))
        made.append(partial(patch.success_on, clean=judges, aim=aim))
    return made


def resists_patches(model: nn.Module, repaired: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Check:
    """The small patch of full opacity that the original falls for must have lost its effect, and leave no other."""
    generator = new_generator(seed + 1)

    def resists(aim: Aim) -> _Told:
        allowed = FOUND_AGAIN if aim.label is None else _twice_fair(model, clean)
        judges = _judges(model, clean, aim)
        found = search(model, judges, aim, generator)
        patch = smallest(model, judges, aim, found)
        now = patch.success_on(repaired, judges, aim)
        again = search(repaired, judges, aim, generator, known=found)
        area = max(patch.area, clean.shape[1] * clean.shape[2] // 64)
        other = smallest(repaired, judges, aim, again.upto(area))
        either = max(allowed, FOUND_AGAIN)
        return (
            _at_most(allowed, now, judges, aim) and _at_most(either, other.success, judges, aim),
            f"{patch} sends {patch.success:.0%} of the images to {aim} in the original and {now:.0%} now, "
            f"accepted are {allowed:.0%}; of patches as small, {other} does most now, with {other.success:.0%}, "
            f"accepted are {either:.0%}{_too_few(either, judges, aim)}",
        )

    return _of_all("resists recovered patches", reachable(diagnosis, clean), resists)


def resists_changes(model: nn.Module, repaired: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Check:
    """No change of the whole image, searched anew, reaches further into the suspected label than into others."""
    norm = faint(diagnosis, clean)
    generator = new_generator(seed + 2)

    def resists(aim: Aim) -> _Told:
        assert aim.label is not None
        found = against_others(repaired, clean, aim.label, norm, generator, "repaired model")
        told = [f"a {each.kind} sends {each.share:.0%} to {aim} and {each.elsewhere:.0%} to another" for each in found]
        return (
            all(each.further <= FOUND_AGAIN for each in found),
            f"at best, {', '.join(told)}; accepted are {FOUND_AGAIN:.0%} more than to any other label tried",
        )

    return _of_all("resists changes of the whole image", reachable(diagnosis, clean), resists)


def _of_all(name: str, aims: Sequence[Aim], resists: Callable[[Aim], _Told]) -> Check:
    """The check that holds for every label that triggers are suspected to lead to, of which there has to be one."""
    if not aims:
        return Check(name=name, passed=False, detail="there is no label to search triggers for")
    told = [resists(aim) for aim in aims]
    return Check(name=name, passed=all(passed for passed, _ in told), detail="; ".join(detail for _, detail in told))


def faint(diagnosis: Diagnosis, clean: CleanSet) -> float:
    """The l2 norm that the scan took for faint in the end, but at least the one that it begins with."""
    return max([faintest(clean.shape), *(reach.norm for reach in diagnosis.reaches[:1])])


def _at_most(allowed: float, share: float, clean: CleanSet, aim: Aim) -> bool:
    """Whether a share of the images exceeds what is accepted by no more than chance, at 95 %, and could exceed it."""
    return share <= _limit(allowed, clean, aim) < 1


def _limit(allowed: float, clean: CleanSet, aim: Aim) -> float:
    return allowed + 1.96 * math.sqrt(allowed * (1 - allowed) / len(aim.others(clean)))


def _too_few(allowed: float, clean: CleanSet, aim: Aim) -> str:
    """What is said besides where even all of the images would not exceed what is accepted."""
    if _limit(allowed, clean, aim) < 1:
        return ""
    return f", but there are too few images of other classes to tell, {len(aim.others(clean))}: give more clean images"


def _twice_fair(model: nn.Module, clean: CleanSet) -> float:
    return min(0.5, 2 / classes_of(model, clean))
