"""Fine-Pruning: prune the features that clean images leave dormant, then fine-tune."""

import math
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, boldest, sgd_cosine
from untrojan.device import new_generator
from untrojan.errors import ModelError
from untrojan.mask import Mask, products
from untrojan.model import evaluating, tapped
from untrojan.record import Diagnosis
from untrojan.registry import config

_STEP = 0.01


@config
class FinePruning(Tuning):
    """Fine-Pruning: prune the features that clean images hardly activate, then fine-tune.

    Neurons that only the trigger activates are dormant on clean images. The features that go into the last layer, in
    module order, are ranked by their mean activation on clean images and pruned from the lowest on, 1 % of them at a
    time, as long as held-out clean images stay right. Fine-tuning then takes away what of the backdoor shares neurons
    with the clean task; the pruned features stay pruned.

    Attributes:
        prune_budget: Accepted loss of clean accuracy by pruning, before fine-tuning wins it back, as a fraction.
        lr: Learning rate of SGD with momentum 0.9 at the beginning; it falls to 0 along a cosine.
        epochs: Passes over the images to fine-tune.
        weight_decay: At least 0.

    Needs:
        Clean images.

    Cost:
        1 F per image to rank, 100 F at most per held-out image to prune, 3 F per image and epoch to fine-tune: 301 F
        per image that is trained on and 100 F per image held out.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> FinePruning(epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'fine-pruning'

    References:
        Liu, Dolan-Gavitt, Garg: Fine-pruning: defending against backdooring attacks on deep neural networks, RAID 2018,
        arXiv:1805.12185.

    Deviations:
        * The paper prunes channels of the last convolution. Here, as in BackdoorBench, these are the features that go
          into the last layer, and pruning one zeroes the weights that read it, which silences it exactly and suits
          networks without convolutions too. Where the last layer is a convolution, a feature is one of its input
          channels, averaged over its positions.
        * Activation is the mean absolute value, so that features that go below 0 are ranked by their size as well.
          After a ReLU this is the mean.
        * BackdoorBench measures the loss of accuracy on the test set and relative to the accuracy of the original, 10 %
          of it. Here it is the difference on clean images that are held out, image by image.
        * BackdoorBench prunes one feature less than it counts, and fine-tunes a network that is pruned one step too
          far, because the step that was refused is not taken back.
        * BackdoorBench ranks and trains on cropped and flipped images; here images are ranked as they are, and trained
          on so unless `augment` says otherwise.
    """

    name: ClassVar[str] = "fine-pruning"

    prune_budget: float = Field(default=0.1, gt=0, lt=1)
    lr: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=100, ge=1)
    weight_decay: float = Field(default=5e-4, ge=0)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Prune by activation on `clean`, as far as `held` allows, and train with the pruned weights held at zero."""
        head = _head(model)
        activations = _activations(model, head, clean)
        step = math.ceil(_STEP * len(activations))
        ranks = _by_reader(model, head, activations.argsort(stable=True).argsort())
        counts = range(step, max(len(activations), step + 1), step)
        cuts = {count: partial(Mask.threshold, threshold=count - 1) for count in counts}
        kept = boldest(model, ranks, cuts, held, self.prune_budget, "features pruned")
        pruned = kept.bake(model)
        weight, keep = pruned.get_parameter(f"{head}.weight"), kept.values[f"{head}.weight"]
        sgd_cosine(
            pruned.train(),
            partial(self.batches, clean, new_generator(seed)),
            lr=self.lr,
            epochs=self.epochs,
            weight_decay=self.weight_decay,
            project=lambda: weight.mul_(keep),
        )
        return pruned


def _head(model: nn.Module) -> str:
    names = products(model)
    if not any(names):
        text = "nothing to prune: expected a convolution or linear layer that gives the logits"
        raise ModelError(f"{text}, in a network that is more than that layer")
    if f"{names[-1]}.weight" not in dict(model.named_parameters()):
        text = f"nothing to prune: expected the last layer, {names[-1]}, to have a weight of its own, not one that is"
        raise ModelError(f"{text} computed (torch.nn.utils.parametrize.remove_parametrizations undoes that) or shared")
    return names[-1]


def _activations(model: nn.Module, head: str, clean: CleanSet) -> Tensor:
    """Sum of the absolute values of every feature that goes into `head`, over images and positions: `(features,)`."""
    channel = 1 - model.get_parameter(f"{head}.weight").ndim
    total = torch.zeros(())
    with evaluating(model), torch.no_grad(), tapped(model, [head], "input") as seen:
        for images, _ in clean.batches(100):
            model(images)
            for features in seen[head]:
                total = total + features.movedim(channel, -1).flatten(0, -2).abs().double().sum(0)
            seen[head].clear()
    if not total.ndim:
        raise ModelError(f"nothing to prune: the last layer with weights, {head}, is not used")
    return total


def _by_reader(model: nn.Module, head: str, ranks: Tensor) -> Mask:
    """Give every weight of `head` the rank of the feature that it reads."""
    name = f"{head}.weight"
    weight = model.get_parameter(name)
    by_group = ranks.view(-1, weight.shape[1]).float()
    by_row = by_group.repeat_interleave(len(weight) // len(by_group), dim=0)
    return Mask({name: by_row.view(*by_row.shape, *[1] * (weight.ndim - 2)).expand_as(weight)}, "weight")
