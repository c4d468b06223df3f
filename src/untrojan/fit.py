"""The one optimization loop. Unlearning, recovering a mask, fine-tuning and training are calls of it."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from untrojan.progress import stage

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Epoch(NamedTuple):
    """One pass over the data, measured on each batch before its update.

    `shares` is the share of predictions of each class, `(K,)`.
    """

    loss: float
    accuracy: float
    shares: Tensor


class Fit(NamedTuple):
    """How a fit went: its epochs, whether the stop rule ended it, and the step at which the loss left the numbers."""

    epochs: list[Epoch]
    stopped: bool
    diverged_at: int | None


def fit(
    parameters: Sequence[Tensor],
    step: Step,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    optimizer: Callable[[Sequence[Tensor]], Optimizer],
    epochs: int,
    *,
    name: str,
    detail: str = "",
    milestones: Sequence[int] = (),
    buffers: Sequence[Tensor] = (),
    project: Callable[[], object] | None = None,
    stop: Callable[[Epoch], bool] | None = None,
) -> Fit:
    """Minimize a loss over tensors, in place.

    When the loss or a tensor is NaN or infinite the fit ends there and everything goes back to where the epoch began.

    Args:
        parameters: The leaf tensors to change; only they get gradients.
        step: From a batch of images `(b, C, H, W)` and labels `(b,)` to the loss and the logits `(b, K)`.
        batches: Called once per epoch for its batches.
        optimizer: Makes the optimizer over `parameters`.
        epochs: Passes over the data, at most.
        name: What the work is called in progress and timings.
        detail: Which of several rounds this is.
        milestones: Epochs, counted from 0, before which the learning rate falls to a tenth.
        buffers: Tensors that `step` writes to, such as running statistics.
        project: Called after each update, to put the tensors back into their allowed range.
        stop: Called after each epoch; true ends the fit.

    Returns:
        The measured epochs, and how it ended.

    Example:
        >>> weight = torch.zeros(1, requires_grad=True)
        >>> def step(images, labels):
        ...     logits = torch.cat([weight * images, -weight * images], dim=1)
        ...     return torch.nn.functional.cross_entropy(logits, labels), logits
        >>> data = lambda: [(torch.ones(2, 1), torch.tensor([0, 0]))]
        >>> done = fit([weight], step, data, lambda p: torch.optim.SGD(p, lr=1.0), epochs=3, name="fit")
        >>> [round(epoch.loss, 2) for epoch in done.epochs]
        [0.69, 0.13, 0.08]
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    updates = optimizer(parameters)
    schedule = torch.optim.lr_scheduler.MultiStepLR(updates, list(milestones), gamma=0.1)
    history: list[Epoch] = []
    steps = 0
    with stage(name, total=epochs, detail=detail) as advance:
        for _ in range(epochs):
            start = [tensor.detach().clone() for tensor in (*parameters, *buffers)]
            tally = _Tally()
            for images, labels in batches():
                loss, logits = step(images, labels)
                if not math.isfinite(loss.item()):
                    _put_back((*parameters, *buffers), start)
                    return Fit(history, stopped=False, diverged_at=steps)
                updates.zero_grad()
                loss.backward(inputs=list(parameters))
                updates.step()
                if project is not None:
                    with torch.no_grad():
                        project()
                steps += 1
                tally.add(loss.detach(), logits.detach(), labels)
            if not all(parameter.isfinite().all() for parameter in parameters):
                _put_back((*parameters, *buffers), start)
                return Fit(history, stopped=False, diverged_at=steps)
            schedule.step()
            history.append(tally.epoch())
            advance()
            if stop is not None and stop(history[-1]):
                return Fit(history, stopped=True, diverged_at=None)
    return Fit(history, stopped=False, diverged_at=None)


class _Tally:
    def __init__(self) -> None:
        self.images = 0
        self.loss = 0.0
        self.correct = 0
        self.votes: Tensor | int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        predicted = logits.argmax(1)
        self.images += len(labels)
        self.loss += loss.item() * len(labels)
        self.correct += int((predicted == labels).sum())
        self.votes = self.votes + torch.bincount(predicted, minlength=logits.shape[1])

    def epoch(self) -> Epoch:
        shares = torch.as_tensor(self.votes) / self.images
        return Epoch(self.loss / self.images, self.correct / self.images, shares)


def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
