"""Where a trigger sends images: all to one label, those of each class to a label of their own, or just away."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.fit import Epoch
from untrojan.model import evaluating


class Aim(NamedTuple):
    """What a search for a trigger is after.

    Attributes:
        label: Where all images are to go, or `None`.
        targets: Where those of each class are to go, if there is no one label, those without a target to their own;
            where this is empty, too, each image is to go away from its own label, to whichever other.

    Example:
        >>> out, labels = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 5.0]]), torch.tensor([0, 1])
        >>> Aim(2).sent(out, labels), Aim(None).sent(out, labels)
        (tensor([False,  True]), tensor([False,  True]))
        >>> Aim(2).margin(out, labels), Aim(None).margin(out, labels)
        (tensor([-1.,  4.]), tensor([-1.,  4.]))
    """

    label: int | None
    targets: tuple[int, ...] = ()

    def __str__(self) -> str:
        if self._away:
            return "another label"
        return "the target of their class" if self.label is None else f"label {self.label}"

    def there(self, labels: Tensor) -> Tensor:
        """Which images are where they are to go already, by their own labels `(N,)`: bool `(N,)`."""
        return torch.zeros_like(labels, dtype=torch.bool) if self._away else labels == self._wanted(labels)

    def others(self, clean: CleanSet) -> CleanSet:
        """The images that are not there yet."""
        return clean if self._away else clean.take(~self.there(clean.labels))

    def sent(self, out: Tensor, labels: Tensor) -> Tensor:
        """Which images got there, by logits `(..., N, K)` and their own labels `(N,)`: bool `(..., N)`.

        An image of which a logit is NaN or infinite is nowhere.
        """
        there = out.argmax(-1) == self._wanted(labels)
        return (~there if self._away else there) & out.isfinite().all(-1)

    def probability(self, out: Tensor, labels: Tensor) -> Tensor:
        """How likely each image is there: `(..., N)` in [0, 1]; 0 where that is NaN."""
        at = _at(out.softmax(-1), self._wanted(labels))
        return (1 - at if self._away else at).nan_to_num(0)

    def margin(self, out: Tensor, labels: Tensor) -> Tensor:
        """How far the logits that lead there are above all others: `(..., N)`; minus infinity where that is NaN."""
        wanted = self._wanted(labels)
        further = _at(out, wanted) - _without(out, wanted).amax(-1)
        return (-further if self._away else further).nan_to_num(-math.inf, math.inf, -math.inf)

    def reached(self, epoch: Epoch) -> float:
        """The share of the images shown in an epoch that got there; of several targets, any other label counts."""
        return 1 - epoch.accuracy if self.label is None else float(epoch.shares[self.label])

    def loss(self, out: Tensor, labels: Tensor) -> Tensor:
        """Minus the mean log of the probability, from logits `(N, K)`."""
        if self._away:
            return (out.logsumexp(1) - _without(out, labels).logsumexp(1)).mean()
        return functional.cross_entropy(out, self._wanted(labels))

    def share(self, model: nn.Module, clean: CleanSet, change: Callable[[Tensor], Tensor]) -> float:
        """Measure which share of the images that are not there yet get there once they are changed.

        Args:
            model: The network; it is run in evaluation mode and not changed.
            clean: The images with their own labels.
            change: What is done to a batch `(N, C, H, W)` before.

        Returns:
            A share in [0, 1]; 0 where all images are there already.

        Example:
            >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
            >>> clean = CleanSet(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
            >>> 0 <= Aim(1).share(net, clean, torch.zeros_like) <= 1
            True
        """
        if bool(self.there(clean.labels).all()):
            return 0.0
        others = self.others(clean)
        with evaluating(model), torch.no_grad():
            hits = sum(int(self.sent(model(change(some)), labels).sum()) for some, labels in others.batches(100))
        return hits / len(others)

    @property
    def _away(self) -> bool:
        return self.label is None and not self.targets

    def _wanted(self, labels: Tensor) -> Tensor:
        """Where images are to go by their labels, or to go away from."""
        if self.label is not None:
            return torch.full_like(labels, self.label)
        return labels.new_tensor(self.targets)[labels] if self.targets else labels


def _at(values: Tensor, labels: Tensor) -> Tensor:
    return values.gather(-1, labels.expand(values.shape[:-1])[..., None])[..., 0]


def _without(out: Tensor, labels: Tensor) -> Tensor:
    """Logits with those of some labels taken away."""
    return out.scatter(-1, labels.expand(out.shape[:-1])[..., None], -math.inf)
