"""RNP: unlearn the clean task, recover it by scaling neurons down, prune the neurons that had to go."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.pruning import Pruning
from untrojan.device import device_of, new_generator, running_on
from untrojan.fit import fit, size_without_single, supervised
from untrojan.mask import Mask, require_effect
from untrojan.randomness import seeded
from untrojan.record import Check, UnlearningRun
from untrojan.registry import config
from untrojan.scanners.unlearning import VIEWS, Unlearning, View, warn_of_missed_floor


@config
class RNP(Unlearning, Pruning):
    """Reconstructive Neuron Pruning: prune the neurons that have to go for an unlearned copy to recover.

    A copy of the model unlearns clean images, by maximizing their loss, until its accuracy is gone; the backdoor,
    which no clean image exercises, survives. Then the copy, its weights frozen, recovers accuracy on the same images
    by scaling neurons down only. The neurons that have to be scaled down are those that carry the backdoor; they are
    pruned from the original model. The class that survives unlearning is the target label.

    A neuron is the scale of one channel (see :class:`untrojan.mask.Mask`): of BatchNorm where there is one, else of
    GroupNorm or LayerNorm, else of a convolution or linear output. A score in [0, 1] is the recovered multiplier.
    Neurons with multiplier 0 are told apart by scores in (-1, 0]: minus the share of the recovery that they spent
    masked, so that one with -0.9 was masked almost at once. A channel that goes straight into BatchNorm without a scale
    of its own keeps a multiplier of about 1, because normalization undoes every change of its scale; a network where
    that holds for all of them is refused.

    Attributes:
        threshold: Prune neurons with a score at or below this, in [-1, 1], for `threshold`.
        recover_lr: Learning rate of SGD with momentum 0.9 on the masks; it includes the loss factor 0.2 of the
            published code (0.2 x 0.2).
        recover_epochs: Passes over the images to recover.

    Needs:
        Clean images.

    Cost:
        3 F per image and epoch to unlearn, 63 F at most, and 2 F per image and epoch to recover, 40 F, where F is one
        image through the network once. All images are scored once, and once more without the part that is judged: 206 F
        per image at most, half of it with `released`. In a network without normalization it is 3 F to recover, 60 F,
        and 246 F at most. Each point of the pruning curve adds 1 F per image.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 10
        >>> method = RNP(select="count", count=3, unlearn_epochs=1, recover_epochs=1)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> repair = method.repair(build("digits-cnn"), CleanSet(images, labels), suspicion)
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
        * In networks without BatchNorm the scales of other normalization are masked, or else the outputs of
          convolutions and linear layers, so that in a transformer those of LayerNorm are, and no hidden units.
        * The target label is that of the scan, not that of the one unlearning run.
        * Neurons with multiplier 0 are ordered by how early they got there, so that fewer than all of them can go.
        * With fewer images than four batches the batches are smaller, so that few images still mean enough steps.
        * Batches are larger where one would hold a single image, which BatchNorm cannot take, also with `released`.
        * An accuracy floor that is not reached is reported, and the last state is used; the published code stops
          without writing it, and its next stage reads whatever file is there.
        * A loss that leaves the numbers ends the stage at the last finite state.

        Published and kept: the loss factor 0.2, as one number with the learning rate; no gradient clipping, because
        theirs stands before the backward pass and does nothing; the bias of a pruned channel stays
        (`zero_bias`).
        With `variant="released"` images are cropped and flipped throughout, all of them are used to learn the masks,
        masks are rounded to four decimals, and the threshold must be given.
    """

    name: ClassVar[str] = "rnp"
    scores: ClassVar[str] = (
        "the part of a unit that is kept when the unlearned network recovers by giving up units; below 0 are "
        "units given up entirely, the earlier the further below"
    )

    threshold: float = Field(default=0.2, ge=-1, le=1)
    recover_lr: float = Field(default=0.04, gt=0)
    recover_epochs: int = Field(default=20, ge=1)

    def viewed(self, clean: CleanSet, generator: torch.Generator, view: View) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the images once, shuffled; `released` never makes the batches smaller."""
        if self.variant == "released":
            size = size_without_single(len(clean), self.batch_size)
            return clean.batches(size, generator, VIEWS[view])
        return super().viewed(clean, generator, view)

    def score(self, model: nn.Module, clean: CleanSet, seed: int, detail: str = "") -> Mask:
        """Score every neuron by the multiplier that recovery leaves it."""
        return self.learn(model, clean, seed, detail).scores

    def learn(self, model: nn.Module, clean: CleanSet, seed: int, detail: str = "") -> "Learned":
        """Unlearn and recover once, without judging or pruning.

        Args:
            model: The network; it is not changed.
            clean: The images to learn from.
            seed: Decides order, augmentation and dropout.
            detail: Which of several rounds this is, for progress.

        Returns:
            The scores of all neurons, and how the unlearning went.

        Raises:
            ModelError: Normalization undoes every change of a neuron's scale.
        """
        view = "crop-flip" if self.variant == "released" else "plain"
        with running_on(device_of(model)), seeded(seed):
            require_effect(copy.deepcopy(model), clean.take([0, -1]).floats(), "RNP")
            unlearned, run = self.unlearn(model, clean, seed, view, detail)
            if not run.reached:
                warn_of_missed_floor(run.trace, self.floor)
            return Learned(self._recover(unlearned, clean, seed, detail), run)

    def _recover(self, unlearned: nn.Module, clean: CleanSet, seed: int, detail: str) -> Mask:
        generator = new_generator(seed)
        unlearned = unlearned.train().requires_grad_(False)
        mask = Mask.ones(unlearned, "neuron")
        masked = list(mask.values.values())
        sums = [torch.ones_like(value) for value in masked]
        steps = 1

        def project() -> None:
            nonlocal steps
            steps += 1
            for value, total in zip(masked, sums, strict=True):
                total += value.clamp_(0, 1)

        fit(
            masked,
            supervised(partial(mask.call, unlearned)),
            lambda: self.viewed(clean, generator, "crop-flip"),
            partial(torch.optim.SGD, lr=self.recover_lr, momentum=0.9),
            self.recover_epochs,
            name="recover",
            detail=detail,
            project=project,
        )
        return self.ordered(mask, [total / steps - 1 for total in sums])

    def _demands(self, scores: Mask, kept: Mask) -> list[Check]:
        return [_prunes_masked(scores, kept)]


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


class Learned(NamedTuple):
    """The score of every neuron, and the unlearning run that they come from."""

    scores: Mask
    run: UnlearningRun
