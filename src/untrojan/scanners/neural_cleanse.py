"""Neural Cleanse: the smallest patch that sends every image to a label, and the label whose patch is too small."""

import copy
import math
from collections.abc import Sequence
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.fit import fit, size_with_enough_steps
from untrojan.model import classes_of
from untrojan.pictures import png
from untrojan.record import Diagnosis, Patch, Target, Verdict
from untrojan.registry import config
from untrojan.scanners.aim import Aim
from untrojan.scanners.scanner import Scanner

BATCH = 32
IMAGES_AT_A_TIME = 256
ENOUGH = 0.98
FIRST_COST = 1e-3
PATIENCE = 5
STOP_PATIENCE = 25
SMALLER = 0.99
ANOMALY = -2.0
RULE = (
    f"found: of the labels that a patch was found for that sends {ENOUGH:.0%} of the other classes' images there, at "
    f"least one has an anomaly index below {ANOMALY:g}; not_found: there is such a patch for every one of three or "
    "more labels, and none has; inconclusive: anything else"
)


class SoftPatch(NamedTuple):
    """A patch that sends images to a label, and that they may shine through.

    Attributes:
        label: Where it sends them.
        mask: How far each pixel is replaced, `(1, H, W)` in [0, 1].
        pattern: What it is replaced with, `(C, H, W)` in [0, 1].
        success: Share of the images of other classes that get the label.
        reached: Whether it comes from an epoch of the search that reached enough images; where none did, its size says
            nothing.
    """

    label: int
    mask: Tensor
    pattern: Tensor
    success: float
    reached: bool = True

    @property
    def norm(self) -> float:
        """The l1 norm of the mask: how many pixels it replaces."""
        return float(self.mask.sum())

    def stamp(self, images: Tensor) -> Tensor:
        """Put the patch on images `(N, C, H, W)`.

        Example:
            >>> trigger = SoftPatch(0, torch.tensor([[[0.0, 1.0]]]), torch.ones(1, 1, 2), success=1.0)
            >>> trigger.stamp(torch.zeros(1, 1, 1, 2)).tolist()
            [[[[0.0, 1.0]]]]
        """
        return (1 - self.mask) * images + self.mask * self.pattern


def cleanse(
    model: nn.Module, clean: CleanSet, labels: Sequence[int], seed: int, *, lr: float = 0.1, epochs: int = 80
) -> list[SoftPatch]:
    """Find for each label a small patch that sends at least 98 % of the other classes' images there.

    Mask and pattern are `tanh(.) / 2 + 1 / 2` of free values, learned by Adam on the cross-entropy towards the label
    plus a cost times the l1 norm of the mask. The cost of a label is 0 until 5 epochs in a row reach 98 %, then 0.001;
    it doubles after 5 more in a row, and is divided by `2 ** 1.5` after 5 in a row that do not reach it. The smallest
    mask at the end of an epoch that reached it is kept. A label ends early when its cost has gone both ways and none of
    25 epochs in a row has made that mask smaller by 1 %. Labels share the forward passes, but have no influence on each
    other.

    Args:
        model: The network; it is not changed.
        clean: Images to find the patches on.
        labels: Where to send them.
        seed: Decides the start, which is the same for all labels, and the order of the images.
        lr: Learning rate of Adam, above 0.
        epochs: Passes over the images, at most.

    Returns:
        One trigger per label. Where no epoch reached 98 %, it is the last one.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> images = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> [trigger.label for trigger in cleanse(net, images, [0, 1], seed=0, epochs=2)]
        [0, 1]

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: identifying and mitigating backdoor attacks in
        neural networks, IEEE S&P 2019.
    """
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    size = size_with_enough_steps(len(clean), BATCH)
    at_once = max(1, IMAGES_AT_A_TIME // size)
    return [
        trigger
        for first in range(0, len(labels), at_once)
        for trigger in _Inversion(frozen, clean, labels[first : first + at_once], seed).run(size, lr, epochs)
    ]


def anomaly_index(values: Sequence[float]) -> list[float]:
    """Say how far each value lies above the median, in robust standard deviations: 1.4826 times the median deviation.

    Where more than half of the values are the same, 1.2533 times the mean deviation stands in, so that the index is
    always finite.

    Args:
        values: Any numbers; for Neural Cleanse the norms of the masks, of which those below -2 are suspicious.

    Example:
        >>> [round(index, 2) for index in anomaly_index([10, 11, 12, 13, 2])]
        [-0.67, 0.0, 0.67, 1.35, -6.07]
        >>> anomaly_index([3, 3, 3])
        [0.0, 0.0, 0.0]
    """
    numbers = torch.tensor(values, dtype=torch.float64)
    away = numbers - numbers.quantile(0.5)
    scale = 1.4826 * away.abs().quantile(0.5)
    if scale == 0:
        scale = 1.2533 * away.abs().mean()
    return (away / scale if scale > 0 else torch.zeros_like(away)).tolist()


def diagnose(triggers: Sequence[SoftPatch]) -> Diagnosis:
    """Find the labels whose patches are too small.

    Args:
        triggers: One of every label.

    Returns:
        The verdict by :data:`RULE`, and the labels that can be compared, the most suspicious first. A label's score is
        its anomaly index with the sign turned; those found are above 2.
    """
    working = [trigger for trigger in triggers if trigger.reached]
    index = anomaly_index([trigger.norm for trigger in working]) if working else []
    away = {trigger.label: each for trigger, each in zip(working, index, strict=True)}
    small = {label for label, each in away.items() if each < ANOMALY}
    verdict: Verdict = "inconclusive"
    if small:
        verdict = "found"
    elif len(working) == len(triggers) > 2:
        verdict = "not_found"
    return Diagnosis(
        verdict=verdict,
        rule=RULE,
        targets=[Target(label=label, score=-away[label]) for label in sorted(away, key=away.__getitem__)],
        runs=[],
        patches=[
            Patch(
                label=trigger.label,
                size=trigger.norm,
                success=trigger.success,
                index=away.get(trigger.label),
                too_small=trigger.label in small,
                picture=png(trigger.pattern, trigger.mask) if trigger.label in small else None,
            )
            for trigger in triggers
        ],
    )


@config
class NeuralCleanseScanner(Scanner):
    """Neural Cleanse: recover the smallest trigger of every label, and see whether one is too small.

    For every label a patch, a mask and a pattern, is optimized to send nearly all clean images there while the mask
    stays small. Into the target label of a backdoor a far smaller patch suffices. The l1 norms of the masks are
    compared by their median absolute deviation; a label with an anomaly index below -2 is a target.

    Attributes:
        mask_lr: Learning rate of Adam on mask and pattern, above 0.
        mask_epochs: Passes over the images to recover a patch, at most.

    Needs:
        Clean images, and three or more classes.

    Cost:
        2 F per image, epoch and class, F being one image through the network once: at most 161 F per image and class.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> [patch.label for patch in NeuralCleanseScanner(mask_epochs=2).scan(net, clean).patches]
        [0, 1]

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: identifying and mitigating backdoor attacks in
        neural networks, IEEE S&P 2019.

    Deviations:
        * Success is counted on images of other classes only; those of the label itself need no patch.
        * Labels for which no epoch of the search reached 98 % of the images are not compared, and the scan does not
          clear a model with such a label.
        * With two classes the index cannot go below -2, and the scan does not clear the model either.
        * All labels start from the same random mask and pattern.
        * Batches are smaller where there are few images.
    """

    name: ClassVar[str] = "neural-cleanse"

    mask_lr: float = Field(default=0.1, gt=0)
    mask_epochs: int = Field(default=80, ge=1)

    def _scan(self, model: nn.Module, clean: CleanSet, seed: int) -> Diagnosis:
        labels = range(classes_of(model, clean))
        return diagnose(cleanse(model, clean, labels, seed, lr=self.mask_lr, epochs=self.mask_epochs))


class _Inversion:
    """Inverts several labels at once; every label has its own cost and its own end."""

    def __init__(self, model: nn.Module, clean: CleanSet, labels: Sequence[int], seed: int) -> None:
        self.model = model
        self.clean = clean
        self.generator = new_generator(seed)
        channels, height, width = clean.shape
        self.free = [
            torch.rand(1, planes, height, width, generator=self.generator).mul(1.98).sub(0.99).atanh()
            for planes in (1, channels)
        ]
        self.free = [each.repeat(len(labels), 1, 1, 1) for each in self.free]
        self.states = [_State(label) for label in labels]
        self.active = list(range(len(labels)))

    def run(self, size: int, lr: float, epochs: int) -> list[SoftPatch]:
        fit(
            self.free,
            self._step,
            lambda: self.clean.batches(size, self.generator),
            partial(torch.optim.Adam, lr=lr, betas=(0.5, 0.9)),
            epochs,
            name="invert",
            detail=f"labels {', '.join(str(state.label) for state in self.states)}",
            stop=lambda _: self._end_epoch(),
        )
        masks, patterns = self._patches(slice(None))
        found = [
            state.best or SoftPatch(state.label, mask, pattern, 0.0, reached=False)
            for state, mask, pattern in zip(self.states, masks.detach(), patterns.detach(), strict=True)
        ]
        return [each._replace(success=Aim(each.label).share(self.model, self.clean, each.stamp)) for each in found]

    def _patches(self, which: slice | list[int]) -> tuple[Tensor, Tensor]:
        mask, pattern = (each[which].tanh() / 2 + 0.5 for each in self.free)
        return mask, pattern

    def _step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        masks, patterns = self._patches(self.active)
        stamped = (1 - masks[:, None]) * images + (masks * patterns)[:, None]
        logits = self.model(stamped.flatten(0, 1)).unflatten(0, stamped.shape[:2])
        loss = torch.zeros(())
        for number, mask, out in zip(self.active, masks, logits, strict=True):
            state = self.states[number]
            goal = torch.full_like(labels, state.label)
            loss = loss + functional.cross_entropy(out, goal) + state.cost * mask.sum()
            state.hits += int((out.argmax(1) == goal)[labels != goal].sum())
            state.shown += int((labels != goal).sum())
        return loss, logits[0]

    def _end_epoch(self) -> bool:
        masks, patterns = (each.detach() for each in self._patches(self.active))
        for number, mask, pattern in zip(self.active, masks, patterns, strict=True):
            self.states[number].end_epoch(mask, pattern)
        self.active = [number for number in self.active if not self.states[number].done]
        return not self.active


class _State:
    """The cost of one label's mask, its smallest mask so far, and whether it can end."""

    def __init__(self, label: int) -> None:
        self.label = label
        self.cost = 0.0
        self.hits = self.shown = 0
        self.reached = self.missed = self.waited = 0
        self.raised = self.lowered = False
        self.best: SoftPatch | None = None
        self.last_norm = math.inf

    @property
    def done(self) -> bool:
        return self.raised and self.lowered and self.waited >= STOP_PATIENCE

    def end_epoch(self, mask: Tensor, pattern: Tensor) -> None:
        success = self.hits / max(self.shown, 1)
        self.hits = self.shown = 0
        if success >= ENOUGH and (self.best is None or float(mask.sum()) < self.best.norm):
            self.best = SoftPatch(self.label, mask.clone(), pattern.clone(), success)
        self._wait()
        self._change_cost(success >= ENOUGH)

    def _wait(self) -> None:
        if self.best is not None:
            self.waited = self.waited + 1 if self.best.norm >= SMALLER * self.last_norm else 0
            self.last_norm = min(self.last_norm, self.best.norm)

    def _change_cost(self, reached: bool) -> None:
        self.reached, self.missed = (self.reached + 1, 0) if reached else (0, self.missed + 1)
        if self.reached >= PATIENCE:
            self.raised = self.cost > 0
            self.cost, self.reached = 2 * self.cost or FIRST_COST, 0
        elif self.missed >= PATIENCE and self.cost > 0:
            self.cost, self.missed, self.lowered = self.cost / 2**1.5, 0, True
