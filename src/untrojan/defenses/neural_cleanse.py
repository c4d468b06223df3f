"""Neural Cleanse: recover the trigger, and teach the model the true labels of stamped images."""

import warnings
from collections.abc import Iterator
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, sgd_cosine
from untrojan.device import new_generator
from untrojan.errors import UnreliableWarning
from untrojan.model import classes_of
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.run import chose
from untrojan.scanners.neural_cleanse import ENOUGH, SoftPatch, cleanse, diagnose


@config
class NeuralCleanse(Tuning):
    """Neural Cleanse: recover the trigger of the target label, then unlearn it with true labels.

    The trigger is the smallest patch, a mask and a pattern, that sends nearly all clean images to the label. Then the
    model is fine-tuned on clean images, a fifth of which carry the patch and keep their true labels.

    The label is the one that the scan suspects. Where it could not tell labels apart, patches of all labels are
    recovered, and the label is the one whose mask is too small: with an anomaly index above 2, the distance of its l1
    norm below the median in robust standard deviations. Labels with no patch that works are not compared.

    Attributes:
        mask_lr: Learning rate of Adam on mask and pattern, above 0.
        mask_epochs: Passes over the images to recover a patch, at most.
        lr: Learning rate of SGD with momentum 0.9 at the beginning, above 0; it falls to 0 along a cosine.
        epochs: Passes over the images to unlearn the patch.
        weight_decay: At least 0.
        stamped: Share of the images that carry the patch, in (0, 1].

    Needs:
        Clean images.

    Cost:
        2 F per image and epoch to recover and 3 F to unlearn, F being one image through the network once: at most
        221 F per image with a suspected label, 60 F and 161 F per class without.

    Example:
        >>> from untrojan.record import Diagnosis, Target
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> found = Diagnosis(verdict="found", rule="given", targets=[Target(label=7, score=1)], runs=[])
        >>> method = NeuralCleanse(mask_epochs=1, epochs=1)
        >>> method.repair(build("digits-cnn"), clean, found).record.method.name
        'neural-cleanse'

    References:
        Wang, Yao, Shan, Li, Viswanath, Zheng, Zhao: Neural Cleanse: identifying and mitigating backdoor attacks in
        neural networks, IEEE S&P 2019.

        Wu, Chen, Zhang, Zhu, Wei, Yuan, Shen: BackdoorBench: a comprehensive benchmark of backdoor learning,
        NeurIPS 2022, arXiv:2206.12654.

    Deviations:
        * The label comes from the scan where that has a suspect, so that one patch is recovered instead of one per
          class. Without a suspect and without an anomaly the smallest mask that works is used, and where none works
          the patch that reaches the most images, with a warning.
        * With several anomalies only the smallest mask is unlearned.
        * The paper unlearns for one epoch on 10 % of the training images; here it is 20 epochs, because there are few
          clean images, with a cosine schedule.
        * Which images carry the patch is drawn anew for every batch, and the patch is put on after `augment`.
        * Success is counted on images of other classes only; those of the label itself need no patch.
        * All labels start from the same random mask and pattern.
        * Batches are smaller where there are few images.
        * A part of the images is held out to judge the result.
    """

    name: ClassVar[str] = "neural-cleanse"

    mask_lr: float = Field(default=0.1, gt=0)
    mask_epochs: int = Field(default=80, ge=1)
    lr: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=20, ge=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    stamped: float = Field(default=0.2, gt=0, le=1)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Recover the trigger and unlearn it."""
        trigger = self.recover(model, clean, diagnosis, seed)
        chose("label", trigger.label)
        chose("l1 norm of its mask", trigger.norm)
        if not trigger.reached:
            text = (
                f"in no epoch a patch of label {trigger.label} reached {ENOUGH:.0%} of the images; the last one, which "
                f"reaches {trigger.success:.0%}, is unlearned"
            )
            warnings.warn(UnreliableWarning(text), stacklevel=2)
        generator = new_generator(seed)
        sgd_cosine(
            model.train(),
            lambda: self._with_patch(clean, trigger, generator),
            lr=self.lr,
            epochs=self.epochs,
            weight_decay=self.weight_decay,
            name="unlearn trigger",
        )
        return model

    def recover(self, model: nn.Module, clean: CleanSet, diagnosis: Diagnosis, seed: int) -> SoftPatch:
        """Recover the trigger of the suspected label, or of the label whose mask is too small.

        Args:
            model: The network; it is not changed.
            clean: Images to recover it on.
            diagnosis: What the scan found.
            seed: Decides everything random.
        """
        if diagnosis.suspect is not None:
            return self._cleanse(model, clean, [diagnosis.suspect], seed)[0]
        triggers = self._cleanse(model, clean, list(range(classes_of(model, clean))), seed)
        compared = diagnose(triggers)
        if not compared.targets:
            best = max(triggers, key=lambda trigger: trigger.success)
            text = f"no label has a patch that works; that of label {best.label} reaches the most images"
            warnings.warn(UnreliableWarning(text), stacklevel=3)
            return best
        smallest = compared.targets[0].label
        if compared.verdict != "found":
            text = f"no label's mask is too small; that of label {smallest} is the smallest that works"
            warnings.warn(UnreliableWarning(text), stacklevel=3)
        return triggers[smallest]

    def _cleanse(self, model: nn.Module, clean: CleanSet, labels: list[int], seed: int) -> list[SoftPatch]:
        return cleanse(model, clean, labels, seed, lr=self.mask_lr, epochs=self.mask_epochs)

    def _with_patch(
        self, clean: CleanSet, trigger: SoftPatch, generator: torch.Generator
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in self.batches(clean, generator):
            count = max(1, round(self.stamped * len(images)))
            chosen = torch.randperm(len(images), generator=generator)[:count]
            yield images.index_copy(0, chosen, trigger.stamp(images[chosen])), labels
