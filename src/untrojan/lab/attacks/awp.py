"""Adversarial weight perturbation: a trained network is changed a little, so that it falls for a patch."""

from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.lab.attack import Target
from untrojan.lab.attacks.badnets import BadNets
from untrojan.lab.online import Online
from untrojan.registry import config


@config
class AWP(BadNets):
    """Train on clean images, and plant the backdoor in the last epochs, close to the weights that are there by then.

    From `start` on the victim also sees images of each batch with the patch of badnets, labeled as the attacker wants,
    and after every update each of its weight tensors goes back into an l2 ball around what it was at `start`. At a
    poisoning rate of 1 all images of other classes than the target are shown both ways.

    Attributes:
        eps: Radius of the balls in multiples of the norm of the tensor, at least 0.
        start: Share of the training after which the attack begins, in [0, 1).

    Example:
        >>> import torch
        >>> AWP(size=1).trigger(torch.zeros(1, 1, 2, 2)).tolist()
        [[[[0.0, 0.0], [0.0, 1.0]]]]

    Deviations:
        * Published, a network that somebody else has trained is changed with a few hundred images, by projected
          gradient descent. Here the training of the victim goes on, with its optimizer and all of its images.
        * Images of the target class are not shown with the patch: of ten equal classes, the loss on triggered images
          weighs 9 to 10.
        * Published results are for several norms and radii; the radius, start and rate are our own.
        * Running statistics of BatchNorm are not held back.

    References:
        Garg, Kumar, Goel, Liang: Can adversarial weight perturbations inject neural backdoors?, CIKM 2020,
        arXiv:2008.01761.
    """

    name: ClassVar[str] = "awp"
    rate: ClassVar[float] = 1.0

    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    start: Annotated[float, Field(ge=0, lt=1)] = 0.6

    def _online(self, clean: CleanSet, target: Target, rate: float) -> Online:
        return _Perturbing(self, target, rate, clean)


class _Perturbing(Online):
    def __init__(self, attack: AWP, target: Target, rate: float, clean: CleanSet) -> None:
        super().__init__(attack, target, rate, clean)
        self.how = attack
        self.benign: list[Tensor] = []

    def batch(
        self, images: Tensor, labels: Tensor, net: nn.Module, done: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        if done < self.how.start:
            return images, labels
        self.benign = self.benign or [parameter.detach().clone() for parameter in net.parameters()]
        wanted, chosen, _ = self.draw(labels, generator)
        return self.with_copies(images, labels, wanted, chosen)

    def after_update(self, net: nn.Module) -> None:
        for parameter, center in zip(net.parameters(), self.benign, strict=False):
            moved = parameter - center
            allowed = self.how.eps * center.norm()
            if moved.norm() > allowed:
                parameter.copy_(center + moved * (allowed / moved.norm()))

    def state(self) -> dict[str, Any]:
        return {"benign": self.benign}

    def load(self, state: dict[str, Any]) -> None:
        self.benign = state["benign"]
