"""The one optimization loop, and how large its batches are. Unlearning, fine-tuning and training are calls of it."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from untrojan.device import out_of_memory
from untrojan.errors import UnreliableWarning
from untrojan.progress import AtMost, stage

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_SMALLEST_BATCH = 8


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


class Standing(NamedTuple):
    """Where a fit stands after an epoch, with the states of optimizer and schedule, which later steps write to.

    A fit that begins with it, and with tensors and random states of the same moment, goes on as if it had never ended.
    """

    epochs: list[Epoch]
    steps: int
    optimizer: dict[str, Any]
    schedule: dict[str, Any]


def learnable(tensor: Tensor) -> bool:
    """Tell whether gradients can change a tensor; one of whole numbers stays as it is.

    Example:
        >>> learnable(torch.zeros(2)), learnable(torch.tensor([1, 0]))
        (True, False)
    """
    return tensor.is_floating_point() or tensor.is_complex()


def supervised(net: Callable[[Tensor], Tensor], sign: int = 1) -> Step:
    """Make the step that minimizes the cross-entropy of a network, or with a `sign` of -1 maximizes it.

    Example:
        >>> loss, logits = supervised(nn.Flatten(), sign=-1)(torch.zeros(1, 2), torch.tensor([0]))
        >>> round(loss.item(), 2)
        -0.69
    """

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out = net(images)
        return sign * functional.cross_entropy(out, labels), out

    return step


def fit(
    parameters: Sequence[Tensor],
    step: Step,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    optimizer: Callable[[Sequence[Tensor]], Optimizer],
    epochs: int,
    *,
    name: str,
    detail: str = "",
    schedule: Callable[[Optimizer], LRScheduler] | None = None,
    schedule_steps: bool = False,
    buffers: Sequence[Tensor] = (),
    clip: float | None = None,
    project: Callable[[], object] | None = None,
    stop: Callable[[Epoch], bool] | None = None,
    after_epoch: Callable[[Standing], str] | None = None,
    begin: Standing | None = None,
) -> Fit:
    """Minimize a loss over tensors, in place.

    When the loss is NaN or infinite, or a tensor that was finite becomes so, the fit ends there, everything goes back
    to where an epoch began from which the loss was finite, and a warning says at which step. Where the memory does not
    suffice for a batch, this and all later batches go through in halves, with gradients added up; normalization by
    batch statistics then sees the halves.

    Args:
        parameters: The leaf tensors to change, but those that are not :func:`learnable`; only they get gradients.
        step: From a batch of images `(b, C, H, W)` and labels `(b,)` to the mean loss and the logits `(b, K)`.
        batches: Called once per epoch for its batches.
        optimizer: Makes the optimizer over `parameters`.
        epochs: Passes over the data, at most.
        name: What the work is called in progress and timings.
        detail: Which of several rounds this is.
        schedule: Makes the schedule of the learning rate; stepped after each epoch.
        schedule_steps: Step the schedule after each update instead.
        buffers: Tensors that `step` writes to, such as running statistics.
        clip: Largest l2 norm of the gradient; a longer one is shortened to it.
        project: Called after each update, to put the tensors back into their allowed range.
        stop: Called after each epoch; true ends the fit.
        after_epoch: Called after each epoch; what it returns is shown with the progress.
        begin: Where another fit of the same arguments stood; `epochs` counts from the start of that one.

    Returns:
        The measured epochs, and how it ended.

    Raises:
        torch.OutOfMemoryError: A single image is too much.

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
    parameters = [each for each in parameters if learnable(each)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    finite = [each for each in (*parameters, *buffers) if each.isfinite().all()]
    updates = optimizer(parameters)
    rate = _Rate(schedule, updates, schedule_steps)
    history: list[Epoch] = []
    steps = 0
    if begin is not None:
        history, steps = list(begin.epochs), begin.steps
        updates.load_state_dict(begin.optimizer)
        rate.load(begin.schedule)
    gradient = _Gradient(parameters, step)
    sound: list[Tensor] = []
    confirmed = len(history)
    left = epochs - len(history)
    with stage(name, AtMost(left) if stop else left, detail) as advance:
        while len(history) < epochs:
            start = [tensor.detach().clone() for tensor in (*parameters, *buffers)]
            sound = sound or start
            tally = _Tally()
            for images, labels in batches():
                updates.zero_grad()
                loss, logits = gradient(images, labels)
                if not math.isfinite(loss):
                    break
                sound, confirmed = start, len(history)
                if clip is not None:
                    nn.utils.clip_grad_norm_(parameters, clip)
                updates.step()
                if project is not None:
                    with torch.no_grad():
                        project()
                rate.after_update()
                steps += 1
                tally.add(loss, logits, labels)
            else:
                loss = 0.0
            if not (math.isfinite(loss) and all(each.isfinite().all() for each in finite)):
                _put_back((*parameters, *buffers), sound)
                text = f"{name}: NaN or infinity at step {steps}; went back to the end of epoch {confirmed}"
                warnings.warn(UnreliableWarning(text), stacklevel=2)
                return Fit(history[:confirmed], stopped=False, diverged_at=steps)
            rate.after_epoch()
            history.append(tally.epoch())
            advance(after_epoch(Standing(history, steps, updates.state_dict(), rate.state())) if after_epoch else "")
            if stop is not None and stop(history[-1]):
                return Fit(history, stopped=True, diverged_at=None)
    return Fit(history, stopped=False, diverged_at=None)


def size_without_single(count: int, size: int) -> int:
    """Give the smallest batch size from `size` that leaves no batch of a single image, which BatchNorm could not take.

    Args:
        count: Number of images.
        size: Images per batch that are wanted, at least 2.

    Example:
        >>> size_without_single(9, 4), size_without_single(10, 4)
        (5, 4)
    """
    return next((each for each in range(size, count + 1) if count % each != 1), size)


def size_with_enough_steps(count: int, size: int) -> int:
    """Give the batch size, `size` at most, that makes at least four steps of `count` images and no single image.

    Batches hold at least eight images where there are so many, so few images can mean fewer steps. Where no size up to
    `size` will do, as with an odd number of images and a `size` of 2, they are larger.

    Args:
        count: Number of images.
        size: Images per batch that are wanted, at least 2.

    Example:
        >>> size_with_enough_steps(500, 128), size_with_enough_steps(100, 128), size_with_enough_steps(10, 128)
        (128, 25, 8)
    """
    wanted = size if count > 3 * size else min(size, max(_SMALLEST_BATCH, math.ceil(count / 4)))
    allowed = itertools.chain(range(wanted, size + 1), range(wanted - 1, 1, -1))
    return next((each for each in allowed if count % each != 1), size_without_single(count, size))


class _Rate:
    """The schedule of the learning rate, if there is one, stepped after each update or after each epoch."""

    def __init__(
        self, schedule: Callable[[Optimizer], LRScheduler] | None, updates: Optimizer, each_update: bool
    ) -> None:
        self.schedule = schedule(updates) if schedule else None
        self.each_update = each_update

    def after_update(self) -> None:
        if self.schedule and self.each_update:
            self.schedule.step()

    def after_epoch(self) -> None:
        if self.schedule and not self.each_update:
            self.schedule.step()

    def state(self) -> dict[str, Any]:
        return self.schedule.state_dict() if self.schedule else {}

    def load(self, state: dict[str, Any]) -> None:
        if self.schedule:
            self.schedule.load_state_dict(state)


class _Gradient:
    """Adds the gradient of a batch to the parameters, in as many pieces as the memory asks for."""

    def __init__(self, parameters: Sequence[Tensor], step: Step) -> None:
        self.parameters = list(parameters)
        self.step = step
        self.most = math.inf

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[float, Tensor]:
        while True:
            pieces = self._pieces_of(len(images))
            largest = math.ceil(len(images) / pieces)
            try:
                return self._in_pieces(images, labels, pieces)
            except RuntimeError as error:
                if not out_of_memory(error) or largest == 1:
                    raise
            self.most = largest // 2
            for parameter in self.parameters:
                parameter.grad = None
            pieces = self._pieces_of(len(images))
            text = f"out of memory: batches of {len(images)} images now go through in {pieces} pieces"
            warnings.warn(UnreliableWarning(text), stacklevel=4)

    def _pieces_of(self, images: int) -> int:
        """Into how many pieces a batch goes: none is a single image, which BatchNorm could not take, unless all are."""
        return images if self.most == 1 else max(1, min(math.ceil(images / self.most), images // 2))

    def _in_pieces(self, images: Tensor, labels: Tensor, pieces: int) -> tuple[float, Tensor]:
        total, outputs = 0.0, []
        for few, their in zip(images.tensor_split(pieces), labels.tensor_split(pieces), strict=True):
            loss, logits = self.step(few, their)
            loss = loss * (len(few) / len(images))
            total += loss.item()
            outputs.append(logits.detach())
            if math.isfinite(total):
                loss.backward(inputs=self.parameters)
        return total, torch.cat(outputs)


class _Tally:
    def __init__(self) -> None:
        self.images = 0
        self.loss = 0.0
        self.correct = 0
        self.votes: Tensor | int = 0

    def add(self, loss: float, logits: Tensor, labels: Tensor) -> None:
        predicted = logits.argmax(1)
        self.images += len(labels)
        self.loss += loss * len(labels)
        self.correct += int((predicted == labels).sum())
        self.votes = self.votes + torch.bincount(predicted, minlength=logits.shape[1])

    def epoch(self) -> Epoch:
        shares = torch.as_tensor(self.votes) / self.images
        return Epoch(self.loss / self.images, self.correct / self.images, shares)


def _put_back(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
