"""FMP: attack every feature map, prune those whose change breaks the prediction, fine-tune the rest."""

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, sgd_cosine
from untrojan.device import device_of, halving, new_generator, running_on
from untrojan.errors import UnreliableWarning
from untrojan.mask import norm_after, products
from untrojan.model import evaluating, tapped
from untrojan.progress import stage
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.run import chose

BATCH = 32
SCORED_AT_ONCE = 128


class Ranking(NamedTuple):
    """How the network does on the images made for each feature map of one layer.

    Attributes:
        right: How many of the images it still gets right: float `(maps,)`.
        margin: By how much the true class leads the best other one, summed over the images: float `(maps,)`.
    """

    right: Tensor
    margin: Tensor

    def lowest(self, count: int, by_margin: bool = True) -> Tensor:
        """Indices of the maps with the fewest right images, lowest margin first among equals; else lowest index."""
        order = self.margin.argsort(stable=True) if by_margin else torch.arange(len(self.margin))
        return order[self.right[order].argsort(stable=True)][:count]


@config
class FMP(Tuning):
    """Adversarial Feature Map Pruning: prune feature maps whose attack breaks the prediction, then fine-tune.

    Feature reverse generation makes images for each feature map of each layer: one gradient-sign step from a random
    start near the clean image, in the direction in which the map changes most. A map that carries a backdoor is one
    whose change breaks the prediction, so the accuracy of the whole network on these images is the score of the map.
    In each layer the C / p maps with the lowest accuracy, rounded down, are set to zero: their row of the convolution,
    and the channel of the normalization that follows. All weights are then trained on clean images, and the pruned maps
    are held at zero.

    A feature map is an output channel of a convolution, or a column of the last dimension of a linear layer's output.
    The last layer, the logits, is left out, and so is a layer with fewer than p maps.

    Attributes:
        variant: `fixed` or `released`; see Deviations.
        prune: Whether to prune before fine-tuning; without it what remains is the fine-tune-only ablation.
        p: One of this many maps per layer is pruned, at least 2; layers with fewer maps are left alone.
        images: How many clean images to make images from, for each map; `released` takes 32 at most.
        alpha: Largest change of a pixel at the start, in (0, 1] of the full range.
        eps: Size of the step and, but for `released`, largest change of a pixel at the end, in (0, 1].
        lr: Learning rate of SGD with momentum 0.9 at the beginning; it falls to 0.0001 along a cosine.
        epochs: Passes over the images.

    Needs:
        Clean images.

    Cost:
        About 1.5 F per image ranked on and map, and 2 F per image besides, where F is one image through the network
        once: 128 (1.5 maps + 2) F for the maps of all layers with 64 or more; then 30 F per image to fine-tune.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> FMP(p=16, epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'fmp'

    References:
        Huang, Bu: Adversarial feature map pruning for backdoor, ICLR 2024, arXiv:2307.11565.

    Deviations:
        The published code has its settings in a file that was not published; alpha and eps are those of the
        configuration for CIFAR-10 of its precursor, as are ten epochs. Here:

        * Images are changed in pixel space, where the network normalizes by itself. The published code clamps images
          to [0, 1] that are normalized already, which blackens half of their pixels.
        * The start is uniform; the published code takes the sign of it, a corner.
        * What comes out stays within eps of the clean image, as the paper has it; the published code adds eps to the
          start.
        * 128 images: with the published 32, scores come in steps of 1/32 and many maps tie. Among equals the map with
          the lower margin of the true class goes first; the published code leaves them to an unstable sort.
        * Rankings belong to layers by name, and normalization is found by running the network. The published code goes
          by order, which assigns rankings to the wrong layers in pre-activation networks.
        * Biases are set to zero with the weights, and what is pruned is put back to zero after each step.
        * Linear layers count as layers, as in networks of tokens.
        * A part of the images is held out to judge the result.
        * The published code crops and flips, its precursor in batches of 256. Here images are taken as they are
          (`augment`), in batches of 128 (`batch_size`), and smaller ones where there are few images.

        With `variant="released"` there are 32 images at most, the start is a corner, nothing keeps the images within
        eps, ties fall to the first map, biases stay, and pruned maps are not held at zero.
    """

    name: ClassVar[str] = "fmp"

    variant: Literal["fixed", "released"] = "fixed"
    prune: bool = True
    p: int = Field(default=64, ge=2)
    images: int = Field(default=128, ge=1)
    alpha: float = Field(default=1 / 255, gt=0, le=1)
    eps: float = Field(default=4 / 255, gt=0, le=1)
    lr: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=10, ge=1)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Prune the lowest maps of each layer and train all weights in training mode."""
        silence = self._silencer(model, clean, seed)
        silence()
        batches = partial(self.batches, clean, new_generator(seed))
        project = None if self.variant == "released" else silence
        sgd_cosine(model.train(), batches, lr=self.lr, epochs=self.epochs, last_lr=min(self.lr, 1e-4), project=project)
        return model

    def rank(self, model: nn.Module, clean: CleanSet, seed: int) -> dict[str, Ranking]:
        """Score every feature map of the layers that have at least p of them.

        All maps share one random start, hence one forward pass; each map adds a backward pass that ends at its layer.

        Args:
            model: The network; it is not changed.
            clean: The images to start from.
            seed: Draws the images and the start.

        Returns:
            Rankings by layer name; layers whose output is not seen, or does not depend on the image, are missing.
        """
        with running_on(device_of(model)):
            return self._rank(copy.deepcopy(model).requires_grad_(False), clean, new_generator(seed))

    def _rank(self, model: nn.Module, clean: CleanSet, generator: torch.Generator) -> dict[str, Ranking]:
        limit = min(self.images, BATCH) if self.variant == "released" else self.images
        shown = clean.some(limit, generator)
        return halving(partial(self._scored, model, shown, generator), BATCH)

    def _scored(self, model: nn.Module, shown: CleanSet, generator: torch.Generator, batch: int) -> dict[str, Ranking]:
        widths = {name: len(_weight(model, name)) for name in products(model)[:-1]}
        names = [name for name, width in widths.items() if width >= self.p]
        scores: dict[str, Tensor] = {}
        total = sum(widths[name] for name in names) * math.ceil(len(shown) / batch)
        with stage("rank maps", total=total) as advance, evaluating(model):
            for images, labels in shown.batches(batch) if names else ():
                made = self._made(model, names, images, self._start(images, generator))
                while group := list(islice(made, SCORED_AT_ONCE * batch // BATCH // len(images))):
                    for one, score in zip(group, _scores(model, [one.images for one in group], labels), strict=True):
                        scores.setdefault(one.layer, torch.zeros(widths[one.layer], 2))[one.map] += score
                        advance()
        return {name: Ranking(*score.unbind(1)) for name, score in scores.items()}

    def _silencer(self, model: nn.Module, clean: CleanSet, seed: int) -> Callable[[], None]:
        """Give what sets the lowest maps of each layer to zero, now and after each step."""
        rankings = self.rank(model, clean, seed) if self.prune else {}
        if self.prune and not rankings:
            text = (
                f"no layer with a weight of its own has {self.p} feature maps: nothing is pruned, and this is plain "
                "fine-tuning; give a lower p"
            )
            warnings.warn(UnreliableWarning(text), stacklevel=3)
        released = self.variant == "released"
        after = norm_after(model, clean.take([0, -1]).floats()) if rankings else {}
        pruned = {
            name: ranking.lowest(len(ranking.right) // self.p, by_margin=not released)
            for name, ranking in rankings.items()
        }
        chose("maps pruned", {name: lowest.tolist() for name, lowest in pruned.items()})
        silenced: list[tuple[nn.Parameter, Tensor]] = []
        for name, lowest in pruned.items():
            width = len(rankings[name].right)
            for layer in (name, after[name]) if name in after else (name,):
                for part in ("weight",) if released else ("weight", "bias"):
                    parameter = getattr(model.get_submodule(layer), part, None)
                    if parameter is not None and len(parameter) == width:
                        silenced.append((parameter, lowest))

        def silence() -> None:
            with torch.no_grad():
                for parameter, lowest in silenced:
                    parameter[lowest] = 0

        return silence

    def _start(self, images: Tensor, generator: torch.Generator) -> Tensor:
        noise = 2 * torch.rand(images.shape, generator=generator) - 1
        return (images + self.alpha * (noise.sign() if self.variant == "released" else noise)).clamp(0, 1)

    def _made(self, model: nn.Module, names: list[str], images: Tensor, start: Tensor) -> Iterator["_Made"]:
        """Feature reverse generation for each map of each layer."""
        with torch.no_grad():
            clean = _maps(model, names, images)
        maps = _maps(model, names, start.requires_grad_())
        for name in names:
            pairs = [(one, other) for one, other in zip(maps[name], clean[name], strict=True) if one.requires_grad]
            axis = -1 if _weight(model, name).ndim == 2 else 1
            for each in range(len(_weight(model, name)) if pairs else 0):
                changes = [(one.select(axis, each) - other.select(axis, each)).square().sum() for one, other in pairs]
                (gradient,) = torch.autograd.grad(changes, start, retain_graph=True, materialize_grads=True)
                yield _Made(name, each, self._step(images, start.detach(), gradient))

    def _step(self, images: Tensor, start: Tensor, gradient: Tensor) -> Tensor:
        made = start + self.eps * gradient.sign()
        if self.variant == "fixed":
            made = images + (made - images).clamp(-self.eps, self.eps)
        return made.clamp(0, 1)


class _Made(NamedTuple):
    """The images made for one map of a layer."""

    layer: str
    map: int
    images: Tensor


def _weight(model: nn.Module, name: str) -> Tensor:
    return model.get_submodule(name).state_dict()["weight"]


def _maps(model: nn.Module, names: list[str], images: Tensor) -> dict[str, list[Tensor]]:
    with tapped(model, names) as seen:
        model(images)
    return seen


def _scores(model: nn.Module, groups: list[Tensor], labels: Tensor) -> Tensor:
    """Right images and summed margin of the true class of each group of images: `(groups, 2)`."""
    with torch.no_grad():
        logits = model(torch.cat(groups)).unflatten(0, (len(groups), len(labels)))
    true = labels.view(1, -1, 1).expand(len(groups), -1, 1)
    right = logits.argmax(2) == labels
    margin = logits.gather(2, true) - logits.scatter(2, true, -torch.inf).amax(2, keepdim=True)
    return torch.stack([right.sum(1).float(), margin.sum((1, 2))], dim=1)
