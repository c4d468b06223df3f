"""BNP: prune the channels whose clean statistics differ most from those that BatchNorm kept of the training data."""

import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.outliers import Outliers
from untrojan.device import new_generator
from untrojan.errors import ModelError
from untrojan.mask import Mask, norm_after, norms
from untrojan.model import evaluating, tapped
from untrojan.progress import stage
from untrojan.registry import config

RELEASED_BATCH = 500
BATCH = 256


@config
class BNP(Outliers):
    """BatchNorm statistics-based Pruning: prune the channels that saw something in training which clean images lack.

    BatchNorm keeps the mean and variance of what it saw in training, poisoned images among it. Clean images give other
    moments in the channels that react to the trigger. Each channel is measured by the Kullback-Leibler divergence
    between two Gaussians, that of its pre-activations on clean images and that of the running statistics. The scale of
    channels whose divergence stands out of their layer is set to 0; the bias stays.

    Units are those of :class:`untrojan.mask.Mask`. Where BatchNorm has no scale of its own, the convolution or linear
    layer before it is pruned. A layer without running statistics in a network that has others gets the score 0.

    Needs:
        Clean images and a network with BatchNorm running statistics.

    Cost:
        1 F per image and scoring, where F is one image through the network once: 2 F per image, as parts are scored to
        judge by and all are scored to prune by.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.Flatten(), nn.Linear(48, 2))
        >>> clean = CleanSet(torch.rand(40, 1, 4, 4), torch.arange(40) % 2)
        >>> BNP(select="count", count=3).repair(net, clean).record.units_total
        12

    References:
        Zheng, Tang, Li, Liu: Pre-activation distributions expose backdoor neurons, NeurIPS 2022.

    Deviations:
        The published code takes the moments of one batch of 500 images, with the unbiased variance, and prunes at u = 3
        (`variant="released"`, with `select="threshold"`). Here:

        * The moments are those of all images.
        * The epsilon of the layer is added to both variances, as the layer itself does, so that a channel that never
          varies has a divergence too.
        * How many channels to prune is chosen by a paired budget of clean accuracy.
    """

    name: ClassVar[str] = "bnp"
    scores: ClassVar[str] = (
        "by how many standard deviations the divergence of a unit from what it saw in training lies below the mean "
        "of its layer: units far above the mean have the lowest scores"
    )

    def measure(self, model: nn.Module, clean: CleanSet, seed: int) -> Mapping[str, Tensor]:
        """Measure the divergence of every channel, in nats.

        Raises:
            ModelError: The network has no running statistics.
        """
        known = norms(model)
        if not known:
            raise ModelError("BNP compares clean images with BatchNorm running statistics, and the network has none")
        units = {name.removesuffix(".weight"): name for name in Mask.ones(model, self.unit).values}
        after = {} if units.keys() <= set(known) else norm_after(model, clean.take([0, -1]).floats())
        divergences = self._divergences(model, clean, seed, known)
        found = {name: divergences.get(after.get(layer, layer)) for layer, name in units.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _divergences(self, model: nn.Module, clean: CleanSet, seed: int, names: list[str]) -> dict[str, Tensor]:
        released = self.variant == "released"
        if released:
            generator = new_generator(seed)
            clean = clean.some(RELEASED_BATCH, generator)
        divergences = {}
        for name, (count, mean, variance) in _moments(model, clean, names).items():
            norm = model.get_submodule(name)
            state = norm.state_dict()
            eps = 0.0 if released else getattr(norm, "eps", 0.0)
            unbiased = count / max(count - 1, 1) if released else 1.0
            divergences[name] = divergence(
                mean,
                variance * unbiased + eps,
                state["running_mean"].double(),
                state["running_var"].double() + eps,
            ).float()
        return divergences


def divergence(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of a Gaussian from another one, element by element, in nats.

    Args:
        mean: The mean of the one.
        variance: Its variance, above 0.
        other_mean: The mean of the other.
        other_variance: Its variance, above 0.

    Example:
        >>> divergence(torch.zeros(1), torch.ones(1), torch.ones(1), torch.ones(1))
        tensor([0.5000])
    """
    ratio = variance / other_variance
    return (ratio - ratio.log() - 1 + (mean - other_mean).square() / other_variance) / 2


class _Moments(NamedTuple):
    """How many values of each channel a layer took in, and their mean and variance `(C,)`."""

    values: int
    mean: Tensor
    variance: Tensor


def _moments(model: nn.Module, clean: CleanSet, names: list[str]) -> dict[str, _Moments]:
    """The moments of what goes into layers, over all images and places; layers that are not used are missing."""
    sums: dict[str, tuple[int, Tensor | float, Tensor | float]] = {}
    with (
        stage("moments", total=math.ceil(len(clean) / BATCH)) as advance,
        evaluating(model),
        torch.no_grad(),
        tapped(model, names, "input") as seen,
    ):
        for images, _ in clean.batches(BATCH):
            model(images)
            for name, calls in seen.items():
                for call in calls:
                    values = call.double().movedim(1, -1).flatten(0, -2)
                    count, total, squares = sums.get(name, (0, 0.0, 0.0))
                    sums[name] = count + len(values), total + values.sum(0), squares + values.square().sum(0)
                calls.clear()
            advance()
    moments = {}
    for name, (count, total, squares) in sums.items():
        mean, square = torch.as_tensor(total) / count, torch.as_tensor(squares) / count
        moments[name] = _Moments(count, mean, (square - mean.square()).clamp(min=0))
    return moments
