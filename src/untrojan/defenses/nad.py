"""NAD: train the model to look where a fine-tuned copy of it looks."""

import copy
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import MultiStepLR

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning
from untrojan.device import new_generator
from untrojan.errors import ModelError
from untrojan.fit import Step, fit, supervised
from untrojan.mask import products
from untrojan.model import tapped
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.run import chose


@config
class NAD(Tuning):
    """Neural Attention Distillation: train the model to attend where a fine-tuned copy of it attends.

    The copy, called teacher, is fine-tuned on clean images. Then the model itself, the student, is trained on the same
    images by cross-entropy while its attention maps are drawn to those of the teacher. An attention map says where in
    the image a layer is active: the mean over channels of the absolute activations to the power p, over all positions
    of unit length. Maps are compared after each third of the network by their mean squared difference, weighted by
    beta1, beta2 and beta3.

    Attributes:
        lr: Learning rate of SGD with Nesterov momentum 0.9 for the first 2 epochs, above 0; a tenth of it afterwards.
        teacher_epochs: Passes over the images to fine-tune the teacher.
        epochs: Passes over the images to train the student.
        weight_decay: At least 0.
        batch_size: Images per step, at most; fewer where there are less than four batches of them.
        beta1: Weight of the attention after the first third of the network, at least 0.
        beta2: Weight of the attention after the second third, at least 0.
        beta3: Weight of the attention at the end, at least 0.
        p: Power of the activations in an attention map, at least 1; the higher, the more the peaks count.

    Needs:
        Clean images, and a network with feature maps or tokens.

    Cost:
        3 F per image and epoch of either network, and 1 F per image for the teacher's maps (per image and epoch where
        images are augmented): 91 F per image, where F is one image through the network once.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> NAD(teacher_epochs=1, epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'nad'

    References:
        Li, Lyu, Koren, Lyu, Li, Ma: Neural attention distillation: erasing backdoor triggers from deep neural networks,
        ICLR 2021, arXiv:2101.05930.

    Deviations:
        * Attention is read where a convolution or linear layer ends each third of these layers, counted in module order
          without the last one. The published code reads the outputs of the three residual groups of WRN-16-1; these
          layers end the same groups, but are read before the shortcut is added. A network with fewer such layers has
          fewer maps, each with the weight of the latest third that it ends. A layer that training skips at random is
          left out of the batches that it is skipped in.
        * Of tokens (N, T, d) the map is the mean over d, one value per token.
        * The published code crops, flips and cuts out; here images are taken as they are (`augment`), because mirroring
          is not right for all data, and then the teacher's maps are computed once.
        * Batches are smaller where there are few images.
        * A part of the images is held out to judge the result.
    """

    name: ClassVar[str] = "nad"

    lr: float = Field(default=0.1, gt=0)
    teacher_epochs: int = Field(default=10, ge=1)
    epochs: int = Field(default=20, ge=1)
    weight_decay: float = Field(default=1e-4, ge=0)
    batch_size: int = Field(default=64, ge=2)
    beta1: float = Field(default=500, ge=0)
    beta2: float = Field(default=1000, ge=0)
    beta3: float = Field(default=1000, ge=0)
    p: float = Field(default=2, ge=1)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Fine-tune a teacher, then train the model with its attention."""
        teacher = copy.deepcopy(model).train()
        self._train(teacher, supervised(teacher), clean, self.teacher_epochs, seed, "fine-tune teacher")
        self._distill(teacher.eval().requires_grad_(False), model.train(), clean, seed)
        return model

    def _distill(self, teacher: nn.Module, student: nn.Module, clean: CleanSet, seed: int) -> None:
        betas = self._stages(teacher, clean)
        chose("weight of the attention of each layer", {**betas})
        numbered = CleanSet(clean.images, torch.arange(len(clean)))
        known = self._maps_of_all(teacher, clean, betas) if self.augment == "none" else None

        def distilled(images: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
            goals = (
                {name: maps[numbers] for name, maps in known.items()} if known else self._see(teacher, images, betas)
            )
            with tapped(student, betas) as seen:
                out = student(images)
            apart = [
                beta * functional.mse_loss(self._attention(student, name, seen[name][-1]), goals[name])
                for name, beta in betas.items()
                if seen[name]
            ]
            loss = functional.cross_entropy(out, clean.labels[numbers])
            return loss + torch.stack(apart).sum() if apart else loss, out

        self._train(student, distilled, numbered, self.epochs, seed, "distill")

    def _train(self, model: nn.Module, step: Step, clean: CleanSet, epochs: int, seed: int, name: str) -> None:
        fit(
            list(model.parameters()),
            step,
            partial(self.batches, clean, new_generator(seed)),
            partial(torch.optim.SGD, lr=self.lr, momentum=0.9, weight_decay=self.weight_decay, nesterov=True),
            epochs,
            name=name,
            schedule=partial(MultiStepLR, milestones=[2]),
            buffers=list(model.buffers()),
        )

    def _stages(self, teacher: nn.Module, clean: CleanSet) -> dict[str, float]:
        """The layers whose attention is compared, with their weights."""
        layers = products(teacher)[:-1]
        with tapped(teacher, layers) as seen, torch.no_grad():
            teacher(clean.take([0, -1]).floats())
        maps = [name for name in layers if seen[name] and _positions(teacher, name, seen[name][-1]) > 1]
        if not maps:
            raise ModelError("NAD compares attention maps, and no layer of the network has an output with positions")
        ends = (-(-len(maps) * third // 3) - 1 for third in (1, 2, 3))
        return {maps[end]: beta for end, beta in zip(ends, (self.beta1, self.beta2, self.beta3), strict=True)}

    def _maps_of_all(self, teacher: nn.Module, clean: CleanSet, layers: Mapping[str, float]) -> dict[str, Tensor]:
        parts = [self._see(teacher, images, layers) for images, _ in clean.batches(self.batch_size)]
        return {name: torch.cat([part[name] for part in parts]) for name in layers}

    def _see(self, teacher: nn.Module, images: Tensor, layers: Mapping[str, float]) -> dict[str, Tensor]:
        with torch.no_grad(), tapped(teacher, layers) as seen:
            teacher(images)
            return {name: self._attention(teacher, name, calls[-1]) for name, calls in seen.items()}

    def _attention(self, model: nn.Module, layer: str, output: Tensor) -> Tensor:
        """The attention map of each image as a vector of unit length."""
        return functional.normalize(output.abs().pow(self.p).mean(_channels(model, layer)).flatten(1))


def _channels(model: nn.Module, layer: str) -> int:
    """The dimension of a layer's output that holds its channels: the last one behind a linear layer."""
    return -1 if model.get_submodule(layer).get_parameter("weight").ndim == 2 else 1


def _positions(model: nn.Module, layer: str, output: Tensor) -> int:
    return output[0].numel() // output.shape[_channels(model, layer)]
