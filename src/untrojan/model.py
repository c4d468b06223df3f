"""The model contract: any `nn.Module` from images `(N, C, H, W)` in [0, 1] to logits `(N, K)`.

Normalization lives inside the model (:class:`Normalize`). :func:`check` says everything that is wrong at once.
"""

import contextlib
import copy
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from untrojan.data import CleanSet
from untrojan.device import device_of, halving
from untrojan.errors import (
    ConfigError,
    DataError,
    ModelError,
    UnreliableWarning,
    UntrojanError,
    cause,
    enumerated,
    labelled,
)
from untrojan.fit import size_without_single
from untrojan.record import Rate

_STATISTICS = ("running_mean", "running_var")


class Normalize(nn.Module):
    """Subtracts a mean and divides by a standard deviation per channel; has nothing to save or learn.

    Args:
        mean: One value per channel, for images in [0, 1].
        std: One value per channel, each above 0.

    Raises:
        ConfigError: The two differ in length, a value is not finite, or a deviation is not above 0.

    Example:
        >>> net = nn.Sequential(Normalize((0.5,), (0.25,)), nn.Flatten())
        >>> net(torch.full((1, 1, 1, 1), 0.75)).item()
        1.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(map(math.isfinite, (*mean, *std))) or min(std, default=0) <= 0:
            text = f"expected as many finite deviations above 0 as finite means, got mean {mean} and std {std}"
            raise ConfigError(text)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `(N, C, H, W)` in [0, 1] to normalized ones of the same shape."""
        if len(self.mean) not in (1, images.shape[1]):
            raise ModelError(f"expected images of {len(self.mean)} channels, as many as means, got {images.shape[1]}")
        return (images - self.mean) / self.std


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold every part of `model` in evaluation mode, then put each part's own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def copied(model: nn.Module) -> nn.Module:
    """Copy a network with all that it holds.

    Raises:
        ModelError: It holds a weight that was computed, which torch cannot copy.
    """
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        if "deepcopy protocol" not in str(error):
            raise
        text = (
            "the network cannot be copied, because a weight of it is computed, as by torch.nn.utils.weight_norm; use "
            "torch.nn.utils.parametrizations.weight_norm, or call torch.nn.utils.remove_weight_norm first"
        )
        raise ModelError(text) from error


@contextlib.contextmanager
def watched(
    model: nn.Module, names: Iterable[str], note: Callable[[str, Sequence[Tensor], Tensor], None]
) -> Iterator[None]:
    """Tell of every call of layers while the block runs.

    Args:
        model: The network; its hooks are gone afterwards, also when a layer raises.
        names: The layers, as in `model.named_modules()`.
        note: Called after each call with the name of the layer, its inputs, those by keyword last, and its output.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with watched(net, ["0", "1"], lambda name, inputs, output: print(name, tuple(inputs[0].shape))):
        ...     out = net(torch.rand(3, 1, 2, 2))
        0 (3, 1, 2, 2)
        1 (3, 4)
    """
    modules = dict(model.named_modules())

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], None]:
        return lambda _, inputs, named, output: note(name, (*inputs, *named.values()), output)

    with contextlib.ExitStack() as hooks:
        for name in names:
            hooks.callback(modules[name].register_forward_hook(hook(name), with_kwargs=True).remove)
        yield


@contextlib.contextmanager
def tapped(
    model: nn.Module, names: Iterable[str], side: Literal["input", "output"] = "output"
) -> Iterator[dict[str, list[Tensor]]]:
    """Read what goes into or comes out of layers while the block runs.

    Args:
        model: The network; its hooks are gone afterwards, also when a layer raises.
        names: The layers, as in `model.named_modules()`.
        side: Whether to keep the first input or the output of each call, as it was before later layers changed it.

    Yields:
        For every layer the tensors of its calls so far, in order, attached to the graph; clear a list to start anew.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with tapped(net, ["1"]) as seen:
        ...     out = net(torch.rand(3, 1, 2, 2))
        >>> torch.equal(seen["1"][0], out)
        True
    """
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(name: str, inputs: Sequence[Tensor], output: Tensor) -> None:
        seen[name].append(inputs[0] if side == "input" else output.clone())

    with watched(model, seen, keep):
        yield seen


def call_with(model: nn.Module, images: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Run a network with other parameters and buffers than its own; it is not rewritten.

    A tensor that several layers share is replaced in each of them; torch's own tie_weights leaves its values in a layer
    that has two names (pytorch issue 164759). Buffers that are not replaced are written to in training mode.

    Args:
        model: The network, in the mode wanted.
        images: `(N, C, H, W)` in [0, 1].
        values: What to use instead, by the name of the parameter or buffer, in its shape.

    Returns:
        Logits `(N, K)`, with gradients reaching the values.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> call_with(net, torch.rand(1, 1, 2, 2), {"1.weight": torch.zeros(2, 4), "1.bias": torch.ones(2)})
        tensor([[1., 1.]])
    """
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    replaced = {id(own[name]): value for name, value in values.items()}
    state = {
        name: replaced[id(tensor)]
        for prefix, module in model.named_modules()
        for name, tensor in (
            *module.named_parameters(prefix, recurse=False, remove_duplicate=False),
            *module.named_buffers(prefix, recurse=False, remove_duplicate=False),
        )
        if id(tensor) in replaced
    }
    return functional_call(model, state, (images,), tie_weights=False)


def logits(model: nn.Module, clean: CleanSet, batch_size: int = 100) -> Tensor:
    """Run the model over a set in evaluation mode, without gradients and without changing it.

    Args:
        model: The network.
        clean: The images, taken in their order.
        batch_size: Images per forward pass, fewer where the memory does not suffice, and one or two more where the last
            pass would get a single image; has no influence on the result beyond rounding.

    Returns:
        Logits, float `(N, K)`.

    Raises:
        ModelError: A logit is NaN or infinite.
        torch.OutOfMemoryError: A single image is too much.
    """

    def at_a_time(size: int) -> Tensor:
        size = size_without_single(len(clean), size) if size > 1 else size
        return torch.cat([model(images) for images, _ in clean.batches(size)])

    with evaluating(model), torch.no_grad():
        out = halving(at_a_time, batch_size)
    if not torch.isfinite(out).all():
        raise ModelError("expected finite logits, got NaN or infinity")
    return out


def classes_of(model: nn.Module, clean: CleanSet) -> int:
    """Count the classes of a network by its logits of two images, for some normalization cannot take one alone.

    Example:
        >>> clean = CleanSet(torch.rand(1, 1, 2, 2), torch.tensor([0]))
        >>> classes_of(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), clean)
        3
    """
    return logits(model, clean.take([0, -1]).to(device_of(model))).shape[1]


def correct(model: nn.Module, clean: CleanSet) -> Tensor:
    """Tell for each image whether the model gives its true label: bool `(N,)`."""
    return logits(model, clean).argmax(1) == clean.labels


def accuracy_of(model: nn.Module, clean: CleanSet) -> tuple[Rate, str]:
    """Measure how often a model gives clean images their label, and warn where that is too seldom.

    Too seldom is for less than half of them, or no more often than chance may, by the 95 % interval. Then what triggers
    do to the model says little, no repair can lose accuracy, and the checks of it mean little.

    Args:
        model: The network; it is not changed.
        clean: Images with their labels, at least one.

    Returns:
        The share of images that it is right on, and the doubt in words, empty where there is none.

    Example:
        >>> clean = CleanSet(torch.eye(8).view(8, 8, 1, 1), torch.arange(8))
        >>> right, doubt = accuracy_of(nn.Flatten(), clean)
        >>> right.value, doubt
        (1.0, '')
    """
    out = logits(model, clean)
    right = Rate.of(int((out.argmax(1) == clean.labels).sum()), len(clean))
    wrong = (right.high or 0) < 0.5
    if not wrong and (right.low or 0) > 1 / out.shape[1]:
        return right, ""
    images = f"{right.count} of {right.total} clean images"
    doubt = f"the model is right on {images}, which {'is less than half' if wrong else 'may be chance'}"
    text = (
        f"{doubt}: check that it gets images as it was trained on (--mean and --std, or Normalize in Python), and that "
        "their labels are in the order of its classes"
    )
    warnings.warn(UnreliableWarning(text), stacklevel=3)
    return right, doubt


class Problem(NamedTuple):
    """Something that keeps a model and a clean set from being used together."""

    error: type[UntrojanError]
    text: str


def require_kinds(model: object, clean: object) -> None:
    """Raise where something else was given as a network or as clean images.

    Raises:
        ModelError: `model` is no network.
        DataError: `clean` is no clean set.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"expected a network, a torch.nn.Module, got {type(model).__name__}; untrojan.load opens a file"
        )
    if not isinstance(clean, CleanSet):
        text = (
            f"expected clean images as a CleanSet, got {type(clean).__name__}; CleanSet.load reads files, CleanSet.of"
        )
        raise DataError(f"{text} takes a pair of images and labels, a Dataset or a DataLoader")


def check(model: nn.Module, clean: CleanSet, learns: bool = True) -> list[Problem]:
    """List everything that is wrong with a model and the clean images for it.

    Buffers other than running statistics may hold infinity, as a mask of attention does.

    Args:
        model: Any network; it is not changed.
        clean: The clean images meant for it.
        learns: Whether triggers are searched or weights trained, which takes gradients; else logits will do.

    Returns:
        Every problem found, in words for the user; an empty list when the two can be used.

    Raises:
        ModelError: `model` is no network at all.
        DataError: `clean` is no clean set.

    Example:
        >>> clean = CleanSet(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 0, 1]))
        >>> check(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), clean)
        []
        >>> check(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), clean)[0].text
        'no image of class 2: expected at least one clean image of each of the 3 classes of the model'
    """
    require_kinds(model, clean)
    constants = {name for name, _ in model.named_buffers(remove_duplicate=False) if not name.endswith(_STATISTICS)}
    bad = [
        name
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and not _usable(value, name in constants)
    ]
    problems = [Problem(ModelError, f"weights hold NaN or infinity: {', '.join(bad)}")] if bad else []
    if len(clean) < 2:
        text = f"expected at least 2 clean images, to fit and to hold out, got {len(clean)}"
        problems.append(Problem(DataError, text))
    if not len(clean):
        return problems
    few = clean.take(range(min(2, len(clean)))).to(device_of(model)).floats()
    try:
        with evaluating(model), torch.no_grad():
            out = model(few.clone())
    except Exception as error:
        size, channels = "x".join(map(str, clean.shape)), clean.shape[0]
        wanted = re.search(rf"to have (\d+) channels, but got {channels} channels", str(error))  # as torch says it
        why = f"expected {wanted[1]} channels, got {channels}; convert the images" if wanted else cause(error)
        text = f"the model cannot take images of {size} (channels x height x width): {why}"
        return [*problems, Problem(ModelError, text)]
    problems += _check_output(out, len(few), clean, weights_finite=not bad)
    return problems or (_check_gradient(model, few) if learns else [])


def require(model: nn.Module, clean: CleanSet, learns: bool = True) -> None:
    """Raise what :func:`check` finds, all problems in one error."""
    problems = check(model, clean, learns)
    if problems:
        raise problems[0].error("; ".join(problem.text for problem in problems))


def require_logits(model: nn.Module, images: CleanSet, who: str = "") -> None:
    """Raise where a model gives no logits for images, which, unlike clean ones for a repair, may leave classes out.

    Args:
        model: Any network; it is not changed.
        images: At least one.
        who: What the text begins with.

    Raises:
        ModelError: It does not; all reasons in one error.
    """
    if texts := [problem.text for problem in check(model, images, learns=False) if problem.error is ModelError]:
        raise ModelError(who + "; ".join(texts))


def _usable(value: Tensor, may_be_infinite: bool) -> bool:
    return not (value.is_floating_point() and (value.isnan() if may_be_infinite else ~value.isfinite()).any())


def _check_gradient(model: nn.Module, few: Tensor) -> list[Problem]:
    with evaluating(model), torch.inference_mode(False), torch.enable_grad():
        shown = few.clone().requires_grad_()
        try:
            torch.autograd.grad(model(shown).sum(), shown)
            why = "" if torch.equal(shown, few) else "it changes them in place"
        except Exception as error:
            why = cause(error)
    if not why:
        return []
    text = (
        "expected gradients from the logits to the images, which are left as they are; run no part of the model under "
        f"torch.no_grad, and normalize by `(images - mean) / std`, not in place: {why}"
    )
    return [Problem(ModelError, text)]


def _check_output(out: object, images: int, clean: CleanSet, weights_finite: bool) -> list[Problem]:
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != images or not out.is_floating_point():
        came = f"{out.dtype} of {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        text = f"expected floating-point logits of shape (images, classes) for {images} images, got {came}"
        return [Problem(ModelError, text)]
    problems = []
    if weights_finite and not torch.isfinite(out).all():
        problems.append(Problem(ModelError, "the model gives NaN or infinite logits on clean images"))
    classes = out.shape[1]
    highest = int(clean.labels.max())
    if highest >= classes:
        problems.append(
            Problem(
                DataError,
                f"labels go up to {highest}, but the model has {classes} classes, 0 to {classes - 1}; "
                "labels count from 0",
            )
        )
        return problems
    missing = (torch.bincount(clean.labels, minlength=classes) == 0).nonzero().flatten().tolist()
    if missing:
        names = clean.class_names or ()
        some = ", ".join(labelled(label, names) for label in missing[:10])
        some += f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        wanted = f"expected at least one clean image of each of the {classes} classes of the model"
        known = f"; the classes of the images are {enumerated(names, ', ')}" if 0 < len(names) < classes else ""
        problems.append(Problem(DataError, f"no image of class {some}: {wanted}{known}"))
    return problems
