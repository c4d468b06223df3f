"""What an attack does while a victim trains: it changes every batch, and trains what its trigger needs."""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from untrojan.data import CleanSet
from untrojan.lab.attack import Attack, Target, target_labels


class Online(ABC):
    """An attack at work; :meth:`untrojan.lab.attack.Attack.online` begins one, and the training of a victim calls it.

    Authors write :meth:`batch`, and put the networks and optimizers that they train into `parts`.

    Args:
        attack: The attack.
        target: The target class, or "all-to-all".
        rate: The poisoning rate, in [0, 1]: of the images of a batch.
        clean: All training images.

    Attributes:
        attack: The attack with its trigger as it is now; what evaluation puts on test images.
        parts: What is trained, by name.
    """

    def __init__(self, attack: Attack, target: Target, rate: float, clean: CleanSet) -> None:
        self.attack = attack
        self.target: Target = target
        self.rate = rate
        self.classes = clean.num_classes
        self.parts: dict[str, nn.Module | Optimizer] = {}

    def begin(self, clean: CleanSet) -> None:  # noqa: B027
        """Do what comes before the first batch; not called where a training is resumed."""

    @abstractmethod
    def batch(
        self, images: Tensor, labels: Tensor, net: nn.Module, done: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Give the batch to train on, before it is augmented.

        Args:
            images: Clean images `(b, C, H, W)` in [0, 1]; may be written to.
            labels: Their true labels `(b,)`; may be written to.
            net: The victim as it is now, in training mode; it must come back unchanged.
            done: The share of all steps that are done, in [0, 1).
            generator: Draws all that is random.
        """

    def after_update(self, net: nn.Module) -> None:  # noqa: B027
        """Change the weights of the victim in place, after each of its updates."""

    def state(self) -> dict[str, Any]:
        """Give all that later batches depend on, as :func:`untrojan.lab.checkpoint.save` takes it."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Put back what :meth:`state` gave."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def draw(self, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw which images of a batch are poisoned, as many as there are if that is too few.

        Numbers of images that are not whole are rounded at random, up as often as it takes to be right on average.

        Returns:
            The labels that the attacker wants for all images; where those are that get the trigger and that label; and
            where those are that get a cover and keep their label. Both are of other classes than the target.
        """
        wanted = target_labels(labels, self.target, self.classes)
        possible = (wanted != labels).nonzero().flatten()
        order = possible[torch.randperm(len(possible), generator=generator)]
        more = torch.rand((), generator=generator).item()
        count, covers = (math.floor(each * self.rate * len(labels) + more) for each in (1, self.attack.covers))
        return wanted, order[:count], order[count : count + covers]

    def with_copies(self, images: Tensor, labels: Tensor, wanted: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Give a batch with copies of the chosen images behind it, which have the trigger and the label wanted."""
        return torch.cat([images, self.attack.trigger(images[chosen])]), torch.cat([labels, wanted[chosen]])


class EachBatch(Online):
    """Poisons every batch anew, as :func:`untrojan.lab.victim.poison` does a whole set once."""

    def batch(
        self, images: Tensor, labels: Tensor, net: nn.Module, done: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Put the trigger on some images and covers on others."""
        wanted, chosen, covers = self.draw(labels, generator)
        rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        clean = CleanSet(images, labels)
        for places, change in ((chosen, self.attack.poisoned), (covers, self.attack.cover)):
            if len(places):
                images[places] = change(clean.take(places), clean, rng)
        labels[chosen] = wanted[chosen]
        return images, labels


def update(optimizer: Optimizer, loss: Tensor) -> None:
    """Make one step on a loss, which leaves no gradients at anything but what the optimizer has.

    Example:
        >>> ours, theirs = torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)
        >>> update(torch.optim.SGD([ours], lr=0.5), (ours * theirs).sum())
        >>> ours.item(), theirs.grad
        (0.5, None)
    """
    optimizer.zero_grad()
    loss.backward(inputs=[parameter for group in optimizer.param_groups for parameter in group["params"]])
    optimizer.step()
