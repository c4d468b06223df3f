"""The base of the defenses that give every unit a score and prune the lowest."""

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.checks import losses, surrogates, within
from untrojan.defenses.defense import Defense, Outcome
from untrojan.errors import UnreliableWarning
from untrojan.mask import Cut, HeldOut, Mask, Unit, budget, curve_point, sweep
from untrojan.model import correct
from untrojan.record import EXPLAINED, Check, Diagnosis, Selection
from untrojan.registry import config

DISARMED = 0.1


@config
class Pruning(Defense):
    """Base of the defenses that prune by scores; authors write :meth:`score`.

    Class variables say which thresholds the curve shows, and what a score is, for people.

    Attributes:
        variant: `fixed` or `released`; see Deviations. `released` scores on all images, so the curve shows the accuracy
            on images that the scores know, and the rule must be `threshold` or `count`.
        select: How many units to prune. `budget`: as many as the accepted loss of clean accuracy allows. `surrogate`:
            of these, only as many as it takes until triggers recovered from the model, which stand in for the one that
            nobody has, send at most 10 % of the images to the suspected label. `threshold` and `count`: as many as
            asked for, to reproduce published results.
        threshold: Prune units with a score at or below this, for `threshold`.
        count: Prune this many units, lowest scores first, for `count`.
        folds: Parts the images are cut into, so that scores made without a part are judged on it. With one image per
            class, they are judged on classes that they never saw, which prunes less.
        zero_bias: Whether the bias of a pruned channel goes with its scale, so that nothing of it is left. As
            published, it does for CLP and stays for the others.
    """

    scores: ClassVar[str] = EXPLAINED
    thresholds: ClassVar[tuple[float, ...]] = tuple(step / 20 for step in range(19))

    variant: Literal["fixed", "released"] = "fixed"
    select: Literal["budget", "surrogate", "threshold", "count"] = "budget"
    threshold: float = 0.2
    count: int = Field(default=20, ge=0)
    folds: int = Field(default=2, ge=2)
    zero_bias: bool = False

    @model_validator(mode="after")
    def _need_a_rule(self) -> Self:
        if self.variant == "released" and self._budgeted:
            raise ValueError("the released code has no such rule; give select threshold or count with it")
        return self

    @property
    def unit(self) -> Unit:
        """What is pruned: the scales of channels, or whole ones."""
        return "filter" if self.zero_bias else "neuron"

    @abstractmethod
    def score(self, model: nn.Module, clean: CleanSet, seed: int, detail: str = "") -> Mask:
        """Score every unit, without judging or pruning; the lowest are pruned first.

        Args:
            model: The network; it is not changed.
            clean: The images to learn from.
            seed: Decides everything random.
            detail: Which of several rounds this is, for progress.
        """

    def ordered(self, learned: Mask, at_zero: Sequence[Tensor]) -> Mask:
        """Make scores of multipliers in [0, 1]; those at 0 get what tells them apart, in [-1, 0), unless `released`."""
        learned = Mask(learned.map(Tensor.detach).values, self.unit)
        if self.variant == "released":
            return learned.map(lambda value: value.mul(1e4).round().div(1e4))
        order = iter(at_zero)
        return learned.map(lambda value: torch.where(value > 0, value, next(order)))

    def _demands(self, scores: Mask, kept: Mask) -> list[Check]:
        """What the method itself asks of a pruning."""
        return []

    def _level(self) -> float:
        """The score at or below which `threshold` prunes."""
        return self.threshold

    def _repair(self, model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Outcome:
        if self.select == "count":
            Mask.ones(model, self.unit).count(self.count)  # refuses a count beyond the network before all the work
        whole = self.score(model, clean, seed)
        if not len(clean):
            kept = whole.count(self.count) if self.select == "count" else whole.threshold(self._level())
            nothing = torch.empty(0, dtype=torch.bool)
            return Outcome(kept.bake(model), nothing, nothing, held_out=True, mask=whole, kept=kept)
        parts = self._parts(model, clean, whole, seed)
        before = torch.cat([correct(model, part.clean) for part in parts])
        cuts = self._cuts(whole)
        masks = [cut(whole) for cut in cuts]
        right = sweep(model, parts, cuts)
        chosen = budget(right, before, self.budget) if self._budgeted else self._given()
        if self._budgeted:
            chosen = self._affordable(model, clean, masks, chosen)
        shares: list[float] = []
        if self.select == "surrogate" and chosen is not None:
            shares = self._disarmed(model, clean, diagnosis, masks[: chosen + 1], seed)
            chosen = len(shares) - 1 if shares else chosen
        kept = whole.map(torch.ones_like) if chosen is None else masks[chosen]
        checks = self._demands(whole, kept)
        if chosen is None:
            text = f"even the mildest pruning costs more clean accuracy than the accepted {self.budget:.1%}"
            checks.append(Check(name="prunes within the budget", passed=False, detail=text))
        if shares:
            text = (
                f"recovered triggers send {shares[-1]:.0%} of the images where they lead; at most {DISARMED:.0%} may go"
            )
            checks.append(Check(name="disarms recovered triggers", passed=shares[-1] <= DISARMED, detail=text))
        curve = [curve_point(whole, mask, before, row) for mask, row in zip(masks, right, strict=True)]
        measured = [point.model_copy(update={"surrogate": share}) for point, share in zip(curve, shares, strict=False)]
        return Outcome(
            kept.bake(model),
            before,
            before if chosen is None else right[chosen],
            self.data_free or self.variant == "fixed",
            checks,
            Selection(rule=self._rule(), scores=self.scores, chosen=chosen, curve=measured + curve[len(measured) :]),
            whole,
            kept,
        )

    def _parts(self, model: nn.Module, clean: CleanSet, whole: Mask, seed: int) -> list[HeldOut]:
        """Scores with the images to judge them on."""
        if self.data_free or self.variant == "released":
            return [HeldOut(whole, clean)]
        folds = clean.folds(self.folds, seed)
        return [
            HeldOut(self.score(model, rest, seed + number, f"without part {number} of {len(folds)}"), held)
            for number, (rest, held) in enumerate(folds, start=1)
        ]

    def _cuts(self, scores: Mask) -> list[Cut]:
        """Ways to prune, mildest first."""
        if self.select == "threshold":
            return [partial(Mask.threshold, threshold=each) for each in self._shown()]
        if self.select == "count":
            return [partial(Mask.count, count=self.count)]
        counts, step = {scores.threshold(each).pruned for each in self.thresholds} - {0} or {1}, 1
        while step < max(counts):
            counts.add(step)
            step = max(step + 1, round(step * 1.2))
        return [partial(Mask.count, count=each) for each in sorted(counts)]

    def _shown(self) -> list[float]:
        return sorted({*self.thresholds, self._level()})

    def _given(self) -> int:
        return self._shown().index(self._level()) if self.select == "threshold" else 0

    def _rule(self) -> str:
        if self.select == "threshold":
            return f"threshold: every {self.unit} with a score at or below {self._level():g}, as given"
        if self.select == "count":
            return f"count: the {self.count} {self.unit}s with the lowest scores, as given"
        judged = (
            "scores need no images"
            if self.data_free
            else f"scores made without one of {self.folds} parts are judged on it"
        )
        until = (
            f"surrogate: the fewest {self.unit}s, lowest scores first, until recovered triggers send at most "
            f"{DISARMED:.0%} of the images where they lead, and at most those"
            if self.select == "surrogate"
            else f"budget: the most {self.unit}s, lowest scores first,"
        )
        return (
            f"{until} before accuracy on held-out clean images falls by more than {self.budget:.1%}, paired; {judged}"
        )

    @property
    def _budgeted(self) -> bool:
        return self.select in ("budget", "surrogate")

    def _disarmed(
        self, model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, kept: Sequence[Mask], seed: int
    ) -> list[float]:
        """How far triggers recovered from the model reach after each cut, up to the first that takes their effect."""
        recovered = surrogates(model, clean, diagnosis, seed)
        if not recovered:
            text = (
                "no label is suspected that a trigger could be recovered for; the budget alone says how much to prune"
            )
            warnings.warn(UnreliableWarning(text), stacklevel=2)
            return []
        shares: list[float] = []
        for each in kept:
            pruned = each.bake(model)
            shares.append(max(success(pruned) for success in recovered))
            if shares[-1] <= DISARMED:
                break
        return shares

    def _affordable(self, model: nn.Module, clean: CleanSet, masks: Sequence[Mask], chosen: int | None) -> int | None:
        """Prune less than chosen where all images' scores cost more of their accuracy than the budget."""
        right = correct(model, clean)
        while chosen is not None:
            lost = losses(right, correct(masks[chosen].bake(model), clean))
            if within(float(lost.mean()), self.budget):
                return chosen
            chosen = chosen - 1 if chosen else None
        return None
