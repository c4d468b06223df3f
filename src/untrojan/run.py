"""What every run of a method tells its record: which model and images it was given, and which warnings it gave."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from untrojan.data import CleanSet
from untrojan.errors import UntrojanWarning
from untrojan.record import CleanInfo, ModelInfo
from untrojan.sources.files import Checkpoint, state_sha256


@contextmanager
def collected() -> Iterator[list[warnings.WarningMessage]]:
    """Collect untrojan's warnings for the record, and give them to the caller at the end all the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UntrojanWarning)
        ours: list[warnings.WarningMessage] = []
        yield ours
        ours.extend(warning for warning in caught if issubclass(warning.category, UntrojanWarning))
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def tensors_of(model: nn.Module, source: Checkpoint | None = None) -> dict[str, Tensor]:
    """Give the state dict of a network, or that of the file which it came from."""
    if source is not None:
        return source.tensors
    return {name: value.detach() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def model_info(
    model: nn.Module, state: Mapping[str, Tensor], classes: int | None, source: Checkpoint | None
) -> ModelInfo:
    """Tell about a network for the record.

    Args:
        model: The network.
        state: Its state dict, as it is or will be in a file.
        classes: How many logits it has, where that is known.
        source: The file that it came from, if any.
    """
    return ModelInfo(
        path=source.path if source else None,
        sha256=source.sha256 if source else None,
        state_sha256=state_sha256(state),
        architecture=type(model).__name__,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        classes=classes,
    )


def clean_info(clean: CleanSet, classes: int | None) -> CleanInfo:
    """Tell about clean images for the record; classes without images count too, where their number is known."""
    return CleanInfo(
        path=clean.path,
        sha256=clean.sha256,
        images=len(clean),
        shape=clean.shape,
        per_class=torch.bincount(clean.labels, minlength=classes or 0).tolist(),
        class_names=list(clean.class_names) if clean.class_names else None,
    )
