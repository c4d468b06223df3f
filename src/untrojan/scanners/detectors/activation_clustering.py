"""Activation clustering: the features of each label fall into two clusters, and the smaller one is suspicious."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.errors import ConfigError
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.detectors.features import score_by_label
from untrojan.scanners.suspects import Suspects


@config
class ActivationClustering(Detector):
    """Part the features of each label into two clusters and see how clearly a sample belongs to the smaller one.

    Clean samples of a label are one population, which two clusters part badly; with poisoned samples there are two.
    The score is a silhouette with a sign: the distance to the center of the larger cluster, less that to the center of
    the smaller one, over the larger of both. It is in [-1, 1], and 0 halfway.

    Attributes:
        components: To how many dimensions features are reduced before clustering, at least 1.
        batch_size: Samples at a time, at least 1.

    Needs:
        scikit-learn, and nothing of the clean images.

    Cost:
        1 F per sample, and a singular value decomposition per label.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> found = Diagnosis(verdict="inconclusive", rule="", targets=[], runs=[])
        >>> ActivationClustering().score(net, clean, Suspects.of(clean), found).shape
        torch.Size([20])

    References:
        Chen et al.: Detecting backdoor attacks on deep neural networks by activation clustering, SafeAI at AAAI 2019,
        arXiv:1811.03728.

    Deviations:
        * The paper reduces by independent component analysis; here principal components are taken, and keep their
          variance. Scaled to one variance, as independent components are, poisoned samples come apart less clearly.
        * The paper judges whole clusters, by relative size, silhouette or a new training; here each sample has a score,
          from the distances to the two centers instead of those to all samples.
    """

    name: ClassVar[str] = "activation-clustering"

    components: int = Field(default=10, ge=1)
    batch_size: int = Field(default=128, ge=1)

    def _score(self, model: nn.Module, clean: CleanSet, suspects: Suspects, diagnosis: Diagnosis, seed: int) -> Tensor:
        try:
            from sklearn.cluster import KMeans
        except ImportError as error:
            raise ConfigError(f"{self.name} needs scikit-learn: pip install scikit-learn") from error

        def score(features: Tensor) -> Tensor:
            if len(features.unique(dim=0)) < 2:
                return torch.zeros(len(features))
            points = reduced(features, self.components)
            found = KMeans(2, random_state=seed % 2**32).fit(points.cpu().numpy())
            return signed_silhouette(points, torch.as_tensor(found.labels_).long())

        return score_by_label(model, suspects, self.batch_size, self.name, score)


def reduced(features: Tensor, components: int) -> Tensor:
    """The leading principal components `(n, c)`, at most as many as there are features or samples."""
    directions, sizes, _ = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    return (directions * sizes)[:, :components]


def signed_silhouette(points: Tensor, clusters: Tensor) -> Tensor:
    """How much nearer the center of the smaller of two clusters is than that of the larger, in [-1, 1]."""
    smaller = int(torch.bincount(clusters, minlength=2).argmin())
    near, far = ((points - points[clusters == cluster].mean(0)).norm(dim=1) for cluster in (smaller, 1 - smaller))
    return (far - near) / torch.maximum(far, near)
