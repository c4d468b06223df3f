"""Input-aware dynamic: every image has a trigger of its own."""

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

_STEEPNESS = 10.0
_EPS = 1e-7
_BETAS = (0.5, 0.9)


@config
class InputAware(Learned):
    """Blend a pattern into the image where a mask is open; two networks make both from the image itself.

    The mask network is trained first, while the victim trains on clean images: its masks shall be small, and differ
    where images differ. Then the pattern network is trained together with the victim, to send images to the target and
    to make different patterns for different images. As many cover samples as poisoned images get the trigger of another
    image and keep their label, so that no trigger works on an image that is not its own. As published, 10 % of each
    batch are poisoned and 10 % are covers, and the density is 0.032.

    It is learned late, and masks need room. On digits of 8x8, where they open two pixels, the attack success rate
    stayed at 68 %. A small network that was shown 4,000 traffic signs of 32x32 reached 88 % after 12 epochs and 95 %
    after 24.

    Attributes:
        density: How far a mask may be open at a pixel at no cost, in [0, 1].
        diversity: Weight of being different for different images, at least 0.
        lr: Learning rate of both networks, above 0.
        mask_share: Share of the training in which the mask network is trained, in [0, 1].

    Example:
        >>> import torch
        >>> attack = InputAware().begun(channels=1)
        >>> attack.trigger(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])

    Deviations:
        * The mask network is trained for a fifth of the epochs, as published 25 of 125, but with a victim that already
          trains on clean images. Published training has 600 more epochs.
        * Both networks are small ones with shortcuts and group normalization, and learn at 0.001: at the published 0.01
          all their masks closed for good on handwritten digits. Patterns are made in [0, 1], not for normalized images.
        * The pattern network is trained on the poisoned images and covers of a batch alone, with the victim in
          evaluation mode and its own step before that of the victim. The published loss is the mean over the whole
          batch, so diversity weighs five times as much there.

    References:
        Nguyen, Tran: Input-aware dynamic backdoor attack, NeurIPS 2020, arXiv:2010.08138.
    """

    name: ClassVar[str] = "input-aware"
    covers: ClassVar[float] = 1.0

    density: Annotated[float, Field(ge=0, le=1)] = 0.032
    diversity: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.001
    mask_share: Annotated[float, Field(ge=0, le=1)] = 0.2

    def _network(self, channels: int) -> nn.ModuleDict:
        return nn.ModuleDict({"mask": Coder(channels, 1), "pattern": Coder(channels, channels)})

    def change(self, images: Tensor, network: nn.Module) -> Tensor:
        """Put on every image the trigger that is its own."""
        return images.lerp(pattern_of(images, network), mask_of(images, network))

    def _online(self, clean: CleanSet, target: Target, rate: float) -> Online:
        return _Learning(self.begun(clean.shape[0]), target, rate, clean)


def mask_of(images: Tensor, network: nn.Module) -> Tensor:
    """Masks `(N, 1, H, W)` in [0, 1], nearly all of it close to 0 or 1."""
    return (torch.tanh(_STEEPNESS * torch.tanh(network.get_submodule("mask")(images))) + 1) / 2


def pattern_of(images: Tensor, network: nn.Module) -> Tensor:
    """Patterns of the shape of the images, in [0, 1]."""
    return (torch.tanh(network.get_submodule("pattern")(images)) + 1) / 2


class _Learning(Online):
    def __init__(self, attack: InputAware, target: Target, rate: float, clean: CleanSet) -> None:
        super().__init__(attack, target, rate, clean)
        self.how = attack
        self.network = attack.network(clean.shape[0])
        self.masks, self.patterns = (
            torch.optim.Adam(self.network.get_submodule(name).parameters(), attack.lr, _BETAS)
            for name in ("mask", "pattern")
        )
        self.parts = {"network": self.network, "masks": self.masks, "patterns": self.patterns}

    def batch(
        self, images: Tensor, labels: Tensor, net: nn.Module, done: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        others = images.roll(1, 0)  # batches are shuffled, so these are other images at random
        if done < self.how.mask_share:
            self._learn_masks(images, others)
            return images, labels
        wanted, chosen, crossed = self.draw(labels, generator)
        labels[chosen] = wanted[chosen]
        both = torch.cat([chosen, crossed])
        if len(both):
            images[both] = self._learn_patterns(images[both], labels[both], others[both], len(chosen), net)
        return images, labels

    def _learn_masks(self, images: Tensor, others: Tensor) -> None:
        masks, different = mask_of(images, self.network), mask_of(others, self.network)
        too_dense = (masks - self.how.density).relu().mean()
        update(self.masks, 100 * too_dense + self._sameness(images, others, masks, different))

    def _learn_patterns(self, images: Tensor, labels: Tensor, others: Tensor, poisoned: int, net: nn.Module) -> Tensor:
        """Train on images of which the first get their own triggers and the rest those of others; give them so."""
        own = torch.arange(len(images)) < poisoned
        givers = torch.where(own[:, None, None, None], images, others)
        patterns, different = pattern_of(images, self.network), pattern_of(others, self.network)
        given = torch.where(own[:, None, None, None], patterns, different)
        triggered = images.lerp(given, mask_of(givers, self.network).detach())
        with evaluating(net):
            loss = functional.cross_entropy(net(triggered), labels)
        update(self.patterns, loss + self._sameness(images, others, patterns, different))
        return triggered.detach()

    def _sameness(self, images: Tensor, others: Tensor, made: Tensor, different: Tensor) -> Tensor:
        return self.how.diversity * (_apart(images, others) / (_apart(made, different) + _EPS)).mean()


def _apart(some: Tensor, others: Tensor) -> Tensor:
    return ((some - others).square().mean((1, 2, 3)) + _EPS).sqrt()
