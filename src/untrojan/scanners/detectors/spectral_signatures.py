"""Spectral signatures: how far a sample lies along the direction in which its label varies most."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.detectors.features import score_by_label
from untrojan.scanners.suspects import Suspects


@config
class SpectralSignatures(Detector):
    """Measure how far a sample lies along the direction in which the features of its label vary most.

    The samples of a label that holds two populations, clean and poisoned, vary most from one to the other. The score
    is the squared projection of the centered features onto the top right singular vector of those of the label.

    Attributes:
        batch_size: Samples at a time, at least 1.

    Needs:
        Nothing of the clean images.

    Cost:
        1 F per sample, and a singular value decomposition per label.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> found = Diagnosis(verdict="inconclusive", rule="", targets=[], runs=[])
        >>> SpectralSignatures().score(net, clean, Suspects.of(clean), found).shape
        torch.Size([20])

    References:
        Tran et al.: Spectral signatures in backdoor attacks, NeurIPS 2018, arXiv:1811.00636.

    Deviations:
        * The paper removes the same number of samples from every label, 1.5 times the number expected; here nothing is
          removed, and scores of all labels are compared as they are.
    """

    name: ClassVar[str] = "spectral-signatures"

    batch_size: int = Field(default=128, ge=1)

    def _score(self, model: nn.Module, clean: CleanSet, suspects: Suspects, diagnosis: Diagnosis, seed: int) -> Tensor:
        return score_by_label(model, suspects, self.batch_size, self.name, _squared_projections)


def _squared_projections(features: Tensor) -> Tensor:
    centered = features - features.mean(0)
    top = torch.linalg.svd(centered, full_matrices=False).Vh[0]
    return (centered @ top) ** 2
