"""NPD: a learned linear map in front of a late layer that filters the backdoor out, folded into the layer."""

from collections.abc import Callable
from functools import partial
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.tuning import Tuning, sgd_cosine
from untrojan.device import new_generator
from untrojan.errors import ConfigError, ModelError
from untrojan.fit import supervised
from untrojan.mask import products, weight_of
from untrojan.model import call_with, watched
from untrojan.record import Diagnosis
from untrojan.registry import config
from untrojan.run import chose

_ENOUGH = 0.6
_LARGEST_LOSS = 80.0


@config
class NPD(Tuning):
    """Neural Polarizer: a linear map in front of one late layer learns to hold trigger features back.

    The network is frozen. In front of one layer stands a polarizer, a linear map over that layer's input channels that
    begins as the identity. It is trained on clean images and on their adversarial versions, which stand in for images
    with a trigger: each is perturbed toward the wrong class that the network finds most likely, and the polarized
    network has to give it its true label, neither the class it was sent to nor the one it is now most likely mistaken
    for. A linear map before a convolution or linear layer is again one: it is folded into the layer's weight, exactly,
    so that the architecture stays as it was.

    Attributes:
        layer: Name of the convolution or linear layer to put the polarizer in front of; without it the last one before
            the logits, as the network calls them, that mixes all its channels, or else the layer that gives the logits.
        lr: Learning rate of SGD with momentum 0.9 at the beginning, above 0; it falls to 0 along a cosine.
        epochs: Passes over the images.
        weight_decay: At least 0.
        warmup_lr: Learning rate of the warm-up on clean images alone, above 0.
        warmup_epochs: Passes over the images of the warm-up.
        radius: Largest l2 norm of a perturbation, for pixels in [0, 1], above 0.
        step_size: Change of a pixel by one step of the perturbation, above 0.
        iterations: Steps of the perturbation; it ends early where 60 % of the batch have reached their class.
        lambda_1: Factor of the cross-entropy on clean images, at least 0.
        lambda_2: Factor of the cross-entropy on perturbed images with their true labels, at least 0.
        lambda_3: Factor of minus the log of one minus the probability of a perturbed image's most likely wrong class,
            at least 0.
        lambda_4: The same for the class that the image was sent to.

    Needs:
        Clean images.

    Cost:
        5 F per image and epoch at most, and 1 F in the warm-up, 255 F per image: 3 F forward on the clean image, on the
        perturbed one and in between, 2 F back to the pixels. What trains the polarizer is the backward pass through the
        layers behind it, in addition.

    Example:
        >>> from untrojan.record import Diagnosis
        >>> from untrojan.sources.nets import build
        >>> clean = CleanSet(torch.rand(40, 1, 8, 8), torch.arange(40) % 10)
        >>> suspicion = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
        >>> NPD(warmup_epochs=1, epochs=1).repair(build("digits-cnn"), clean, suspicion).record.method.name
        'npd'

    References:
        Zhu, Wei, Zha, Wu: Neural polarizer: a lightweight and effective backdoor defense via purifying poisoned
        features, NeurIPS 2023, arXiv:2306.16697.

    Deviations:
        * The published polarizer is a 1x1 convolution with a BatchNorm layer behind it, and stays in the network as a
          new layer. Here it is folded into the layer behind it. A shift cannot be, where that layer pads with zeros, so
          there is no BatchNorm; its scale is part of the linear map.
        * The published default stands in front of the last block of a ResNet-18 (`layer4.1.conv1`), here in front of
          the last layer before the logits, whatever the network.
        * Images are sent to the most likely class other than the true one; published is the second most likely, which
          for an image that is misclassified can be the true one.
        * The loss of a perturbation is limited to 80 for each image, not for the batch.
        * BackdoorBench crops and flips; here images are taken as they are (`augment`). Batches are smaller where there
          are few images.
        * A part of the images is held out to judge the result.
    """

    name: ClassVar[str] = "npd"

    layer: str | None = None
    lr: float = Field(default=0.01, gt=0)
    epochs: int = Field(default=50, ge=1)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup_lr: float = Field(default=1e-4, gt=0)
    warmup_epochs: int = Field(default=5, ge=0)
    radius: float = Field(default=3.0, gt=0)
    step_size: float = Field(default=0.1, gt=0)
    iterations: int = Field(default=2, ge=1)
    lambda_1: float = Field(default=1.0, ge=0)
    lambda_2: float = Field(default=0.4, ge=0)
    lambda_3: float = Field(default=0.4, ge=0)
    lambda_4: float = Field(default=0.4, ge=0)

    def tune(self, model: nn.Module, clean: CleanSet, held: CleanSet, diagnosis: Diagnosis, seed: int) -> nn.Module:
        """Learn the polarizer in front of the frozen network, then fold it in."""
        model.eval().requires_grad_(False)
        layer = self._layer(model, clean)
        chose("layer behind the polarizer", layer)
        weight = model.get_submodule(layer).get_parameter("weight")
        fine = torch.promote_types(weight.dtype, torch.float32)
        polarizer = torch.eye(weight.shape[1], dtype=fine, device=weight.device)

        def call(images: Tensor) -> Tensor:
            return call_with(model, images, {weight_of(layer): _fold(weight, polarizer)})

        train = partial(
            sgd_cosine,
            model,
            partial(self.batches, clean, new_generator(seed)),
            weight_decay=self.weight_decay,
            parameters=[polarizer],
        )
        train(
            lr=self.warmup_lr, last_lr=self.warmup_lr, epochs=self.warmup_epochs, step=supervised(call), name="warm up"
        )
        train(lr=self.lr, epochs=self.epochs, step=partial(self._step, call), name="polarize")
        with torch.no_grad():
            weight.copy_(_fold(weight, polarizer))
        return model

    def _layer(self, model: nn.Module, clean: CleanSet) -> str:
        if self.layer is not None:
            mixing = [name for name in products(model) if _mixes(model, name)]
            if self.layer not in mixing:
                known = ", ".join(mixing) or "none"
                raise ConfigError(f"cannot put a polarizer in front of {self.layer!r}; layers that can: {known}")
            return self.layer
        used: list[str] = []
        with torch.no_grad(), watched(model, products(model), lambda name, *_: used.append(name)):
            model(clean.take([0, -1]).floats())
        mixing = [name for name in used if _mixes(model, name)]
        late = [name for name in mixing if name != used[-1]] or mixing
        if not late:
            raise ModelError("nothing to polarize: expected a convolution or linear layer that mixes its channels")
        return late[-1]

    def _step(self, call: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        shift = torch.zeros_like(images, requires_grad=True)
        out = call(images + shift)
        targets = _likeliest_wrong(out, labels)
        perturbed = self._perturb(call, images, shift, out, targets)
        loss = (
            self.lambda_1 * functional.cross_entropy(out, labels)
            + self.lambda_2 * functional.cross_entropy(perturbed, labels)
            - self.lambda_3 * _log_other(perturbed, _likeliest_wrong(perturbed, labels)).mean()
            - self.lambda_4 * _log_other(perturbed, targets).mean()
        )
        return loss, out

    def _perturb(
        self, call: Callable[[Tensor], Tensor], images: Tensor, shift: Tensor, out: Tensor, targets: Tensor
    ) -> Tensor:
        """Send the images to their targets and give the logits there; `out` are those where the shift is zero."""
        there = out
        for _ in range(self.iterations):
            if (there.argmax(1) == targets).float().mean() >= _ENOUGH:
                break
            loss = functional.cross_entropy(there, targets, reduction="none").clamp(max=_LARGEST_LOSS).sum()
            (slope,) = torch.autograd.grad(loss, shift, retain_graph=there is out)
            shift = self._onto_ball(shift.detach() - self.step_size * slope.sign()).requires_grad_()
            there = call(images + shift)
        return there

    def _onto_ball(self, shift: Tensor) -> Tensor:
        norms = shift.flatten(1).norm(dim=1).clamp(min=self.radius)
        return shift * (self.radius / norms).view(-1, 1, 1, 1)


def _mixes(model: nn.Module, name: str) -> bool:
    """Whether every output of the layer sees every input channel, by a weight that can be changed."""
    layer = model.get_submodule(name)
    return getattr(layer, "groups", 1) == 1 and isinstance(layer.weight, nn.Parameter)


def _fold(weight: Tensor, polarizer: Tensor) -> Tensor:
    """The weight `(out, in, ...)` of the layer that does what the polarizer `(in, in)` and the layer do in turn."""
    return torch.einsum("oj...,ji->oi...", weight.to(polarizer.dtype), polarizer).to(weight.dtype)


def _likeliest_wrong(out: Tensor, labels: Tensor) -> Tensor:
    return out.detach().scatter(1, labels[:, None], -torch.inf).argmax(1)


def _log_other(out: Tensor, labels: Tensor) -> Tensor:
    """Log of the probability of any class but the given: `(b,)`."""
    return out.scatter(1, labels[:, None], -torch.inf).logsumexp(1) - out.logsumexp(1)
