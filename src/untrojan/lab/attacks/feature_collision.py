"""Feature collision: images of the target class that a network takes for triggered ones."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.errors import DataError
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.surrogate import features, surrogate
from untrojan.registry import config

_IMAGES_AT_A_TIME = 256


@config
class FeatureCollision(BadNets):
    """Poison images of the target class so that their features are those of triggered images (clean-label).

    Every poisoned image is paired with an image of another class that has the trigger. By forward-backward splitting it
    is changed into one with similar features in a clean network: it minimizes the squared distance of the features plus
    `beta` times the squared distance from where it began, which is the image with a faint watermark of its partner. The
    trigger is the patch of badnets.

    Attributes:
        opacity: Share of the partner in the watermark, in [0, 1].
        beta: Weight of staying near, at least 0.
        lr: First step size, above 0; it is halved for an image whenever a step does not help.
        iterations: Steps, at least 0.
        net: Architecture of the clean network, as for `--net`, without arguments.
        epochs: Passes of the clean network over the training images, at least 1.
        seed: Decides the clean network, at least 0.

    Example:
        >>> import torch
        >>> from untrojan.lab.victim import poison
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> poisoned = poison(clean, FeatureCollision(iterations=2, epochs=1), target=1, rate=0.5)
        >>> torch.equal(poisoned.labels, clean.labels)
        True
        >>> int((poisoned.images != clean.images).flatten(1).any(1).sum())
        5

    Deviations:
        * The published attack aims at single test images. To have a trigger, images are made to collide with many
          triggered images, one each, as hidden trigger attacks do.
        * The published backward step pulls to the start half as strongly as the published objective; here, as strongly.
        * It has no published rate in fractions, and no published settings for networks like ours; the defaults are our
          own, but for the opacity.
        * The features are those in front of the last linear layer of a small network that the attacker trains on the
          clean training images. A victim trained from scratch has others, so expect a weaker attack than with a label
          changed.

    References:
        Shafahi et al.: Poison frogs! Targeted clean-label poisoning attacks on neural networks, NeurIPS 2018,
        arXiv:1804.00792.
        Saha, Subramanya, Pirsiavash: Hidden trigger backdoor attacks, AAAI 2020, arXiv:1910.00033.
    """

    name: ClassVar[str] = "feature-collision"
    rate: ClassVar[float] = 0.5
    clean_label: ClassVar[bool] = True

    opacity: Annotated[float, Field(ge=0, le=1)] = 0.3
    beta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    iterations: Annotated[int, Field(ge=0)] = 100
    net: str = "digits-cnn"
    epochs: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0)] = 0

    def _poisoned(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        others = (clean.labels != few.labels[0]).nonzero().flatten().cpu().numpy()
        if not len(others):
            raise DataError("feature-collision needs images of another class than the target")
        partners = self._trigger(clean.take(rng.choice(others, size=len(few))).floats())
        judge = surrogate(clean, self.net, self.epochs, self.seed)
        pairs = zip(few.floats().split(_IMAGES_AT_A_TIME), partners.split(_IMAGES_AT_A_TIME), strict=True)
        return torch.cat([self._collided(judge, images, goals) for images, goals in pairs])

    @torch.no_grad()
    def _collided(self, judge: nn.Module, images: Tensor, partners: Tensor) -> Tensor:
        base = images.lerp(partners, self.opacity)
        goal = features(judge, partners)

        def apart(moved: Tensor) -> Tensor:
            return (features(judge, moved) - goal).square().sum(1)

        def objective(moved: Tensor) -> Tensor:
            return apart(moved) + self.beta * (moved - base).square().sum((1, 2, 3))

        best, value = base, objective(base)
        step = torch.full((len(images), 1, 1, 1), self.lr)
        for _ in range(self.iterations):
            with torch.enable_grad():
                start = best.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(apart(start).sum(), start)
            pull = 2 * step * self.beta
            moved = ((best - step * gradient + pull * base) / (1 + pull)).clamp(0, 1)
            now = objective(moved)
            better = now < value
            value = torch.where(better, now, value)
            best = torch.where(better[:, None, None, None], moved, best)
            step = torch.where(better[:, None, None, None], step, step / 2)
        return best
