"""STRIP: a prediction that stays although clean images are laid over the sample."""

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
class Strip(Detector):
    """Lay clean images over a sample and see whether its prediction stays.

    A trigger that shines through decides the prediction whatever lies over it, so the predictions of the blends have
    little entropy; those of a clean sample vary. The score is minus the mean entropy, in nats.

    Attributes:
        blends: How many clean images are laid over each sample, at least 1.
        batch_size: Samples at a time, at least 1.

    Needs:
        Clean images.

    Cost:
        100 F per sample.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> found = Diagnosis(verdict="inconclusive", rule="", targets=[], runs=[])
        >>> Strip(blends=3).score(net, clean, Suspects.of(clean), found).shape
        torch.Size([20])

    References:
        Gao et al.: STRIP: a defence against trojan attacks on deep neural networks, ACSAC 2019, arXiv:1902.06531.

    Deviations:
        * All samples get the same clean images laid over them, drawn once, so that scores compare.
        * Blends are sums cut off at 1, as in the released code.
        * Entropy is in nats, not bits.
    """

    name: ClassVar[str] = "strip"

    blends: int = Field(default=100, ge=1)
    batch_size: int = Field(default=128, ge=1)

    def _score(self, model: nn.Module, clean: CleanSet, suspects: Suspects, diagnosis: Diagnosis, seed: int) -> Tensor:
        generator = new_generator(seed)
        overlays = clean.take(torch.randint(len(clean), (self.blends,), generator=generator)).floats()

        def score(images: Tensor, _: Tensor) -> Tensor:
            logits = (model((images + overlay).clamp(max=1)) for overlay in overlays)
            return sum((-_entropy(each) for each in logits), torch.zeros(len(images))) / self.blends

        with torch.no_grad():
            return suspects.map(score, self.batch_size, self.name)


def _entropy(logits: Tensor) -> Tensor:
    return torch.special.entr(logits.softmax(1)).sum(1)
