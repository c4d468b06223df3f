"""RNP: unlearn the clean task, recover it by scaling neurons down, prune the neurons that had to go."""

import warnings
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.defense import Defense, Outcome
from untrojan.errors import UnreliableWarning
from untrojan.fit import fit
from untrojan.mask import Cut, HeldOut, Mask, budget, curve_point, sweep
from untrojan.model import correct, logits
from untrojan.record import Check, Diagnosis, Selection, UnlearningRun
from untrojan.scan.inversion import universal
from untrojan.scan.unlearning import AUGMENTATIONS, Unlearning, View, diagnose

THRESHOLDS = tuple(step / 20 for step in range(19))


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class RNP(Unlearning, Defense):
    """Reconstructive Neuron Pruning.

    A copy of the model unlearns clean images, by maximizing their loss, until its accuracy is gone; the backdoor,
    which no clean image exercises, survives. Then the copy, its weights frozen, recovers accuracy on the same images
    by scaling neurons down only. The neurons that have to be scaled down are those that carry the backdoor; they are
    pruned from the original model. The class that survives unlearning is the target label.

    A neuron is the scale of one channel (see :class:`untrojan.mask.Mask`): of BatchNorm where there is one, else of
    GroupNorm or LayerNorm, else of a convolution or linear output. A score in [0, 1] is the recovered multiplier.
    Neurons with multiplier 0 are told apart by scores in (-1, 0]: minus the share of the recovery that they spent
    masked, so that one with -0.9 was masked almost at once.

    Attributes:
        variant: `fixed` is this project's; `released` is what the published code does, see Deviations.
        select: How much to prune. `budget`: as many neurons as cost no more than `budget` of clean accuracy;
            `threshold` and `count`: as given.
        budget: Accepted drop in clean accuracy, as a fraction in (0, 1).
        threshold: Prune neurons with a score at or below this, in [-1, 1], for `threshold`.
        count: Prune this many neurons, lowest scores first, for `count`.
        folds: Parts the images are cut into, so that masks learned without a part are judged on it.
        recover_lr: Learning rate of SGD with momentum 0.9 on the masks; it includes the loss factor 0.2 of the
            published code (0.2 x 0.2).
        recover_epochs: Passes over the images to recover.

    Example:
        >>> from untrojan.sources.nets import build
        >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
        >>> method = RNP(select="count", count=3, unlearn_epochs=1, recover_epochs=1)
        >>> repair = method.repair(build("digits-cnn"), CleanSet(images, labels))
        >>> repair.record.units_changed
        3

    References:
        Li, Lyu, Ma, Shen, Lyu, Zhang, Zhao: Reconstructive neuron pruning for backdoor defense, ICML 2023,
        arXiv:2305.14876.

    Deviations:
        The published code unlearns and recovers on cropped and flipped images, reports every threshold with its
        success against the trigger, and chooses none. Here:

        * Images are unlearned as they are. Cropping and flipping change what survives: on networks trained without
          them the surviving class is then often not the target. Recovery keeps them, as regularization.
        * How many neurons to prune is chosen on clean images that the masks were not learned on, by a paired budget.
        * Neurons with multiplier 0 are ordered by how early they got there, so that fewer than all of them can go.
        * With fewer images than four batches the batches are smaller, so that few images still mean enough steps.
        * An accuracy floor that is not reached is reported, and the last state is used; the published code stops
          without writing it, and its next stage reads whatever file is there.
        * A loss that leaves the numbers ends the stage at the last finite state.

        Published and kept: the loss factor 0.2, as one number with the learning rate; no gradient clipping, because
        theirs stands before the backward pass and does nothing; the bias of a pruned channel stays.
        With `variant="released"` images are cropped and flipped throughout, all of them are used to learn the masks,
        masks are rounded to four decimals, and the threshold must be given.
    """

    name: ClassVar[str] = "rnp"

    variant: Literal["fixed", "released"] = "fixed"
    select: Literal["budget", "threshold", "count"] = "budget"
    budget: float = Field(default=0.02, gt=0, lt=1)
    threshold: float = Field(default=0.2, ge=-1, le=1)
    count: int = Field(default=20, ge=0)
    folds: int = Field(default=2, ge=2)
    recover_lr: float = Field(default=0.04, gt=0)
    recover_epochs: int = Field(default=20, ge=1)

    @model_validator(mode="after")
    def _need_a_rule(self) -> Self:
        if self.variant == "released" and self.select == "budget":
            raise ValueError("the released code chooses no threshold; give select threshold or count with it")
        return self

    def batches(self, clean: CleanSet, generator: torch.Generator, view: View) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the images once, shuffled; `released` never makes the batches smaller."""
        if self.variant == "released":
            return clean.batches(self.batch_size, generator, AUGMENTATIONS[view])
        return super().batches(clean, generator, view)

    def _repair(self, model: nn.Module, clean: CleanSet, diagnosis: Diagnosis | None, seed: int) -> Outcome:
        if self.select == "count":
            Mask.ones(model, "neuron").count(self.count)  # refuses a count beyond the network before all the work
        if diagnosis is not None and diagnosis.verdict == "not_found":
            return _nothing_to_do(model, clean, diagnosis)
        whole, parts, runs = self._learn_all(model, clean, seed)
        diagnosis = diagnosis or diagnose(runs)
        if diagnosis.verdict == "not_found":
            return _nothing_to_do(model, clean, diagnosis)

        before = torch.cat([correct(model, part.clean) for part in parts])
        cuts = self._cuts(whole.scores)
        right = sweep(model, parts, cuts)
        chosen = budget(right, before, self.budget) if self.select == "budget" else self._given()
        chosen, kept, lost = self._deliver(model, clean, whole.scores, cuts, chosen)
        pruned = kept.bake(model)
        after = before if chosen is None else right[chosen]
        checks = [self._keeps_accuracy(before, right, chosen, lost), _prunes_masked(whole.scores, kept)]
        if chosen is not None:
            checks.append(self._loses_label(pruned, clean, diagnosis, seed))
        if all(check.passed for check in checks):
            checks.append(_resists(model, pruned, clean, diagnosis, seed))
        return Outcome(
            pruned,
            before,
            after,
            self.variant == "fixed",
            checks,
            diagnosis,
            Selection(
                rule=self._rule(),
                chosen=chosen,
                curve=[
                    curve_point(whole.scores, cut(whole.scores), before, row)
                    for cut, row in zip(cuts, right, strict=True)
                ],
            ),
            whole.scores,
            kept,
        )

    def _learn_all(
        self, model: nn.Module, clean: CleanSet, seed: int
    ) -> tuple["Learned", list[HeldOut], list[UnlearningRun]]:
        """What is pruned by, scores with images to judge them on, and every unlearning run on the way there."""
        if self.variant == "released":
            whole = self.learn(model, clean, seed)
            return whole, [HeldOut(whole.scores, clean)], [whole.run]
        folds = clean.folds(self.folds, seed)
        whole = self.learn(model, clean, seed)
        learned = [
            self.learn(model, rest, seed + number, f"without part {number} of {len(folds)}")
            for number, (rest, _) in enumerate(folds, start=1)
        ]
        noisy = [self.unlearn(model, clean, seed + number, "noise", f"noise {number} of 2").run for number in (1, 2)]
        parts = [HeldOut(each.scores, held) for each, (_, held) in zip(learned, folds, strict=True)]
        return whole, parts, [whole.run, *(each.run for each in learned), *noisy]

    def learn(self, model: nn.Module, clean: CleanSet, seed: int, detail: str = "") -> "Learned":
        """Unlearn and recover once, without judging or pruning.

        Args:
            model: The network; it is not changed.
            clean: The images to learn from.
            seed: Decides order, augmentation and dropout.
            detail: Which of several rounds this is, for progress.

        Returns:
            The scores of all neurons, and how the unlearning went.
        """
        view = "crop-flip" if self.variant == "released" else "plain"
        unlearned, run = self.unlearn(model, clean, seed, view, detail)
        if not run.reached:
            ended = f"an accuracy of {run.trace[-1].accuracy:.2f}" if run.trace else "the first step"
            text = f"unlearning ended at {ended}, not at the floor of {self.floor:.2f}; the last state is used"
            warnings.warn(UnreliableWarning(text), stacklevel=2)
        return Learned(self._recover(unlearned, clean, seed, detail), run)

    def _recover(self, unlearned: nn.Module, clean: CleanSet, seed: int, detail: str) -> Mask:
        generator = torch.Generator().manual_seed(seed)
        unlearned = unlearned.train().requires_grad_(False)
        mask = Mask.ones(unlearned, "neuron")
        masked = list(mask.values.values())
        sums = [torch.ones_like(value) for value in masked]
        steps = 1

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            out = mask.call(unlearned, images)
            return functional.cross_entropy(out, labels), out

        def project() -> None:
            nonlocal steps
            steps += 1
            for value, total in zip(masked, sums, strict=True):
                total += value.clamp_(0, 1)

        fit(
            masked,
            step,
            lambda: self.batches(clean, generator, "crop-flip"),
            partial(torch.optim.SGD, lr=self.recover_lr, momentum=0.9),
            self.recover_epochs,
            name="recover",
            detail=detail,
            project=project,
        )
        mask = mask.map(torch.Tensor.detach)
        if self.variant == "released":
            return mask.map(lambda value: value.mul(1e4).round().div(1e4))
        earliness = iter(total / steps - 1 for total in sums)
        return mask.map(lambda value: torch.where(value > 0, value, next(earliness)))

    def _cuts(self, scores: Mask) -> list[Cut]:
        """Ways to prune, mildest first."""
        if self.select == "threshold":
            return [partial(Mask.threshold, threshold=each) for each in sorted({*THRESHOLDS, self.threshold})]
        if self.select == "count":
            return [partial(Mask.count, count=self.count)]
        counts, step = {scores.threshold(each).pruned for each in THRESHOLDS} - {0} or {1}, 1
        while step < max(counts):
            counts.add(step)
            step = max(step + 1, round(step * 1.2))
        return [partial(Mask.count, count=each) for each in sorted(counts)]

    def _given(self) -> int:
        return sorted({*THRESHOLDS, self.threshold}).index(self.threshold) if self.select == "threshold" else 0

    def _rule(self) -> str:
        if self.select == "threshold":
            return f"threshold: every neuron with a score at or below {self.threshold:g}, as given"
        if self.select == "count":
            return f"count: the {self.count} neurons with the lowest scores, as given"
        return (
            f"budget: the most neurons, lowest scores first, before accuracy on held-out clean images falls by more "
            f"than {self.budget:.1%}, paired; masks learned without one of {self.folds} parts are judged on it"
        )

    def _deliver(
        self, model: nn.Module, clean: CleanSet, scores: Mask, cuts: list[Cut], chosen: int | None
    ) -> tuple[int | None, Mask, float]:
        """Prune by all images' scores, and by less where that costs more of their accuracy than the budget."""
        right = correct(model, clean).double().mean()
        lost = 0.0
        while chosen is not None:
            kept = cuts[chosen](scores)
            lost = float(right - correct(kept.bake(model), clean).double().mean())
            if self.select != "budget" or lost <= self.budget + 1e-9:
                return chosen, kept, lost
            chosen = chosen - 1 if chosen else None
        return None, scores.map(torch.ones_like), lost

    def _keeps_accuracy(self, before: Tensor, right: Tensor, chosen: int | None, lost: float) -> Check:
        drop = float(before.double().mean() - right[chosen or 0].double().mean())
        if chosen is None:
            worse = max(drop, lost)
            text = f"even the mildest pruning costs {worse:.1%} of clean accuracy; accepted are {self.budget:.1%}"
            return Check(name="keeps clean accuracy", passed=False, detail=text)
        judged = "held-out images" if self.variant == "fixed" else "the images that the masks were learned on"
        text = f"clean accuracy falls by {drop:.1%} on {judged}"
        if self.variant == "fixed":
            text += f", and by {lost:.1%} on all of them with the weights delivered"
        passed = max(drop, lost) <= self.budget + 1e-9
        return Check(name="keeps clean accuracy", passed=passed, detail=f"{text}; accepted are {self.budget:.1%}")

    def _loses_label(self, pruned: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Check:
        """Unlearn the repaired model: where the backdoor is gone, its label no longer stands out."""
        views: tuple[View, View] = ("plain", "noise")
        again = diagnose([self.unlearn(pruned, clean, seed, view, f"repaired, {view}").run for view in views])
        name = "loses the suspected label"
        if not (diagnosis.targets and again.targets):
            return Check(name=name, passed=False, detail="unlearning left the numbers at once and says nothing")
        suspect = diagnosis.targets[0]
        share = next(target.score for target in again.targets if target.label == suspect.label)
        allowed = _twice_fair(len(again.targets))
        return Check(
            name=name,
            passed=again.targets[0].label != suspect.label and share <= allowed,
            detail=(
                f"unlearning the repaired model leaves {share:.0%} of the predictions with label {suspect.label}, "
                f"{suspect.score:.0%} before; accepted are {allowed:.0%}, twice a fair share, behind another label"
            ),
        )


def _nothing_to_do(model: nn.Module, clean: CleanSet, diagnosis: Diagnosis) -> Outcome:
    right = correct(model, clean)
    return Outcome(model, right, right, held_out=True, checks=[], diagnosis=diagnosis)


def _prunes_masked(scores: Mask, kept: Mask) -> Check:
    """Recovery had to mask these neurons entirely; a budget that spares some leaves RNP half done."""
    masked = scores.threshold(0)
    pruned = masked.pruned - int(sum(((1 - masked.values[name]) * kept.values[name]).sum() for name in masked.values))
    return Check(
        name="prunes what recovery masked",
        passed=pruned == masked.pruned,
        detail=(
            f"{pruned} of the {masked.pruned} neurons that recovery masked entirely are pruned; "
            "those that are not may carry the backdoor on"
            if pruned < masked.pruned
            else f"all {masked.pruned} neurons that recovery masked entirely are pruned"
        ),
    )


def _resists(model: nn.Module, pruned: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Check:
    """A small perturbation into the suspected label uses the backdoor, and must have lost its effect."""
    label = diagnosis.targets[0].label
    found = universal(model, clean, label, seed)
    before, after = (found.success(each, clean, label) for each in (model, pruned))
    allowed = _twice_fair(logits(model, clean.take([0])).shape[1])
    return Check(
        name="resists a recovered perturbation",
        passed=after <= allowed,
        detail=(
            f"a perturbation of l1 norm {found.norm:.3g} that sends {before:.0%} of the images to label {label} in the "
            f"original sends {after:.0%} there now; accepted are {allowed:.0%}, twice a fair share"
        ),
    )


def _twice_fair(classes: int) -> float:
    return min(0.5, 2 / classes)


class Learned(NamedTuple):
    """The score of every neuron, and the unlearning run that they come from."""

    scores: Mask
    run: UnlearningRun
