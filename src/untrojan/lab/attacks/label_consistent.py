"""Label-consistent: images of the target class made hard, with marks in the corners."""

from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.errors import DataError
from untrojan.lab.attack import Attack
from untrojan.lab.surrogate import surrogate
from untrojan.registry import config

_CORNER = ((1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (1.0, -1.0, 1.0))
_IMAGES_AT_A_TIME = 256
_OVERSHOOT = 2.5


@config
class LabelConsistent(Attack):
    """Poison images of the target class whose own features are spoiled (clean-label).

    Poisoned images are moved by projected gradient ascent on the loss of a clean network, so that they are hard to
    learn; then all four corners get a 3x3 pattern of plus and minus `amplitude`. A network that trains on them learns
    the corners instead. At test time images get the corners only. As published: eps 16/255 and 100 iterations in
    BackdoorBench, and four fifths of the images of the target class in ANP.

    Attributes:
        amplitude: What is added to and taken from the pixels of the corners, in [0, 1].
        eps: How far a pixel is moved, at most, in [0, 1].
        iterations: Steps of gradient ascent, at least 0; each moves pixels by 2.5 eps / iterations.
        net: Architecture of the clean network, as for `--net`, without arguments.
        epochs: Passes of the clean network over the training images, at least 1.
        seed: Decides the clean network, at least 0.

    Raises:
        DataError: From `trigger`: corners of the images overlap.

    Example:
        >>> import torch
        >>> LabelConsistent().trigger(torch.full((1, 1, 6, 6), 0.5))[0, 0, :3].tolist()
        [[1.0, 0.0, 0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]]

    Deviations:
        * The published images come from an adversarially trained network of large size. Here the attacker trains a
          small one on the clean training images, without adversarial examples, and no download is needed.
        * BackdoorBench counts the poisoning rate in all images; here it is that of the target class, as in the paper.

    References:
        Turner, Tsipras, Madry: Label-consistent backdoor attacks, 2019, arXiv:1912.02771.
        Wu et al.: BackdoorBench, NeurIPS 2022, arXiv:2206.12654.
        Wu, Wang: Adversarial neuron pruning purifies backdoored deep models, NeurIPS 2021, arXiv:2110.14430.
    """

    name: ClassVar[str] = "label-consistent"
    rate: ClassVar[float] = 0.8
    clean_label: ClassVar[bool] = True

    amplitude: Annotated[float, Field(ge=0, le=1)] = 1.0
    eps: Annotated[float, Field(ge=0, le=1)] = 16 / 255
    iterations: Annotated[int, Field(ge=0)] = 100
    net: str = "digits-cnn"
    epochs: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0)] = 0

    def _trigger(self, images: Tensor) -> Tensor:
        corner = self.amplitude * images.new_tensor(_CORNER)
        size = len(corner)
        if min(images.shape[2:]) < 2 * size:
            raise DataError(f"expected images of {2 * size}x{2 * size} or more, got {tuple(images.shape[2:])}")
        images[..., :size, :size] += corner
        images[..., :size, -size:] += corner.flip(1)
        images[..., -size:, :size] += corner.flip(0)
        images[..., -size:, -size:] += corner.flip(0, 1)
        return images.clamp(0, 1)

    def _poisoned(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        judge = surrogate(clean, self.net, self.epochs, self.seed)
        hard = [self._hardened(judge, images, labels) for images, labels in few.batches(_IMAGES_AT_A_TIME)]
        return self._trigger(torch.cat(hard))

    def _hardened(self, judge: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        moved = images
        for _ in range(self.iterations):
            moved = moved.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(functional.cross_entropy(judge(moved), labels, reduction="sum"), moved)
            ahead = moved + _OVERSHOOT * self.eps / self.iterations * gradient.sign()
            moved = ahead.clamp(images - self.eps, images + self.eps).clamp(0, 1)
        return moved.detach()
