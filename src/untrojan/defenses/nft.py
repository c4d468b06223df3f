"""NFT: learn masks of the neurons on mixed clean images, and keep them soft."""

import math
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import CosineAnnealingLR

from untrojan.augmentation import AUGMENTATIONS
from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning
from untrojan.device import new_generator
from untrojan.fit import fit
from untrojan.mask import Mask, require_effect
from untrojan.record import Diagnosis
from untrojan.registry import config

_LAST_LR = 0.4


@config
class NFT(Tuning):
    """NFT: fine-tune soft masks of the neurons on mixed-up clean images, and leave the weights as they are.

    Every neuron (see :class:`untrojan.mask.Mask`) gets a multiplier m, 1 at first. The multipliers alone are trained,
    on MixUp, convex combinations of two images with the same combination of their losses, which stands in for a
    trigger to be resisted. Few multipliers in place of all weights, and a penalty on the distance to 1, keep the clean
    accuracy with as little as one image per class. A lower bound per layer, alpha exp(-beta layer), keeps the first
    layers, whose features all classes share, near what they were. The multipliers are folded in as they are; nothing
    is pruned outright. A network where normalization undoes every change of a neuron's scale is refused.

    Attributes:
        batch_size: Images per step, drawn with replacement.
        iterations: Steps.
        lr: Learning rate of SGD with momentum 0.95 at the beginning; it falls to two fifths of it along a cosine.
        alpha: The lower bound before the first layer, in [0, 1].
        beta: How fast the bound falls from layer to layer, at least 0.
        penalty: Weight of the sum of 1 - m over all neurons, divided by the number of images per class, at least 0.

    Needs:
        Clean images; one per class will do.

    Cost:
        2 F per image drawn, 3 F in a network without normalization: 2 x 128 x 1000 = 256,000 F, however many images
        there are.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> NFT(iterations=2).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'nft'

    References:
        Karim, Al Arafat, Khalid, Guo, Rahnavard: Augmented neural fine-tuning for efficient backdoor purification, ECCV
        2024, arXiv:2407.10052.
        Zhang, Cisse, Dauphin, Lopez-Paz: mixup: beyond empirical risk minimization, ICLR 2018, arXiv:1710.09412.

    Deviations:
        Fields have the values of the released code: learning rate 0.05, 1000 steps, N of the penalty as the number of
        images per class, layers counted from 1 in the order of their masks, multipliers of the scale of BatchNorm
        alone, running statistics that follow the masked network on the mixed images.

        * The learning rate falls with every step; in the released code after every 200.
        * In networks without BatchNorm the scales of other normalization are masked, or else the outputs of
          convolutions and linear layers.
        * The released code crops and flips; here images are taken as they are (`augment`).
        * A part of the images is held out to judge the result.
    """

    name: ClassVar[str] = "nft"

    iterations: int = Field(default=1000, ge=1)
    lr: float = Field(default=0.05, gt=0)
    alpha: float = Field(default=0.8, ge=0, le=1)
    beta: float = Field(default=0.5, ge=0)
    penalty: float = Field(default=0.001, ge=0)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Learn the masks in training mode, the weights frozen, and fold them in.

        Raises:
            ModelError: Normalization undoes every change of a neuron's scale.
        """
        model.train().requires_grad_(False)
        require_effect(model, clean.take([0, -1]).floats(), "NFT")
        generator = new_generator(seed)
        mask = Mask.ones(model, "neuron")
        multipliers = list(mask.values.values())

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            share = float(torch.rand((), generator=generator))
            other = torch.randperm(len(images), generator=generator)
            out = mask.call(model, share * images + (1 - share) * images[other], follow=True)
            loss = share * functional.cross_entropy(out, labels)
            loss = loss + (1 - share) * functional.cross_entropy(out, labels[other])
            distance = torch.stack([(1 - value).abs().sum() for value in multipliers]).sum()
            return loss + self.penalty * distance * out.shape[1] / len(clean), out

        def project() -> None:
            for layer, value in enumerate(multipliers, start=1):
                value.clamp_(self.alpha * math.exp(-self.beta * layer), 1)

        fit(
            multipliers,
            step,
            lambda: clean.draws(self.batch_size, 1, generator, AUGMENTATIONS[self.augment]),
            partial(torch.optim.SGD, lr=self.lr, momentum=0.95),
            self.iterations,
            name="mask",
            schedule=partial(CosineAnnealingLR, T_max=self.iterations, eta_min=_LAST_LR * self.lr),
            buffers=list(model.buffers()),
            project=project,
        )
        return mask.map(Tensor.detach).bake(model)
