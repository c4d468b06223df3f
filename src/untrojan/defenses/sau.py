"""SAU: unlearn the adversarial examples that the model shares with its backdoored self."""

import copy
import math
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning
from untrojan.device import new_generator
from untrojan.fit import fit
from untrojan.record import Diagnosis
from untrojan.registry import config

_ROUNDING = 1e-6
_SURE = 0.999


@config
class SAU(Tuning):
    """Shared Adversarial Unlearning: stop agreeing with the backdoored model where both are fooled alike.

    A poisoned image is an adversarial example of the backdoored model, and one that the model being repaired shares: it
    fools both into the same label. For every batch, shared adversarial examples are searched: perturbations, bounded in
    the maximum norm, that fool the model and a frozen copy of the original and make their outputs agree. Then the
    weights are trained on the clean images and away from the label that the frozen copy gives to the adversarial ones,
    which makes the shared examples unshared.

    Attributes:
        variant: `fixed` or `released`; see Deviations.
        batch_size: Images per step, at most; fewer where there are less than four batches of them.
        lr: Learning rate of Adam, above 0.
        epochs: Passes over the images.
        radius: Largest change of a pixel, in units of the pixel range, above 0.
        step_size: Change of a pixel by one step of the search, above 0; at the radius a step can cross half the ball.
        iterations: Steps of the search.
        beta_1: Factor of fooling both networks in the search, at least 0.
        beta_2: Factor of their agreement (Jensen-Shannon divergence) in the search, at least 0.
        lambda_1: Factor of the cross-entropy on clean images, at least 0.
        lambda_2: Factor of the cross-entropy on adversarial images with their true labels, at least 0.
        lambda_3: Factor of the shared loss, at least 0.

    Needs:
        Clean images.

    Cost:
        27 F per image and epoch at most, 2,700 F per image: each of 5 steps of the search takes both networks forward
        and back to the pixels, 4 F; training takes 3 F for the clean and 3 F for the adversarial image; the label of
        the frozen copy takes 1 F. A search ends early where every example of the batch is shared.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> SAU(epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'sau'

    References:
        Wei, Zhang, Zha, Wu: Shared adversarial unlearning: backdoor mitigation by unlearning shared adversarial
        examples, NeurIPS 2023, arXiv:2307.10562.

    Deviations:
        * Adversarial images stay within [0, 1]; BackdoorBench lets them leave it.
        * A network is fooled where it does not give the true label. In BackdoorBench's search it is where it does not
          give what it says of the unchanged image; and in the shared loss the frozen copy is only where it gives
          neither.
        * BackdoorBench takes a probability of the other labels above 0.999 for that, so that the shared loss lets go of
          images on which the model disagrees for good.
        * The shared loss has two logarithms, of the summed probability of the other labels and of one minus that of the
          label. They are the same number; it is computed once.
        * Batches are smaller where there are few images.
        * A part of the images is held out to judge the result.

        With `variant="released"` images may leave [0, 1], and networks are fooled, and let go of, as in BackdoorBench,
        for 3 F per image and epoch more.
    """

    name: ClassVar[str] = "sau"

    variant: Literal["fixed", "released"] = "fixed"
    batch_size: int = Field(default=256, ge=2)
    lr: float = Field(default=1e-4, gt=0)
    epochs: int = Field(default=100, ge=1)
    radius: float = Field(default=0.2, gt=0)
    step_size: float = Field(default=0.2, gt=0)
    iterations: int = Field(default=5, ge=1)
    beta_1: float = Field(default=0.01, ge=0)
    beta_2: float = Field(default=1.0, ge=0)
    lambda_1: float = Field(default=1.0, ge=0)
    lambda_2: float = Field(default=0.0, ge=0)
    lambda_3: float = Field(default=1.0, ge=0)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Train a copy in evaluation mode."""
        generator = new_generator(seed)
        frozen = copy.deepcopy(model.eval()).requires_grad_(False)
        sure = _SURE if self.variant == "released" else math.inf

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            adversarial = self._adversarial(model, frozen, images, labels)
            with torch.no_grad():
                theirs = frozen(adversarial).argmax(1)
            fooled = (theirs != labels) & (theirs != self._unfooled(frozen, images, labels))
            out, attacked = model(torch.cat([images, adversarial])).chunk(2)
            loss = (
                self.lambda_1 * functional.cross_entropy(out, labels)
                + self.lambda_2 * functional.cross_entropy(attacked, labels)
                + self.lambda_3 * _shared_loss(attacked, theirs, fooled, sure)
            )
            return loss, out

        fit(
            list(model.parameters()),
            step,
            lambda: self.batches(clean, generator),
            partial(torch.optim.Adam, lr=self.lr),
            self.epochs,
            name="unlearn shared",
            buffers=list(model.buffers()),
        )
        return model

    def _adversarial(self, model: nn.Module, frozen: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Search images near the given ones that fool both networks into the same label."""
        low, high = images - self.radius, images + self.radius
        if self.variant == "fixed":
            low, high = low.clamp(min=0), high.clamp(max=1)
        unfooled = [self._unfooled(net, images, labels) for net in (model, frozen)]
        found = high
        for _ in range(self.iterations):
            found = found.detach().requires_grad_()
            ours, theirs = model(found), frozen(found)
            fooled = [out.argmax(1) != answer for out, answer in zip((ours, theirs), unfooled, strict=True)]
            unshared = ~(fooled[0] & fooled[1] & (ours.argmax(1) == theirs.argmax(1)))
            if not unshared.any():
                break
            kept = [
                functional.cross_entropy(out, labels, reduction="none") * ~done
                for out, done in zip((ours, theirs), fooled, strict=True)
            ]
            loss = self.beta_2 * _jensen_shannon(ours, theirs) * unshared - self.beta_1 / 2 * sum(kept)
            (slope,) = torch.autograd.grad(loss.mean(), found)
            found = torch.clamp(found - self.step_size * slope.sign(), low, high)
        return found.detach()

    def _unfooled(self, net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """What a network says of images that do not fool it: their labels or, as released, what it says without."""
        if self.variant == "fixed":
            return labels
        with torch.no_grad():
            return net(images).argmax(1)


def _jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Jensen-Shannon divergence of the probabilities that two networks' logits `(b, K)` mean: `(b,)`, in nats."""
    logs = torch.stack([one, other]).log_softmax(2)
    middle = logs.logsumexp(0) - math.log(2)
    return (logs.exp() * (logs - middle)).sum(2).mean(0)


def _shared_loss(out: Tensor, theirs: Tensor, fooled: Tensor, sure: float) -> Tensor:
    """How much the model agrees with what the frozen copy says where that is fooled.

    Args:
        out: Logits of the model `(b, K)`.
        theirs: What the frozen copy says: `(b,)`.
        fooled: Where that counts: bool `(b,)`.
        sure: Probability of all other labels from which the model disagrees for good.
    """
    others = out.softmax(1).scatter(1, theirs[:, None], 0).sum(1).clamp(max=sure)
    return -((_ROUNDING + others).log() * fooled).mean()
