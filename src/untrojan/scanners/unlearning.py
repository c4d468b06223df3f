"""Which class survives unlearning: the label read-out of RNP's unlearned model."""

import copy
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from untrojan.augmentation import crop_flip
from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.errors import UnreliableWarning
from untrojan.fit import Epoch, fit, size_with_enough_steps, supervised
from untrojan.record import Diagnosis, Target, UnlearningPoint, UnlearningRun, Verdict
from untrojan.registry import config
from untrojan.scanners.scanner import Scanner
from untrojan.speed import faster

View = Literal["plain", "noise", "crop-flip"]

NOISE = 0.1
FOUND_SHARE = 0.5
RULE = (
    f"found: every run came down to the accuracy floor, and one class leads both with noise and without and holds "
    f"{FOUND_SHARE:.0%} of the predictions or more there on average; not_found: every run with noise came down and "
    "none without, and different classes lead; inconclusive: anything else"
)


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    return (images + NOISE * torch.randn(images.shape, generator=generator)).clamp_(0, 1)


VIEWS = {"plain": None, "noise": _noise, "crop-flip": crop_flip}


class UnlearnedModel(NamedTuple):
    """An unlearned model, in the mode of the original, and how the run went."""

    model: nn.Module
    run: UnlearningRun


@config
class Unlearning:
    """How a model is unlearned, for scanners, detectors and defenses that look at what is left then.

    Attributes:
        unlearn_lr: Learning rate of SGD with momentum 0.9 that ascends the cross-entropy, above 0.
        unlearn_weight_decay: Weight decay of the same, at least 0.
        unlearn_epochs: Passes over the images at most; the learning rate falls to a tenth after 10 and after 20.
        floor: Unlearning ends when the accuracy, measured on the batches in training mode before each update, is at
            or below this fraction.
        batch_size: Images per step, at most; fewer where there are less than four batches of them.
    """

    unlearn_lr: float = Field(default=0.01, gt=0)
    unlearn_weight_decay: float = Field(default=5e-4, ge=0)
    unlearn_epochs: int = Field(default=21, ge=1)
    floor: float = Field(default=0.2, gt=0, lt=1)
    batch_size: int = Field(default=128, ge=2)

    def viewed(self, clean: CleanSet, generator: torch.Generator, view: View) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the images once, shuffled, in at least four steps where there are enough for that.

        No batch holds a single image, which BatchNorm could not take; where there is just one, it is shown twice.
        """
        shown = clean if len(clean) > 1 else clean.take([0, 0])
        return shown.batches(size_with_enough_steps(len(shown), self.batch_size), generator, VIEWS[view])

    def unlearn(
        self,
        model: nn.Module,
        clean: CleanSet,
        seed: int,
        view: View,
        detail: str = "",
        clip: float | None = None,
    ) -> UnlearnedModel:
        """Maximize the loss on clean images until the accuracy is gone.

        Not reaching the floor is a normal outcome and so is divergence: the last finite state is what is returned.

        Args:
            model: The network; it is not changed.
            clean: The images to unlearn.
            seed: Decides order, augmentation and dropout.
            view: How the images are shown: as they are, with Gaussian noise, or cropped and flipped.
            detail: Which of several runs this is, for progress.
            clip: Largest l2 norm of the gradient; a longer one is shortened to it.
        """
        generator = new_generator(seed)
        torch.manual_seed(seed)
        unlearned = copy.deepcopy(model).train()

        done = fit(
            list(unlearned.parameters()),
            supervised(unlearned, sign=-1),
            lambda: self.viewed(clean, generator, view),
            partial(torch.optim.SGD, lr=self.unlearn_lr, momentum=0.9, weight_decay=self.unlearn_weight_decay),
            self.unlearn_epochs,
            name="unlearn",
            detail=detail,
            schedule=partial(MultiStepLR, milestones=[10, 20]),
            buffers=list(unlearned.buffers()),
            clip=clip,
            stop=lambda epoch: epoch.accuracy <= self.floor,
        )
        trace = [
            UnlearningPoint(epoch=number, accuracy=epoch.accuracy, shares=epoch.shares.tolist())
            for number, epoch in enumerate(done.epochs, start=1)
        ]
        last = done.epochs[-1].shares if done.epochs else torch.zeros(1)
        run = UnlearningRun(
            seed=seed,
            view=view,
            images=len(clean),
            reached=done.stopped,
            label=int(last.argmax()),
            share=float(last.max()),
            trace=trace,
        )
        for module, original in zip(unlearned.modules(), model.modules(), strict=True):
            module.training = original.training
        return UnlearnedModel(unlearned, run)

    def survey(self, model: nn.Module, clean: CleanSet, seed: int, runs: int) -> list[UnlearningRun]:
        """Unlearn several times, each time on a seed of its own and every second time with noise.

        The network runs as :func:`~untrojan.speed.faster` gives it, for only which class survives is asked.

        Args:
            model: As for :meth:`unlearn`.
            clean: As for :meth:`unlearn`.
            seed: That of the first run.
            runs: How many.
        """
        views: tuple[View, View] = ("plain", "noise")
        quick = faster(model, clean)
        return [self.unlearn(quick, clean, seed + run, views[run % 2], f"{run + 1}/{runs}").run for run in range(runs)]


def warn_of_missed_floor(epochs: Sequence[UnlearningPoint | Epoch], floor: float) -> None:
    """Warn that unlearning ended above its floor, after these epochs."""
    ended = f"an accuracy of {epochs[-1].accuracy:.2f}" if epochs else "the first step"
    text = f"unlearning ended at {ended}, not at the floor of {floor:.2f}; the last state is used"
    warnings.warn(UnreliableWarning(text), stacklevel=3)


def diagnose(runs: list[UnlearningRun]) -> Diagnosis:
    """Read the target label off unlearning runs: the class that holds most predictions at their ends.

    Shares are averaged over the runs of each view first, then over the views.

    Args:
        runs: The runs on one model.

    Returns:
        Every class with its mean share, best first, and the verdict by :data:`RULE`. Runs that left the numbers
        within their first epoch say nothing.
    """
    ends: dict[str, list[Tensor]] = {}
    for run in runs:
        if run.trace:
            ends.setdefault(run.view, []).append(torch.tensor(run.trace[-1].shares))
    if not ends:
        return Diagnosis(verdict="inconclusive", rule=RULE, targets=[], runs=runs)
    views = torch.stack([torch.stack(view).mean(0) for view in ends.values()])
    shares = views.mean(0)
    verdict: Verdict = "inconclusive"
    if ends.keys() == {"plain", "noise"}:
        agree = len(views.argmax(1).unique()) == 1
        plain, noise = ([run.reached for run in runs if run.view == view] for view in ("plain", "noise"))
        if agree and all(plain + noise) and shares.max() >= FOUND_SHARE:
            verdict = "found"
        elif not agree and all(noise) and not any(plain):
            verdict = "not_found"
    return Diagnosis(
        verdict=verdict,
        rule=RULE,
        targets=[
            Target(label=label, score=float(shares[label]))
            for label in shares.argsort(descending=True, stable=True).tolist()
        ],
        runs=runs,
    )


@config
class UnlearningScanner(Unlearning, Scanner):
    """Unlearn the model several times and see which class survives.

    Clean images are unlearned by maximizing their loss. What a model knows of clean images goes; a backdoor, which no
    clean image exercises, stays, and its target label is what the model still says. A class can also survive because
    natural features of it do, so half of the runs show the images with Gaussian noise, which takes these away.

    Attributes:
        runs: How many unlearning runs, each on its own seed; every second one with noise, so that a verdict takes two.

    Needs:
        Clean images.

    Cost:
        3 F per image, epoch and run, F being one image through the network once: at most 252 F per image.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> [run.view for run in UnlearningScanner(runs=2, unlearn_epochs=1).scan(net, clean).runs]
        ['plain', 'noise']

    References:
        Li et al.: Reconstructive neuron pruning for backdoor defense, ICML 2023, arXiv:2305.14876.

    Deviations:
        * The label is read off several unlearned models, not off one, and half of them are unlearned with noise.
        * Images are otherwise unlearned as they are; the published code crops and flips them.
        * With fewer images than four batches the batches are smaller, so that few images still mean enough steps.
        * The rule of the verdict is the project's own.
    """

    name: ClassVar[str] = "unlearning"
    runs: int = Field(default=4, ge=1)

    def _scan(self, model: nn.Module, clean: CleanSet, seed: int) -> Diagnosis:
        return diagnose(self.survey(model, clean, seed, self.runs))
