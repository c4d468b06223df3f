"""LIRA: a faint perturbation that a network learns to make, together with the victim."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.lab.attack import Target
from untrojan.lab.learned import Coder, Learned
from untrojan.lab.online import Online, update
from untrojan.model import evaluating
from untrojan.registry import config


@config
class LIRA(Learned):
    """Add a perturbation of at most `eps` that a network makes from the image.

    In the first stage every batch trains that network, to send images to the target, and then the victim; in the second
    it is fixed, and only the victim goes on. The victim always sees each batch clean and, at a poisoning rate of 1, all
    images of other classes than the target with the trigger too. As published, eps is 0.01, the network is trained by
    Adam at 0.0001, and the first stage takes a third of the epochs, 50 of 150.

    Attributes:
        eps: Largest change of a pixel, in [0, 1].
        lr: Learning rate of the network, above 0.
        stage: Share of the training in which the network is trained, in [0, 1].

    Example:
        >>> import torch
        >>> attack = LIRA(eps=0.1).begun(channels=1)
        >>> images = torch.rand(2, 1, 8, 8)
        >>> bool(((attack.trigger(images) - images).abs() <= 0.1 + 1e-6).all())
        True

    Deviations:
        * `eps` counts on images in [0, 1]; published, on normalized ones, where it is about four times as faint,
          fainter than a step of 8 bits.
        * Images of the target class do not get the trigger: of ten equal classes, the loss on triggered images weighs 9
          to 10. Published, all images get it, and both losses have a weight of 0.5.
        * The network is a small one with shortcuts and group normalization instead of an auto-encoder.
        * Victim and network train on one batch in turn; the victim does not get gradients of the step of the network,
          as it does in BackdoorBench.

    References:
        Doan, Lao, Zhao, Li: LIRA: Learnable, imperceptible and robust backdoor attacks, ICCV 2021.
    """

    name: ClassVar[str] = "lira"
    rate: ClassVar[float] = 1.0

    eps: Annotated[float, Field(ge=0, le=1)] = 0.01
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    stage: Annotated[float, Field(ge=0, le=1)] = 1 / 3

    def _network(self, channels: int) -> nn.Module:
        return Coder(channels, channels)

    def change(self, images: Tensor, network: nn.Module) -> Tensor:
        """Add the perturbation."""
        return (images + self.eps * torch.tanh(network(images))).clamp(0, 1)

    def _online(self, clean: CleanSet, target: Target, rate: float) -> Online:
        return _Learning(self.begun(clean.shape[0]), target, rate, clean)


class _Learning(Online):
    def __init__(self, attack: LIRA, target: Target, rate: float, clean: CleanSet) -> None:
        super().__init__(attack, target, rate, clean)
        self.how = attack
        self.network = attack.network(clean.shape[0])
        self.updates = torch.optim.Adam(self.network.parameters(), attack.lr)
        self.parts = {"network": self.network, "updates": self.updates}

    def batch(
        self, images: Tensor, labels: Tensor, net: nn.Module, done: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        wanted, chosen, _ = self.draw(labels, generator)
        if done < self.how.stage and len(chosen):
            self._learn(images[chosen], wanted[chosen], net)
        return self.with_copies(images, labels, wanted, chosen)

    def _learn(self, images: Tensor, wanted: Tensor, net: nn.Module) -> None:
        with evaluating(net):
            loss = functional.cross_entropy(net(self.how.change(images, self.network)), wanted)
        update(self.updates, loss)
