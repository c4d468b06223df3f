"""ULRL: unlearn, start the rows of the last layer that moved too far from scratch, and relearn."""

import warnings
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, sgd_cosine
from untrojan.device import new_generator
from untrojan.errors import ModelError, UnreliableWarning
from untrojan.mask import products
from untrojan.model import classes_of
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.run import chose
from untrojan.scanners.neural_cleanse import anomaly_index
from untrojan.scanners.unlearning import Unlearning, warn_of_missed_floor

MOST = 2
_CLIP = 20.0


@config
class ULRL(Unlearning, Tuning):
    """Unlearn and Relearn: reset the rows of the last layer that unlearning moves too far, and train again.

    A copy of the model unlearns clean images, by maximizing their loss, until its accuracy is gone. In the last layer
    the row of the target class then moves unlike those of the other classes: a row is suspicious when the sum of its
    absolute changes lies more than `z` robust standard deviations above the median. In the original model suspicious
    rows, at most two, are drawn anew and their biases set to 0; then all of it is trained on clean images, by the
    cross-entropy plus alpha times the cosine between each new row and the old one, which keeps it from going back.

    Attributes:
        variant: `fixed` or `released`; see Deviations.
        z: Robust standard deviations from which a row is suspicious, above 0.
        alpha: Weight of the cosine between new and old rows, at least 0.
        lr: Learning rate of SGD with momentum 0.9 at the beginning, above 0; it falls to 0 along a cosine.
        epochs: Passes over the images to relearn.
        weight_decay: At least 0; `released` has none.

    Needs:
        Clean images, and a network whose last layer has one row of weights per class.

    Cost:
        3 F per image and epoch, of at most 21 to unlearn and of 20 to relearn: at most 123 F per image, where F is one
        image through the network once.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> ULRL(unlearn_epochs=1, epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'ulrl'

    References:
        Min, Pham, Sun: Unified neural backdoor removal with only few clean samples through unlearning and relearning,
        2024, arXiv:2405.14781.

    Deviations:
        * Of more than two suspicious rows the two that moved most are reset; the published code takes the first two
          classes, and so does `variant="released"`.
        * Where no row is suspicious nothing is reset, as published; here a warning says that what remains is plain
          fine-tuning.
        * The median of an even number of rows is the mean of the two in the middle; the published code takes the lower
          one. Of two classes no row then lies more than 0.67 deviations above it, and nothing is reset.
        * Where more than half of the rows moved alike, the mean deviation stands in for the median one; the published
          code divides by zero, and every row that moved more is suspicious.
        * Unlearning is that of RNP, with images as they are, without mixed precision and without clipping the gradient,
          for 21 epochs at most; the published code clips it at a norm of 20 and stops after 20 epochs.
        * The weight decay of relearning is that of unlearning; the published code has none.
        * Batches are smaller where there are few images.
        * A part of the images is held out to judge the result.

        With `variant="released"` rows are told by the lower medians, also where the deviation is zero, the gradient of
        unlearning is clipped, and relearning has no weight decay.
    """

    name: ClassVar[str] = "ulrl"

    variant: Literal["fixed", "released"] = "fixed"
    z: float = Field(default=3.5, gt=0)
    alpha: float = Field(default=0.7, ge=0)
    lr: float = Field(default=0.005, gt=0)
    epochs: int = Field(default=20, ge=1)
    weight_decay: float = Field(default=5e-4, ge=0)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Unlearn a copy, reset the suspicious rows, relearn."""
        head = _head(model, clean)
        rows = self.suspicious(model, clean, seed)
        chose("rows reset", [*rows])
        if not rows:
            text = f"no row of the last layer moved more than {self.z:g} deviations; nothing is reset, only fine-tuned"
            warnings.warn(UnreliableWarning(text), stacklevel=2)
        generator = new_generator(seed)
        weight = head.get_parameter("weight")
        old = weight.detach()[rows].flatten(1)
        self._reset(head, rows, generator)

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            out = model(images)
            back = functional.cosine_similarity(weight[rows].flatten(1), old).sum()
            return functional.cross_entropy(out, labels) + self.alpha * back, out

        sgd_cosine(
            model.train(),
            partial(self.batches, clean, generator),
            lr=self.lr,
            epochs=self.epochs,
            weight_decay=0.0 if self.variant == "released" else self.weight_decay,
            step=step,
            name="relearn",
        )
        return model

    def suspicious(self, model: nn.Module, clean: CleanSet, seed: int) -> list[int]:
        """Name the classes whose rows of the last layer unlearning moves too far, at most two, ascending.

        Args:
            model: The network; it is not changed.
            clean: The images to unlearn.
            seed: Decides everything random.
        """
        released = self.variant == "released"
        unlearned, run = self.unlearn(model, clean, seed, "plain", clip=_CLIP if released else None)
        if not run.reached:
            warn_of_missed_floor(run.trace, self.floor)
        after, before = (net.get_submodule(products(net)[-1]).get_parameter("weight") for net in (unlearned, model))
        moved = (after - before).detach().abs().flatten(1).sum(1)
        if released:
            away = moved - moved.median()
            return (away / (1.4826 * away.abs().median()) > self.z).nonzero().flatten().tolist()[:MOST]
        over = [row for row, index in enumerate(anomaly_index(moved.tolist())) if index > self.z]
        return sorted(sorted(over, key=lambda row: float(moved[row]), reverse=True)[:MOST])

    def _reset(self, head: nn.Module, rows: list[int], generator: torch.Generator) -> None:
        parameters = dict(head.named_parameters())
        weight, bias = parameters["weight"], parameters.get("bias")
        limit = (2 / weight[0].numel()) ** 0.5
        with torch.no_grad():
            new = torch.empty(len(rows), *weight.shape[1:], dtype=weight.dtype)
            weight[rows] = new.uniform_(-limit, limit, generator=generator)
            if bias is not None:
                bias[rows] = 0


def _head(model: nn.Module, clean: CleanSet) -> nn.Module:
    """The layer that gives the logits."""
    classes, names = classes_of(model, clean), products(model)
    head = model.get_submodule(names[-1]) if names else nn.Identity()
    rows = len(dict(head.named_parameters()).get("weight", ()))
    if rows != classes:
        last = f"{names[-1]} with {rows} rows of its own" if names else "none"
        raise ModelError(f"ULRL resets rows of the last layer: expected one with a row for each class, got {last}")
    return head
