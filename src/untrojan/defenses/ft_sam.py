"""FT-SAM: fine-tuning at weights that are perturbed for the worse."""

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, gradients, moved, sgd_cosine
from untrojan.device import new_generator
from untrojan.fit import learnable
from untrojan.record import Diagnosis
from untrojan.registry import config

_TINY = 1e-12


@config
class FTSAM(Tuning):
    """FT-SAM: fine-tune with adaptive sharpness-aware minimization, which shrinks the weights of backdoor neurons.

    Plain fine-tuning stays near the weights it begins with and leaves the large weights of backdoor neurons alone.
    Here every step first goes uphill, by a perturbation that grows with the size of each weight, and then descends
    with the gradient found there. Large weights are perturbed most, so it is they that have to change.

    Attributes:
        variant: `fixed` or `released`; see Deviations.
        rho: Size of the perturbation, above 0: with gradient g at weights w it is rho w² g / |w g|, element by element,
            where the norm goes over all weights together. Published are 2 for CIFAR-10 and 8 for GTSRB and Tiny
            ImageNet.
        label_smoothing: Share of the label that is spread over all classes, in [0, 1). Published are 0.1 for CIFAR-10
            and 0 for GTSRB and Tiny ImageNet.
        lr: Learning rate of SGD with momentum 0.9 at the beginning; it falls to 0 along a cosine.
        epochs: Passes over the images.
        weight_decay: At least 0.

    Needs:
        Clean images.

    Cost:
        6 F per image and epoch, twice that of plain fine-tuning: 600 F per image.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> FTSAM(epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'ft-sam'

    References:
        Zhu, Wei, Shen, Fan, Wu: Enhancing fine-tuning based backdoor defense with sharpness-aware minimization, ICCV
        2023, arXiv:2304.11823.
        Kwon, Kim, Park, Choi: ASAM: adaptive sharpness-aware minimization for scale-invariant learning of deep neural
        networks, ICML 2021, arXiv:2102.11600.

    Deviations:
        * One perturbation size and label smoothing for all data, those published for CIFAR-10; nothing clean says when
          another would be better.
        * BackdoorBench lowers the learning rate after every batch along a cosine whose period counts epochs, so that it
          swings up and down many times. Here it falls once, from the first epoch to the last.
        * BackdoorBench spreads the smoothed share over the other classes alone; here over all, as torch does. With ten
          classes 0.1 there is 0.11 here.
        * BackdoorBench crops and flips in batches of 256 on 5 % of the training set. Here images are taken as they are
          (`augment`), and batches are smaller where there are few images.
        * A part of the images is held out to judge the result.

        With `variant="released"` the learning rate swings, and the smoothed share is spread, as in BackdoorBench.
    """

    name: ClassVar[str] = "ft-sam"

    variant: Literal["fixed", "released"] = "fixed"
    rho: float = Field(default=2.0, gt=0)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    lr: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=100, ge=1)
    weight_decay: float = Field(default=5e-4, ge=0)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Train a copy in training mode; running statistics follow the unperturbed weights alone."""
        weights = list(filter(learnable, model.train().parameters()))
        released = self.variant == "released"

        def loss_of(out: Tensor, labels: Tensor) -> Tensor:
            if not released:
                return functional.cross_entropy(out, labels, label_smoothing=self.label_smoothing)
            true = functional.cross_entropy(out, labels)
            others = (-out.log_softmax(1).sum(1).mean() - true) / (out.shape[1] - 1)
            return (1 - self.label_smoothing) * true + self.label_smoothing * others

        def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            out = model(images)
            slopes = gradients(loss_of(out, labels), weights)
            with torch.no_grad():
                norm = torch.stack([(w * slope).norm() for w, slope in zip(weights, slopes, strict=True)]).norm()
                moves = [self.rho * w**2 * slope / (norm + _TINY) for w, slope in zip(weights, slopes, strict=True)]
            return loss_of(moved(model, images, moves), labels), out

        sgd_cosine(
            model,
            partial(self.batches, clean, new_generator(seed)),
            lr=self.lr,
            epochs=self.epochs,
            weight_decay=self.weight_decay,
            step=step,
            schedule_steps=released,
        )
        return model
