"""TSBD: zero the weights that unlearning changes most, then fine-tune where the loss is flat."""

import copy
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, boldest, gradients, moved, sgd_cosine, tangent
from untrojan.device import new_generator
from untrojan.errors import ModelError
from untrojan.fit import fit, learnable, supervised
from untrojan.mask import Mask
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.scanners.unlearning import warn_of_missed_floor

_SHARES = (0.01, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9)
_TINY = 1e-12


@config
class TSBD(Tuning):
    """TSBD: zero the weights that unlearning clean images changes most, then fine-tune with a gradient-norm penalty.

    A copy of the model unlearns clean images slowly, by maximizing their loss. Filters are ranked by their neuron
    weight change, the sum of the absolute changes of their weights; the filters that change most on clean images are
    those that change most on poisoned ones too, and carry the backdoor. Inside the n % of filters that changed most,
    the m % of the weights that changed most are set to zero in the original model.

    Neurons of a backdoored model are also more active: their gradients are larger. Fine-tuning therefore mixes the
    gradient with that of a point a step uphill, g = (1 - alpha) g1 + alpha g2, which penalizes the norm of the
    gradient.

    Attributes:
        variant: `fixed` or `released`; see Deviations.
        unlearn_lr: Learning rate of SGD with momentum 0.9 that ascends the cross-entropy, above 0.
        unlearn_epochs: Passes over the images to unlearn, at most.
        floor: Unlearning ends when the accuracy, measured on the batches in training mode before each update, is at
            or below this fraction, or below what always giving the most frequent class would reach.
        m: Share of the weights of a chosen filter that are zeroed, in (0, 1].
        prune_budget: Accepted loss of clean accuracy by zeroing, before fine-tuning wins it back, as a fraction; how
            many filters are chosen follows from it.
        r: Length of the step uphill, in each parameter tensor.
        alpha: Weight of the gradient found there, in [0, 1].
        lr: Learning rate of SGD with momentum 0.9 to fine-tune.
        epochs: Passes over the images to fine-tune.

    Needs:
        Clean images.

    Cost:
        3 F per image and epoch to unlearn, 3000 F at most, 12 F per held-out image to choose the filters, 6 F per image
        and epoch to fine-tune: 120 F per image. Unlearning ends at the floor, usually long before its last epoch.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> TSBD(unlearn_epochs=1, epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'tsbd'

    References:
        Lin, Liu, Wei, Li, Xiong: Unveiling and mitigating backdoor vulnerabilities based on unlearning weight changes
        and backdoor activeness, NeurIPS 2024, arXiv:2405.20291.

    Deviations:
        * The released code repairs with every n of its list and leaves the choice to the reader, who sees the attack
          succeed or not. Here n is the largest of the same list before the accuracy on held-out clean images first
          falls by more than `prune_budget`, before fine-tuning; the paper too aims at an acceptable loss there.
        * The weights to zero are the share m of each chosen filter. The released code pools the weights of all chosen
          filters and zeroes the share m of the pool.
        * All convolutions and linear layers but the last are ranked; the released code leaves out linear layers, and
          shortcuts, which it knows by their name.
        * Weights that unlearning did not change at all are never zeroed.
        * The released code ends unlearning by the accuracy in evaluation mode after each epoch, which costs another
          pass. Its floor of 0.1 is what a collapsed model reaches on ten classes of equal size; with fewer classes, or
          some larger than others, it would go on until its last epoch or beyond the numbers, hence the second end. A
          floor that is not reached is reported, and the last state is used.
        * The released code copies the model for the two gradients, and runs the model a third time after the update,
          which is what its running statistics follow. Here they follow the first pass, and there is no third.
        * A gradient of zero leaves its tensor where it is; the released code divides by its norm.
        * The released code fine-tunes for one epoch more than it is told, and crops and flips in batches of 256 on 5 %
          of the training set. Here images are taken as they are (`augment`), and batches are smaller where there are
          few images. A part of them is held out to choose n and to judge the result.

        With `variant="released"` weights are pooled, those that did not change among them, linear layers are left out,
        and fine-tuning takes one epoch more; shortcuts stay, for nothing but their names tells them.
    """

    name: ClassVar[str] = "tsbd"

    variant: Literal["fixed", "released"] = "fixed"
    unlearn_lr: float = Field(default=1e-4, gt=0)
    unlearn_epochs: int = Field(default=1000, ge=1)
    floor: float = Field(default=0.1, gt=0, lt=1)
    m: float = Field(default=0.7, gt=0, le=1)
    prune_budget: float = Field(default=0.1, gt=0, lt=1)
    r: float = Field(default=0.05, gt=0)
    alpha: float = Field(default=0.7, ge=0, le=1)
    lr: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=20, ge=1)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Zero what unlearning `clean` changes most, as far as `held` allows, and train what is left."""
        scores = self._changes(model, self._unlearn(model, clean, seed))
        filters = sum(len(value) for value in scores.values.values())
        counts = sorted({int(share * filters) for share in _SHARES} - {0} or {1})
        if self.variant == "released":
            cuts = {count: partial(_pooled, m=self.m, count=count) for count in counts}
        else:
            scores = _most_changed(scores, self.m)
            cuts = {count: partial(Mask.threshold, threshold=count - 1) for count in counts}
        zeroed = boldest(model, scores, cuts, held, self.prune_budget, "filters with weights zeroed").bake(model)
        self._fine_tune(zeroed.train(), clean, seed)
        return zeroed

    def _unlearn(self, model: nn.Module, clean: CleanSet, seed: int) -> nn.Module:
        unlearned = copy.deepcopy(model).train()
        floor = max(self.floor, max(clean.counts) / len(clean))

        done = fit(
            list(unlearned.parameters()),
            supervised(unlearned, sign=-1),
            partial(self.batches, clean, new_generator(seed)),
            partial(torch.optim.SGD, lr=self.unlearn_lr, momentum=0.9),
            self.unlearn_epochs,
            name="unlearn",
            buffers=list(unlearned.buffers()),
            stop=lambda epoch: epoch.accuracy <= floor,
        )
        if not done.stopped:
            warn_of_missed_floor(done.epochs, floor)
        return unlearned

    def _changes(self, model: nn.Module, unlearned: nn.Module) -> Mask:
        """How much unlearning changed every weight that is ranked."""
        names = Mask.ones(model, "weight").values
        if self.variant == "released":
            names = [name for name in names if model.get_parameter(name).ndim > 2]
            if not names:
                raise ModelError("nothing to rank: the released code ranks convolutions, and the network has none")
        changes = {name: unlearned.get_parameter(name) - model.get_parameter(name) for name in names}
        return Mask(changes, "weight").map(lambda change: change.detach().abs())

    def _fine_tune(self, model: nn.Module, clean: CleanSet, seed: int) -> None:
        weights = list(filter(learnable, model.parameters()))

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            out = model(images)
            here = functional.cross_entropy(out, labels)
            slopes = gradients(here, weights)
            uphill = [self.r * slope / (slope.norm() + _TINY) for slope in slopes]
            there = functional.cross_entropy(moved(model, images, uphill), labels)
            return (1 - self.alpha) * tangent(here, weights, slopes) + self.alpha * there, out

        epochs = self.epochs + (self.variant == "released")
        batches = partial(self.batches, clean, new_generator(seed))
        sgd_cosine(model, batches, lr=self.lr, last_lr=self.lr, epochs=epochs, step=step)


def _most_changed(changes: Mask, m: float) -> Mask:
    """Give the weights to zero the place of their filter, 0 for the one that changed most, and infinity to the others.

    Args:
        changes: How much every weight changed.
        m: Share of the weights of a filter that are to be zeroed.
    """
    scores = {}
    for (name, change), place in zip(changes.values.items(), _filter_places(changes), strict=True):
        rows = change.flatten(1)
        chosen = (_places(rows) < round(m * rows.shape[1])) & (rows > 0)
        scores[name] = torch.where(chosen, place[:, None].float(), torch.inf).view_as(change)
    return Mask(scores, "weight")


def _pooled(changes: Mask, m: float, count: int) -> Mask:
    """Zero the weights that changed most, a share `m` of all those of the `count` filters that changed most."""
    chosen = [place < count for place in _filter_places(changes)]
    scores, pool = {}, 0
    for (name, change), rows in zip(changes.values.items(), chosen, strict=True):
        scores[name] = torch.where(rows.view(-1, *[1] * (change.ndim - 1)), -change, torch.inf)
        pool += change[rows].numel()
    return Mask(scores, "weight").count(round(m * pool))


def _filter_places(changes: Mask) -> tuple[Tensor, ...]:
    """The place of every filter among those of all layers, 0 for the one that changed most."""
    sums = [change.flatten(1).sum(1) for change in changes.values.values()]
    return _places(torch.cat(sums)).split([len(each) for each in sums])


def _places(values: Tensor) -> Tensor:
    """The place of each value along the last dimension, 0 for the largest."""
    return values.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
