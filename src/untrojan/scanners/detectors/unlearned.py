"""How sure the unlearned model still is of a sample's label: the sample read-out of RNP's unlearned model."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.scanners.detectors.detector import Detector
from untrojan.scanners.suspects import Suspects
from untrojan.scanners.unlearning import Unlearning


@config
class Unlearned(Unlearning, Detector):
    """How sure the unlearned model still is of the label that a sample has.

    Unlearning clean images takes away what the model knows of clean samples, and leaves the backdoor: a poisoned
    sample keeps its label with confidence, a clean one loses it. The label is the sample's own, which for a poisoned
    one is the surviving class, so that a backdoor with several targets is seen too.

    Attributes:
        by: `confidence` scores by the log-odds of the sample's label under the unlearned model, `change` by how much
            less they fell than those of other samples: the log-odds after minus before.
        unlearn_lr: Learning rate of SGD with momentum 0.9 that ascends the cross-entropy, above 0; a tenth of the
            scan's.
        unlearn_epochs: Passes over the clean images at most.
        floor: Unlearning ends when the accuracy on them is at or below this fraction.

    Needs:
        Clean images.

    Cost:
        3 F per clean image and epoch, and 1 F per sample; 2 F with `by="change"`.

    Example:
        >>> clean = CleanSet(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> found = Diagnosis(verdict="inconclusive", rule="", targets=[], runs=[])
        >>> Unlearned(unlearn_epochs=1).score(net, clean, Suspects.of(clean), found).shape
        torch.Size([20])

    References:
        Li et al.: Reconstructive neuron pruning for backdoor defense, ICML 2023, arXiv:2305.14876.

    Deviations:
        * The paper names this use of the unlearned model and releases no code for it.
        * Unlearning is slower than in the scan, and stops at half of the images: a fast ascent to the end takes the
          backdoor too.
        * Log-odds order the samples as probabilities do, and still where these round to 0 or 1.
    """

    name: ClassVar[str] = "unlearned"

    by: Literal["confidence", "change"] = "confidence"
    unlearn_lr: float = Field(default=0.001, gt=0)
    unlearn_epochs: int = Field(default=30, ge=1)
    floor: float = Field(default=0.5, gt=0, lt=1)

    def _score(self, model: nn.Module, clean: CleanSet, suspects: Suspects, diagnosis: Diagnosis, seed: int) -> Tensor:
        unlearned = self.unlearn(model, clean, seed, "plain").model

        def score(images: Tensor, labels: Tensor) -> Tensor:
            after = _log_odds(unlearned(images), labels)
            return after - _log_odds(model(images), labels) if self.by == "change" else after

        with torch.no_grad():
            return suspects.map(score, self.batch_size, self.name)


def _log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of the label over all others together, `(b,)`."""
    own = logits.gather(1, labels[:, None])
    return own[:, 0] - logits.scatter(1, labels[:, None], -torch.inf).logsumexp(1)
