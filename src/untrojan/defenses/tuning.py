"""The base of the defenses that train the weights on clean images."""

import copy
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from untrojan.augmentation import AUGMENTATIONS
from untrojan.data import CleanSet
from untrojan.defenses.defense import Defense, Outcome
from untrojan.errors import ModelError, UnreliableWarning
from untrojan.fit import Fit, Step, fit, learnable, size_with_enough_steps, supervised
from untrojan.mask import Cut, HeldOut, Mask, budget, sweep
from untrojan.model import call_with, correct
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.run import chose


@config
class Tuning(Defense):
    """Base of the defenses that train on clean images; authors write :meth:`tune`.

    A part of the images is held out, so that the result is judged on images that it was not trained on. Where that
    would take away a class, as with one image per class, all images are trained on and a warning says so.

    Attributes:
        hold_out: Share of the images that are not trained on, in [0, 1).
        batch_size: Images per step, at most; fewer where there are less than four batches of them.
        augment: How images are varied in training: `none`, or `crop-flip`, a shift by up to 4 pixels and a mirror
            image now and then, which is not right for all data (a mirrored traffic sign or digit is another one).
    """

    hold_out: float = Field(default=0.2, ge=0, lt=1)
    batch_size: int = Field(default=128, ge=2)
    augment: Literal["none", "crop-flip"] = "none"

    @abstractmethod
    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Give the repaired model; `model` is a copy that may be changed in place, in whatever mode it is left.

        Args:
            model: The network.
            clean: The images to train on.
            held: The images to choose settings by, never to train on.
            diagnosis: What the scan found.
            seed: Decides everything random; torch's own random state is seeded too.
        """

    def batches(self, clean: CleanSet, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the images once, shuffled and augmented, in enough steps, never one of a single image."""
        size = size_with_enough_steps(len(clean), self.batch_size)
        return clean.batches(size, generator, AUGMENTATIONS[self.augment])

    def _repair(self, model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> Outcome:
        _warn_of_coarse(model)
        rest, held = _split(clean, self.hold_out, seed)
        before, original = correct(model, held), copy.deepcopy(model)
        tuned = self.tune(model, rest, held, diagnosis, seed)
        try:
            after = correct(tuned, held)
        except ModelError as error:
            text = f"the last step of {self.name} left the numbers, so that the weights stay as they were: {error}"
            warnings.warn(UnreliableWarning(text), stacklevel=2)
            tuned, after = original, before
        return Outcome(tuned, before, after, held_out=held is not rest)


def sgd_cosine(
    model: nn.Module,
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]],
    *,
    lr: float,
    epochs: int,
    weight_decay: float = 0.0,
    last_lr: float = 0.0,
    step: Step | None = None,
    parameters: Sequence[Tensor] | None = None,
    project: Callable[[], object] | None = None,
    schedule_steps: bool = False,
    name: str = "fine-tune",
) -> Fit:
    """Train by SGD with momentum 0.9 and a cosine schedule, in the mode that the model is in.

    Args:
        model: The network, changed in place.
        batches: Called once per epoch for its batches.
        lr: Learning rate at the beginning.
        epochs: Passes over the data; 0 does nothing.
        weight_decay: At least 0.
        last_lr: Learning rate at the end.
        step: From images and labels to loss and logits; the cross-entropy of the model where it is not given.
        parameters: What is trained; all of the model where it is not given.
        project: Called after each update.
        schedule_steps: Step the schedule after each update instead of each epoch, so that the learning rate swings.
        name: What the work is called in progress and timings.
    """
    return fit(
        list(model.parameters()) if parameters is None else parameters,
        step or supervised(model),
        batches,
        partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=weight_decay),
        epochs,
        name=name,
        schedule=partial(CosineAnnealingLR, T_max=max(epochs, 1), eta_min=last_lr),
        schedule_steps=schedule_steps,
        buffers=list(model.buffers()),
        project=project,
    )


def gradients(loss: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give the gradient by each of the weights; zeros where the loss does not depend on them."""
    return torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)


def tangent(loss: Tensor, weights: Sequence[Tensor], slopes: Sequence[Tensor]) -> Tensor:
    """Give a loss of the same value, with the slopes as its gradient by the weights and its backward pass paid for."""
    rise = sum(((weight - weight.detach()) * slope).sum() for weight, slope in zip(weights, slopes, strict=True))
    return loss.detach() + rise


def moved(model: nn.Module, images: Tensor, moves: Sequence[Tensor]) -> Tensor:
    """Run a network as if its weights were elsewhere; neither they nor its running statistics change.

    Args:
        model: The network, in the mode wanted.
        images: `(N, C, H, W)` in [0, 1].
        moves: What is added to each of `model.parameters()` that is :func:`~untrojan.fit.learnable`.

    Returns:
        Logits `(N, K)`, with gradients reaching the weights.
    """
    weights = [(name, weight) for name, weight in model.named_parameters() if learnable(weight)]
    elsewhere = {name: weight + move for (name, weight), move in zip(weights, moves, strict=True)}
    return call_with(model, images, elsewhere | {name: value.clone() for name, value in model.named_buffers()})


def boldest(model: nn.Module, scores: Mask, cuts: Mapping[int, Cut], held: CleanSet, drop: float, what: str) -> Mask:
    """Prune as much as held-out images allow before fine-tuning.

    Args:
        model: The network to prune; it is not changed.
        scores: What the cuts go by.
        cuts: Ways to prune by how many units they prune, mildest first.
        held: Images to judge by, compared with the original image by image.
        drop: Accepted loss of accuracy, as a fraction.
        what: What the number of units is called in the record.

    Returns:
        Zeros where a weight is pruned and ones elsewhere: the last cut before accuracy first falls by more than `drop`.
    """
    chosen = budget(sweep(model, [HeldOut(scores, held)], [*cuts.values()]), correct(model, held), drop)
    count = 0 if chosen is None else [*cuts][chosen]
    chose(what, count)
    if chosen is None:
        text = f"nothing is pruned: even the mildest pruning costs more clean accuracy than the accepted {drop:.1%}"
        warnings.warn(UnreliableWarning(text), stacklevel=2)
        return scores.map(torch.ones_like)
    return cuts[count](scores)


def _warn_of_coarse(model: nn.Module) -> None:
    coarse = {parameter.dtype for parameter in model.parameters()} & {torch.float16, torch.bfloat16}
    if coarse:
        kinds = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in coarse))
        text = f"weights of type {kinds} round small updates away, so that little may be learned: convert to float32"
        warnings.warn(UnreliableWarning(text), stacklevel=3)


def _split(clean: CleanSet, share: float, seed: int) -> tuple[CleanSet, CleanSet]:
    """What to train on and what to judge by: the same images where too few can be held out."""
    if share:
        rest, held = clean.split(share, seed)
        if set(rest.labels.tolist()) == set(clean.labels.tolist()):
            return rest, held
        text = "too few images to hold any out: the accuracy after is measured on the images that were trained on"
        warnings.warn(UnreliableWarning(text), stacklevel=2)
    return clean, clean
