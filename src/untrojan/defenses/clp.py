"""CLP: prune the channels that can amplify their input far more than the others of their layer."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.outliers import Outliers
from untrojan.errors import ModelError
from untrojan.mask import PRODUCTS, Mask, norm_after
from untrojan.model import evaluating
from untrojan.progress import stage
from untrojan.registry import config


@config
class CLP(Outliers):
    """Channel Lipschitzness-based Pruning: prune the channels that amplify most; needs no images.

    A small trigger can only turn a prediction if some channels react to it much more strongly than channels react to
    ordinary features. How strongly a channel can react is bounded by its Lipschitz constant. The bound used is the
    largest singular value of the channel's kernel as a matrix `(C_in, k * k)`, times the factor `|gamma| / sigma` by
    which the normalization behind the convolution scales it. Channels whose bound stands out of their layer are
    silenced, scale and bias.

    Which normalization follows which convolution or linear layer is found by running the network on two gray images.
    Without normalization the bound is the kernel's own; without running statistics it holds `|gamma|` alone, which says
    less. Where no convolution or linear layer feeds a normalization straight, as before the convolutions of a
    pre-activation network, there is nothing to bound: these channels get the score 0, which no threshold prunes. A
    network where that holds for all of them, such as most vision transformers, is refused.

    Needs:
        Nothing: it looks at weights only. Clean images choose how many channels to prune and verify the result;
        without any the published u = 3 decides.

    Cost:
        2 F, where F is one image through the network once, and one singular value decomposition per layer.

    Example:
        >>> from untrojan.sources.nets import build
        >>> nothing = CleanSet(torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.long))
        >>> CLP(select="count", count=3).repair(build("digits-cnn"), nothing).record.units_changed
        3

    References:
        Zheng, Tang, Li, Liu: Data-free backdoor removal based on channel Lipschitzness, ECCV 2022, arXiv:2208.03111.

    Deviations:
        * Convolutions are paired with the normalization that their output goes into. The published code takes the
          convolution defined last before it, which is another one in pre-activation networks and some shortcuts.
        * The factor is that of the network, with the epsilon that normalization adds to the variance; the published
          code leaves it out.
        * Where there are clean images, a paired budget of clean accuracy decides how many channels are pruned, down
          to those one deviation above the mean; the published code prunes at u = 3, whatever the accuracy.
        * Linear layers, other normalization and networks without any are covered as said above.

        With `variant="released"` there is no epsilon, and `threshold` or `count` must be selected.
    """

    name: ClassVar[str] = "clp"
    scores: ClassVar[str] = (
        "by how many standard deviations the most that a unit can amplify lies below the mean of its layer: units "
        "far above the mean have the lowest scores"
    )
    data_free: ClassVar[bool] = True

    zero_bias: bool = True

    def measure(self, model: nn.Module, clean: CleanSet, seed: int) -> Mapping[str, Tensor]:
        """Bound the Lipschitz constant of every channel that a convolution or linear layer makes.

        Raises:
            ModelError: There is none among the network's units.
        """
        after = norm_after(model, torch.full((2, *clean.shape), 0.5))
        before = {norm: layer for layer, norm in after.items()}
        bounds = {}
        units = Mask.ones(model, self.unit).values
        with stage("bound", total=len(units)) as advance, evaluating(model), torch.no_grad():
            for name, ones in units.items():
                unit = name.removesuffix(".weight")
                layer = before.get(unit, unit)
                made_by = model.get_submodule(layer)
                if isinstance(made_by, PRODUCTS):
                    bound = _largest(made_by.weight.float())
                    factor = self._factor(model.get_submodule(after[layer])) if layer in after else torch.tensor(1.0)
                    if bound.shape == ones.shape and factor.shape in (bound.shape, ()):
                        bounds[name] = bound * factor
                advance()
        if not bounds:
            raise ModelError("CLP bounds channels that a convolution or linear layer makes, and no channel here is one")
        return bounds

    def _factor(self, norm: nn.Module) -> Tensor:
        """How much a normalization scales each channel, as far as its state tells: `(channels,)` or `()`."""
        state = norm.state_dict()
        factor = torch.tensor(1.0)
        if "weight" in state:
            factor = state["weight"].float().reshape(len(state["weight"]), -1).abs().amax(1)
        if "running_var" in state:
            eps = 0.0 if self.variant == "released" else getattr(norm, "eps", 0.0)
            factor = factor / (state["running_var"].float() + eps).sqrt()
        return factor


def _largest(weight: Tensor) -> Tensor:
    """The largest singular value of each output channel's kernel, `(C_out,)`."""
    return torch.linalg.matrix_norm(weight.reshape(len(weight), weight.shape[1], -1), 2)
