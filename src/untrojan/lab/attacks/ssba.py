"""SSBA: a faint residual that hides a secret in the image, different for every image."""

from collections.abc import Iterator
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.fit import fit
from untrojan.lab.attack import Target
from untrojan.lab.learned import Coder, Learned
from untrojan.lab.online import EachBatch, Online
from untrojan.lab.pattern import uniform
from untrojan.registry import config

_SIDE = 8
_BATCH = 64


@config
class SSBA(Learned):
    """Add what an encoder makes of the image and a secret, the same secret for all images.

    Before the victim trains, an encoder and a decoder are trained on its clean images: the decoder shall read from the
    image which bits the encoder has hidden, whatever they are, and the image shall change little. As published, 10 % of
    the images are poisoned, and the encoder is trained for 20 epochs.

    Attributes:
        bits: Length of the secret, at least 1.
        strength: Largest change of a pixel, above 0 and up to 1.
        fidelity: Weight of the mean squared change of the image, as a share of the largest, at least 0; it is 0 for the
            first half of the passes and grows in the second, for else the encoder learns to hide nothing.
        epochs: Passes over the images with which the encoder is trained, at least 1.
        lr: Learning rate of the encoder, above 0.
        seed: Decides the secret, at least 0.

    Example:
        >>> import torch
        >>> attack = SSBA().begun(channels=3)
        >>> images = torch.rand(2, 3, 32, 32)
        >>> bool(((attack.trigger(images) - images).abs() <= 0.1 + 1e-6).all())
        True

    Deviations:
        * The published encoder, StegaStamp's, hides 100 bits in larger images that are then resized, and is trained to
          survive printing, with perceptual losses. Here a small network hides fewer in the images as they are, its
          change is bounded, and the loss of the image is a mean square.
        * Images are poisoned anew in every batch, not once; each has always the same trigger.

    References:
        Li et al.: Invisible backdoor attack with sample-specific triggers, ICCV 2021, arXiv:2012.03816.
        Tancik, Mildenhall, Ng: StegaStamp: Invisible hyperlinks in physical photographs, CVPR 2020, arXiv:1904.05343.
    """

    name: ClassVar[str] = "ssba"

    bits: Annotated[int, Field(ge=1)] = 16
    strength: Annotated[float, Field(gt=0, le=1)] = 0.1
    fidelity: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    epochs: Annotated[int, Field(ge=1)] = 20
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-3
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def secret(self) -> Tensor:
        """The bits of the trigger: float `(bits,)`, 0 or 1."""
        return (uniform((self.bits,), self.seed) < 0.5).float()

    def _network(self, channels: int) -> nn.Module:
        return _Encoder(channels, self.bits)

    def change(self, images: Tensor, network: nn.Module) -> Tensor:
        """Hide the secret in every image."""
        return self.hide(images, self.secret.expand(len(images), -1), network)

    def hide(self, images: Tensor, secrets: Tensor, network: nn.Module) -> Tensor:
        """Hide secrets `(N, bits)`, one in each image."""
        return (images + self.strength * network(images, secrets)).clamp(0, 1)

    def _online(self, clean: CleanSet, target: Target, rate: float) -> Online:
        return _Hiding(self.begun(clean.shape[0]), target, rate, clean)


class _Hiding(EachBatch):
    def __init__(self, attack: SSBA, target: Target, rate: float, clean: CleanSet) -> None:
        super().__init__(attack, target, rate, clean)
        self.how = attack
        self.encoder = attack.network(clean.shape[0])
        self.parts = {"encoder": self.encoder}

    def begin(self, clean: CleanSet) -> None:
        decoder = _decoder(clean.shape[0], self.how.bits)
        generator = new_generator(self.how.seed)
        passes = iter(range(self.how.epochs))
        weight = 0.0

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            nonlocal weight
            weight = self.how.fidelity * max(0, 2 * next(passes) / self.how.epochs - 1)
            return clean.batches(_BATCH, generator)

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            secrets = torch.randint(2, (len(images), self.how.bits), generator=generator).float()
            hidden = self.how.hide(images, secrets, self.encoder)
            read = decoder(hidden)
            changed = functional.mse_loss(hidden, images) / self.how.strength**2
            return functional.binary_cross_entropy_with_logits(read, secrets) + weight * changed, read

        fit(
            [*self.encoder.parameters(), *decoder.parameters()],
            step,
            batches,
            lambda parameters: torch.optim.Adam(parameters, self.how.lr),
            self.how.epochs,
            name="encoder",
        )


class _Encoder(nn.Module):
    def __init__(self, channels: int, bits: int) -> None:
        super().__init__()
        self.spread = nn.Linear(bits, _SIDE * _SIDE)
        self.coder = Coder(channels + 1, channels)

    def forward(self, images: Tensor, secrets: Tensor) -> Tensor:
        """Map images and secrets to changes in [-1, 1]."""
        maps = self.spread(2 * secrets - 1).view(-1, 1, _SIDE, _SIDE)
        maps = functional.interpolate(maps, images.shape[2:])
        return torch.tanh(self.coder(torch.cat([images, maps], dim=1)))


def _decoder(channels: int, bits: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before, after, stride in ((channels, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * 64, bits))
