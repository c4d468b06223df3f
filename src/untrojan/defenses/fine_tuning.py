"""Plain fine-tuning on clean images."""

from functools import partial
from typing import ClassVar

from pydantic import Field
from torch import nn

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, sgd_cosine
from untrojan.device import new_generator
from untrojan.record import Diagnosis
from untrojan.registry import config


@config
class FineTuning(Tuning):
    """Fine-tuning: train all weights on clean images and hope that the backdoor fades.

    The baseline that every other method has to beat; it rarely removes a backdoor.

    Attributes:
        lr: Learning rate of SGD with momentum 0.9 at the beginning; it falls to 0 along a cosine.
        epochs: Passes over the images.
        weight_decay: At least 0.

    Needs:
        Clean images.

    Cost:
        3 F per image and epoch: 300 F per image, where F is one image through the network once.

    Example:
        >>> import torch
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> FineTuning(epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'fine-tuning'

    References:
        Wu, Chen, Zhang, Zhu, Wei, Yuan, Shen: BackdoorBench: a comprehensive benchmark of backdoor learning,
        NeurIPS 2022, arXiv:2206.12654.

    Deviations:
        * BackdoorBench crops and flips in batches of 256 on 5 % of the training set. Here images are taken as they are
          (`augment`), because mirroring is not right for all data, and batches are smaller where there are few images.
        * A part of the images is held out to judge the result.
    """

    name: ClassVar[str] = "fine-tuning"

    lr: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=100, ge=1)
    weight_decay: float = Field(default=5e-4, ge=0)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Train a copy in training mode."""
        batches = partial(self.batches, clean, new_generator(seed))
        sgd_cosine(model.train(), batches, lr=self.lr, epochs=self.epochs, weight_decay=self.weight_decay)
        return model
