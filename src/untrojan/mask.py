"""Masks: multipliers for the parameters of a network, learned and applied without rewriting it.

The only place that knows layer types, and the only place that decides how much to prune.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, ModelError
from untrojan.model import call_with, correct, evaluating, watched
from untrojan.progress import stage
from untrojan.record import CurvePoint

Unit = Literal["neuron", "filter", "weight"]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
PRODUCTS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True, eq=False)
class Mask:
    """One multiplier per unit of a network, kept as data beside it.

    A unit is, by `unit`:

    * `neuron`: one channel's scale. That is the weight of the BatchNorm layers; in a network without any, of its
      GroupNorm, LayerNorm and InstanceNorm layers, but not of a LayerNorm over the places of each map; in one without
      these too, the output channels of its convolution and linear layers, the last one in module order (the logits)
      excepted. The channel's bias is left alone, as RNP and ANP publish it: a masked channel still emits a constant.
    * `filter`: the same channel with its bias, so that a zero really silences it, unless a BatchNorm without a scale of
      its own follows, which makes a constant of it.
    * `weight`: every element of the convolution and linear weights, the last layer excepted (AWM).

    Attributes:
        values: Multipliers by parameter name: float `(units,)` for `neuron` and `filter`, the parameter's own shape
            for `weight`. 1 leaves a unit as it is, 0 removes it.
        unit: What one multiplier stands for.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> mask = Mask.ones(net, "neuron")
        >>> mask.total
        4
        >>> pruned = mask.count(1).bake(net)
        >>> int((pruned[1].weight == 0).sum())
        1
    """

    values: Mapping[str, Tensor]
    unit: Unit

    @classmethod
    def ones(cls, model: nn.Module, unit: Unit) -> Self:
        """Make the mask that changes nothing.

        Raises:
            ModelError: The network has no unit of that kind.
        """
        names = _weight_names(model) if unit == "weight" else _channel_names(model)
        if not names:
            raise ModelError(
                f"nothing to mask by {unit}: expected normalization, convolution or linear layers before the last one"
            )
        parameters = dict(model.named_parameters())
        return cls(
            {
                name: torch.ones(parameters[name].shape if unit == "weight" else parameters[name].shape[:1])
                for name in names
            },
            unit,
        )

    @property
    def total(self) -> int:
        """Number of units."""
        return sum(value.numel() for value in self.values.values())

    @property
    def pruned(self) -> int:
        """Number of units whose multiplier is 0."""
        return sum(int((value == 0).sum()) for value in self.values.values())

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to the multipliers of each layer."""
        return type(self)({name: change(value) for name, value in self.values.items()}, self.unit)

    def call(self, model: nn.Module, images: Tensor, follow: bool = False) -> Tensor:
        """Run the masked network: what :meth:`bake` would compute, with gradients reaching the multipliers.

        Args:
            model: The network, in the mode wanted; it is not changed.
            images: `(N, C, H, W)` in [0, 1].
            follow: Whether the network's running statistics, in training mode, follow the masked one.

        Returns:
            Logits `(N, K)`.
        """
        changed = self._masked(model)
        if not follow and any(module.training for module in model.modules()):
            changed |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        return call_with(model, images, changed)

    def bake(self, model: nn.Module) -> nn.Module:
        """Fold the multipliers into a copy of the network; the architecture and the names stay the same."""
        baked = copy.deepcopy(model)
        parameters = dict(baked.named_parameters())
        with torch.no_grad():
            for name, value in self._masked(model).items():
                parameters[name].copy_(value)
        return baked

    def threshold(self, threshold: float) -> Self:
        """Prune the units whose multiplier or score is at or below `threshold`: a mask of zeros and ones."""
        return self.map(lambda value: (value > threshold).to(value.dtype))

    def count(self, count: int) -> Self:
        """Prune the `count` units with the smallest multipliers, over all layers; ties fall in network order.

        Raises:
            ConfigError: `count` is not between 0 and the number of units.
        """
        if not 0 <= count <= self.total:
            raise ConfigError(f"expected a count between 0 and {self.total} units, got {count}")
        flat = torch.cat([value.flatten() for value in self.values.values()])
        kept = torch.ones_like(flat)
        kept[flat.argsort(stable=True)[:count]] = 0
        parts = kept.split([value.numel() for value in self.values.values()])
        return type(self)(
            {name: part.view_as(value) for (name, value), part in zip(self.values.items(), parts, strict=True)},
            self.unit,
        )

    def equal(self, other: Self) -> bool:
        """Whether both hold the same multipliers for the same units."""
        return self.values.keys() == other.values.keys() and all(
            torch.equal(value, other.values[name]) for name, value in self.values.items()
        )

    def _masked(self, model: nn.Module) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        masked = {}
        for name, value in self.values.items():
            for part in (name, _bias_of(name)) if self.unit == "filter" else (name,):
                if part in parameters:
                    shape = (-1,) + (1,) * (parameters[part].ndim - 1) if self.unit != "weight" else value.shape
                    parameter = parameters[part].detach()
                    masked[part] = (parameter * value.view(shape)).to(parameter.dtype)
        return masked


class HeldOut(NamedTuple):
    """Scores of a network's units, and clean images that they were not learned on."""

    scores: Mask
    clean: CleanSet


Cut = Callable[[Mask], Mask]
"""From scores to zeros where a unit is pruned and ones where it is kept, such as :meth:`Mask.threshold`."""


def sweep(model: nn.Module, parts: Sequence[HeldOut], cuts: Sequence[Cut]) -> Tensor:
    """Prune in several ways and see which held-out images stay right.

    Args:
        model: The network to prune; it is not changed.
        parts: Scores with the images to judge them on; every part is pruned by its own scores.
        cuts: Ways to prune.

    Returns:
        Whether each image is right after each cut: bool `(len(cuts), images of all parts)`.
    """
    rows: list[list[Tensor]] = [[] for _ in cuts]
    with stage("sweep", total=len(parts) * len(cuts)) as advance:
        for scores, clean in parts:
            last: tuple[Mask, Tensor] | None = None
            for row, cut in zip(rows, cuts, strict=True):
                kept = cut(scores)
                if last is None or not kept.equal(last[0]):
                    last = kept, correct(kept.bake(model), clean)
                row.append(last[1])
                advance()
    return torch.stack([torch.cat(row) for row in rows])


def budget(right: Tensor, before: Tensor, drop: float) -> int | None:
    """Choose how far to prune: the last cut before clean accuracy first falls by more than `drop`.

    The loss is paired: the original and the pruned network are compared on the same images, which has far less noise
    than the difference of two accuracies.

    Args:
        right: What :func:`sweep` gives, the mildest cut first: bool `(cuts, n)`.
        before: Which of these images the original gets right: bool `(n,)`.
        drop: Accepted loss, as a fraction.

    Returns:
        Index of the cut, or `None` when even the first costs more.

    Example:
        >>> before = torch.tensor([True, True, True, True])
        >>> right = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
        >>> budget(right, before, drop=0.25)
        1
    """
    lost = before.double().mean() - right.double().mean(1)
    over = (lost > drop + 1e-9).nonzero().flatten()
    allowed = int(over[0]) if len(over) else len(lost)
    return allowed - 1 if allowed else None


def curve_point(scores: Mask, kept: Mask, before: Tensor, right: Tensor) -> CurvePoint:
    """Put one cut on the pruning curve.

    Args:
        scores: The scores of all units.
        kept: Zeros where the cut prunes them.
        before: Which images the original gets right: bool `(n,)`.
        right: The same after the cut.
    """
    pruned = torch.cat([scores.values[name][value == 0] for name, value in kept.values.items()])
    lost = before.double() - right.double()
    drop = float(lost.mean())
    half = 1.96 * float(lost.std(correction=0)) / len(lost) ** 0.5
    return CurvePoint(
        threshold=float(pruned.max()) if len(pruned) else -1.0,
        pruned=len(pruned),
        accuracy=float(right.double().mean()),
        drop=drop,
        drop_low=drop - half,
        drop_high=drop + half,
    )


def products(model: nn.Module) -> list[str]:
    """Name the convolution and linear layers in module order; the last one is taken to give the logits.

    One before it is left out where its weight is no parameter of its own, because it is computed from others, as
    spectral normalization does, or is that of an earlier layer.

    Example:
        >>> products(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2)))
        ['0', '3']
    """
    names, own = _layers(model, PRODUCTS), dict(model.named_parameters())
    return [*(name for name in names[:-1] if weight_of(name) in own), *names[-1:]]


def norms(model: nn.Module) -> list[str]:
    """Name the layers that normalize by running statistics, in module order.

    Example:
        >>> norms(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)))
        ['1']
    """
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.running_var is not None
    ]


def norm_after(model: nn.Module, images: Tensor) -> dict[str, str]:
    """Pair each convolution or linear layer with the normalization that its output goes straight into.

    Found by running the network, not by the order of its modules, so that shortcuts and normalization before the
    convolution are paired rightly. An output that was changed in place on its way, as by a shortcut added to it, does
    not go straight. A layer that is used several times is paired by its first use.

    Args:
        model: The network; it is run in evaluation mode and is not changed.
        images: Two images `(n, C, H, W)` or more to run it on; some normalization cannot take one alone.

    Returns:
        Layer name to normalization name; layers without one are missing.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))
        >>> norm_after(net, torch.rand(2, 1, 4, 4))
        {'0': '1'}
    """
    normal, names = _layers(model, (*BATCH_NORMS, *OTHER_NORMS)), _layers(model, PRODUCTS)
    seen: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, inputs: Sequence[Tensor], output: Tensor) -> None:
        tensor = inputs[0] if name in normal else output
        seen.setdefault(name, (tensor, tensor._version))

    with (
        evaluating(model),
        torch.inference_mode(False),
        torch.no_grad(),
        watched(model, (*names, *normal), note),
    ):
        model(images)
    state = {name: (id(tensor), version) for name, (tensor, version) in seen.items()}
    made_by = {state[name]: name for name in reversed(names) if name in state}
    return {made_by[state[name]]: name for name in normal if state.get(name) in made_by}


def require_effect(model: nn.Module, images: Tensor, method: str) -> None:
    """Refuse a network in which normalization undoes every change of a neuron's scale.

    Args:
        model: The network; it is not changed.
        images: As for :func:`norm_after`.
        method: What is to learn such changes, for the text.

    Raises:
        ModelError: Each neuron goes straight into a normalization that looks at its channel alone.
    """
    units = [name.removesuffix(".weight") for name in Mask.ones(model, "neuron").values]
    if not set(units) <= set(products(model)):
        return
    after = norm_after(model, images)
    if all(unit in after and _undoes_scales(model.get_submodule(after[unit])) for unit in units):
        text = f"{method} learns how far to scale channels down, and here a normalization undoes every such change"
        raise ModelError(f"{text}: expected BatchNorm with a scale of its own (affine=True), or channels without any")


def _undoes_scales(norm: nn.Module) -> bool:
    return _over_places(norm) or not isinstance(norm, (nn.GroupNorm, nn.LayerNorm))


def _over_places(norm: nn.Module) -> bool:
    """Whether a normalization has a scale for each place of a map, not for each channel."""
    return isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 2


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def weight_of(layer: str) -> str:
    """Name the weight of a layer as in `model.named_parameters()`, also where the layer is the network itself.

    Example:
        >>> weight_of("head"), weight_of("")
        ('head.weight', 'weight')
    """
    return f"{layer}.weight".removeprefix(".")


def _channel_names(model: nn.Module) -> list[str]:
    own = dict(model.named_parameters())
    for kinds in (BATCH_NORMS, OTHER_NORMS):
        layers = [name for name in _layers(model, kinds) if not _over_places(model.get_submodule(name))]
        names = [weight_of(name) for name in layers if weight_of(name) in own]
        if names:
            return names
    return _weight_names(model)


def _weight_names(model: nn.Module) -> list[str]:
    return [weight_of(name) for name in products(model)[:-1]]


def _layers(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]
