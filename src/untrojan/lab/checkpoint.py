"""Where an interrupted training stood: one file of tensors and JSON that knows its recipe."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from untrojan.errors import ConfigError, ModelError, RecordError
from untrojan.sources.files import read_state, save_state

FORMAT = "untrojan-training-1"


def save(path: Path, recipe: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write where a training stands, whole or not at all.

    Args:
        path: The file to write, by convention `*.safetensors`.
        recipe: What is trained and how, as values that JSON can hold.
        state: Mappings and lists, one inside of the other, of dense tensors, numbers, text and `None`.

    Raises:
        OSError: The file cannot be written there.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "training.safetensors"
        ...     save(file, {"epochs": 2}, {"done": 1, "weights": {0: torch.ones(1)}})
        ...     load(file, {"epochs": 2})
        {'done': 1, 'weights': {0: tensor([1.])}}
    """
    tensors: dict[str, Tensor] = {}
    texts = {"format": FORMAT, "recipe": json.dumps(recipe), "state": json.dumps(_flat(state, tensors))}
    save_state(path, tensors, texts)


def load(path: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Read what :func:`save` wrote; tuples come back as lists.

    Args:
        path: The file.
        recipe: The recipe that it must be of.

    Raises:
        RecordError: The file is missing, damaged or of another kind.
        ConfigError: It is of another recipe; the text tells what differs.
    """
    try:
        tensors, texts = read_state(path)
    except ModelError as error:
        raise RecordError(str(error)) from error
    if texts.get("format") != FORMAT:
        raise RecordError(f"{path} is not an interrupted training that this untrojan can go on with")
    try:
        known, state = dict(json.loads(texts["recipe"])), dict(_deep(json.loads(texts["state"]), tensors))
    except (KeyError, TypeError, ValueError) as error:
        raise RecordError(f"{path} is damaged: what it says of the training cannot be read") from error
    wanted = json.loads(json.dumps(recipe))
    if differing := [key for key in known | wanted if known.get(key) != wanted.get(key)]:
        told = "; ".join(f"{key} is {_told(known.get(key))} there, {_told(wanted.get(key))} here" for key in differing)
        raise ConfigError(
            f"{path} is where a training of another recipe was interrupted: {told}; ask for that one, or remove it"
        )
    return state


def _told(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _flat(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The value as JSON, with every tensor replaced by its number in `tensors`."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"mapping": [[key, _flat(each, tensors)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_flat(each, tensors) for each in value]
    return value


def _deep(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_deep(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _deep(each, tensors) for key, each in value["mapping"]}
