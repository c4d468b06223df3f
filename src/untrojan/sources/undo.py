"""What a repair changed, written so that it can be undone bit for bit."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from untrojan.errors import ModelError, RecordError, cause, enumerated, plain
from untrojan.sources.files import octets, read_state, save_state, state_sha256

_FORMAT = "untrojan-changes"
_VERSION = "1"


def save_changes(path: str | Path, parent: Mapping[str, Tensor], child: Mapping[str, Tensor]) -> None:
    """Write what gets `parent` back from `child`: the original values where the two differ in any bit.

    A tensor `KEY` that differs is written as flat positions `index:KEY` (int32, or int64 where they need it)
    and their original `values:KEY`, or as `full:KEY` where that is not larger.

    Args:
        path: The file to write, by convention `changes.safetensors`.
        parent: The state dict before.
        child: The state dict after, with the same names, shapes and types.

    Raises:
        RecordError: The two differ in names, shapes or types.
        OSError: The file cannot be written there.

    Example:
        >>> import tempfile
        >>> parent, child = {"w": torch.zeros(9)}, {"w": -torch.zeros(9)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_changes(Path(folder) / "changes.safetensors", parent, child)
        ...     restored = restore(child, Path(folder) / "changes.safetensors")
        >>> bool(restored["w"].signbit().any())
        False
    """
    if different := [name for name in sorted({*parent, *child}) if not _alike(parent.get(name), child.get(name))]:
        raise RecordError(
            "expected the same names, shapes and types before and after, they differ in " + enumerated(different, ", ")
        )
    entries: dict[str, Tensor] = {}
    for name in parent:
        entries |= _entries(name, parent[name], child[name])
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "parent": state_sha256(parent),
        "child": state_sha256(child),
    }
    save_state(path, entries, metadata)


def restore(child: Mapping[str, Tensor], path: str | Path) -> dict[str, Tensor]:
    """Undo a change: give back, bit for bit, the state dict that :func:`save_changes` knew as `parent`.

    Args:
        child: The state dict that the change file was written for; it is left as it is.
        path: The change file.

    Returns:
        New tensors under the names of `child`.

    Raises:
        RecordError: The file is missing, damaged, no change file, of another version, or for another model.
    """
    entries, metadata = _read_changes(path)
    came = state_sha256(child)
    if came != metadata.get("child"):
        raise RecordError(
            f"{path} belongs to another model: expected state {plain(metadata.get('child', 'none'))[:16]}…, "
            f"got {came[:16]}…; give the repaired model that was written with this file"
        )
    try:
        parent = {name: _original(name, tensor, entries) for name, tensor in child.items()}
    except (KeyError, IndexError, RuntimeError) as error:
        raise RecordError(f"{path} is damaged: {cause(error)}") from error
    if state_sha256(parent) != metadata.get("parent"):
        raise RecordError(f"{path} is damaged: what it restores is not the model that it was written for")
    return parent


def _rows(tensor: Tensor) -> Tensor:
    """The bits of a tensor, uint8 `(numel, itemsize)`."""
    return octets(tensor).reshape(-1, tensor.itemsize)


def _alike(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and a.dtype == b.dtype


def _entries(name: str, parent: Tensor, child: Tensor) -> dict[str, Tensor]:
    before = _rows(parent)
    index = (before != _rows(child)).any(dim=1).nonzero().flatten()
    if not len(index):
        return {}
    if parent.numel() <= torch.iinfo(torch.int32).max:
        index = index.to(torch.int32)
    if index.nbytes + len(index) * parent.itemsize >= parent.nbytes:
        return {f"full:{name}": parent}
    return {f"index:{name}": index, f"values:{name}": before[index].flatten().view(parent.dtype)}


def _original(name: str, child: Tensor, entries: Mapping[str, Tensor]) -> Tensor:
    if f"full:{name}" in entries:
        return entries[f"full:{name}"].clone()
    rows = _rows(child).clone()
    if f"index:{name}" in entries:
        rows[entries[f"index:{name}"].long()] = _rows(entries[f"values:{name}"])
    return rows.flatten().view(child.dtype).reshape(child.shape)


def _read_changes(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        entries, metadata = read_state(path)
    except ModelError as error:
        raise RecordError(str(error)) from error
    if metadata.get("format") != _FORMAT:
        raise RecordError(f"{path} is not a change file; expected a file that `save_changes` wrote")
    if metadata.get("version") != _VERSION:
        raise RecordError(
            f"{path} is a change file of version {plain(str(metadata.get('version')))}; "
            f"this untrojan reads version {_VERSION}"
        )
    return entries, metadata
