"""Cognitive distillation: how little of an image the model needs for its output."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.device import new_generator
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.suspects import Suspects


@config
class CognitiveDistillation(Detector):
    """Find the smallest part of a sample that gives the model's output, and see how small it is.

    For each sample a mask is learned that keeps the logits while as much as possible of the image is replaced by one
    random color. Of a poisoned sample the trigger is enough, and that is small. The score is minus the sum of the mask.

    Attributes:
        lr: Learning rate of Adam, above 0.
        iterations: Steps, at least 1.
        alpha: Weight of the sum of the mask, at least 0.
        beta: Weight of its total variation per pixel, at least 0.
        batch_size: Samples at a time, at least 1.

    Needs:
        Nothing of the clean images.

    Cost:
        2 F per sample and iteration; with the default 200 F per sample.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> found = Diagnosis(verdict="inconclusive", rule="", targets=[], runs=[])
        >>> CognitiveDistillation(iterations=2).score(net, clean, Suspects.of(clean), found).shape
        torch.Size([20])

    References:
        Huang et al.: Distilling cognitive backdoor patterns within an image, ICLR 2023, arXiv:2301.10908.

    Deviations:
        * The colors of the steps are drawn once and are the same for all samples, and losses of a batch are added up,
          so that a score does not depend on the batch.
    """

    name: ClassVar[str] = "cognitive-distillation"

    lr: float = Field(default=0.1, gt=0)
    iterations: int = Field(default=100, ge=1)
    alpha: float = Field(default=0.01, ge=0)
    beta: float = Field(default=1.0, ge=0)
    batch_size: int = Field(default=128, ge=1)

    def _score(self, model: nn.Module, clean: CleanSet, suspects: Suspects, diagnosis: Diagnosis, seed: int) -> Tensor:
        generator = new_generator(seed)
        colors = torch.rand(self.iterations, suspects.shape[0], 1, 1, generator=generator)
        return suspects.map(
            lambda images, _: -self._mask(model, images, colors).sum((1, 2, 3)), self.batch_size, self.name
        )

    def _mask(self, model: nn.Module, images: Tensor, colors: Tensor) -> Tensor:
        """Learn the masks `(b, 1, H, W)` of a batch."""
        with torch.no_grad():
            wanted = model(images)
        free = torch.ones_like(images[:, :1]).requires_grad_()
        optimizer = torch.optim.Adam([free], lr=self.lr, betas=(0.1, 0.1))
        for color in colors:
            mask = (free.tanh() + 1) / 2
            apart = (model(mask * images + (1 - mask) * color) - wanted).abs().mean(1)
            loss = apart + self.alpha * mask.sum((1, 2, 3)) + self.beta * _variation(mask)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
        return (free.detach().tanh() + 1) / 2


def _variation(mask: Tensor) -> Tensor:
    """Squared differences of neighbors, summed and divided by the number of pixels, `(b,)`."""
    down, right = mask.diff(dim=2), mask.diff(dim=3)
    return ((down**2).sum((1, 2, 3)) + (right**2).sum((1, 2, 3))) / mask[0].numel()
