"""Attacks whose trigger is made by a network that the attacker trains."""

import copy
from abc import abstractmethod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from untrojan.errors import ConfigError, ModelError
from untrojan.lab.attack import Attack
from untrojan.randomness import seeded
from untrojan.registry import config
from untrojan.sources.files import Checkpoint

_GROUPS = 8


@config
class Learned(Attack):
    """Base of attacks that learn their trigger while a victim trains; authors write `_network` and `change`.

    Attributes:
        weights: What a training has learned, `attack.safetensors` in its folder; the trigger needs it.

    Raises:
        ConfigError: From `trigger`: there are no weights.
        ModelError: From `trigger`: the weights are not those of this attack for images of as many channels.
    """

    weights: Path | None = None

    @abstractmethod
    def _network(self, channels: int) -> nn.Module:
        """Make the network, untrained, for images of as many channels."""

    @abstractmethod
    def change(self, images: Tensor, network: nn.Module) -> Tensor:
        """Put the trigger on images `(N, C, H, W)` in [0, 1], with gradients reaching the network."""

    def begun(self, channels: int) -> Self:
        """Give the attack with an untrained network, which may be trained on; its fields stay as they are.

        Raises:
            ConfigError: It has weights already.
        """
        if self.weights is not None:
            raise ConfigError(f"{self.name}: weights are what a training has learned; leave them out to train")
        made = copy.copy(self)
        vars(made)["_learned"] = channels, self._network(channels)
        return made

    def network(self, channels: int) -> nn.Module:
        """Give the network: that of :meth:`begun`, or what the weights hold, which are read once."""
        if "_learned" not in vars(self):
            vars(self)["_learned"] = channels, self._read(channels)
        known, network = vars(self)["_learned"]
        if channels != known:
            raise ModelError(f"{self.name} has learned its trigger for images of {known} channels, got {channels}")
        return network

    def _read(self, channels: int) -> nn.Module:
        if self.weights is None:
            raise ConfigError(
                f"{self.name} learns its trigger while a victim trains: use `untrojan lab train`, and then "
                f"{self.name}:weights=FOLDER/attack.safetensors"
            )
        with seeded(0):
            untrained = self._network(channels)
        return Checkpoint.read(self.weights).into(untrained)

    @torch.no_grad()
    def _trigger(self, images: Tensor) -> Tensor:
        network = self.network(images.shape[1]).to(images.device, torch.float32)
        return self.change(images.float(), network).to(images.dtype)


class Coder(nn.Module):
    """A small network from images to maps of the same size; the same in training and in evaluation.

    Three times it halves the size and doubles the width, then it goes back and adds what it had at each size.

    Args:
        channels: Channels of the images.
        out: Maps that it gives.
        width: Maps of the first level, a multiple of 8.

    References:
        Ronneberger, Fischer, Brox: U-Net: Convolutional networks for biomedical image segmentation, MICCAI 2015,
        arXiv:1505.04597.

    Example:
        >>> Coder(3, 1)(torch.rand(2, 3, 30, 30)).shape
        torch.Size([2, 1, 30, 30])
    """

    def __init__(self, channels: int, out: int, width: int = 32) -> None:
        super().__init__()
        widths = (width, 2 * width, 4 * width)
        self.down = nn.ModuleList(
            _layer(before, after) for before, after in zip((channels, *widths), widths, strict=False)
        )
        self.bottom = _layer(widths[-1], widths[-1])
        self.up = nn.ModuleList(_layer(widths[level], widths[max(level - 1, 0)]) for level in (2, 1, 0))
        self.out = nn.Conv2d(width, out, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, channels, H, W)` to `(N, out, H, W)`."""
        maps, seen = images, []
        for layer in self.down:
            maps = layer(maps)
            seen.append(maps)
            maps = functional.max_pool2d(maps, 2, ceil_mode=True)
        maps = self.bottom(maps)
        for layer, beside in zip(self.up, reversed(seen), strict=True):
            maps = layer(functional.interpolate(maps, beside.shape[2:]) + beside)
        return self.out(maps)


def _layer(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(_GROUPS, after), nn.ReLU())
