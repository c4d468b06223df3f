"""Weights in and out: a checkpoint is data, and nothing in it is ever executed.

A file is read whole, once. What it is follows from its content, never from its name. What torch pickled goes to torch's
tensors-only reader, after `pickles.py` has found nothing in it that would have to run.
"""

import contextlib
import hashlib
import io
import json
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from untrojan.errors import ModelError, UnsafeFileError, UntrojanError, cause, enumerated
from untrojan.sources.pickles import refuse_unsafe
from untrojan.writing import sha256, write_atomic

WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.")

_PICKLES_IN_A_LEGACY_FILE = 5


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The tensors of one file.

    Attributes:
        path: Where the file was read.
        sha256: Hash of the file's bytes, lower-case hex.
        tensors: The state dict: names as in the network, values dense and on the CPU. Wrappers around it
            (`state_dict`, `net`, `model`, `model_state_dict`) and a `module.` or `_orig_mod.` in front of all
            names are gone.
        container: What the file is and where in it the tensors were, for people.

    Example:
        >>> import tempfile
        >>> net = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "net.pt"
        ...     torch.save({"net": net.state_dict(), "epoch": 3}, file)
        ...     checkpoint = Checkpoint.read(file)
        >>> checkpoint.container, sorted(checkpoint.tensors)
        ("torch zip, under 'net'", ['bias', 'weight'])
        >>> checkpoint.into(nn.Linear(2, 1)).weight.equal(net.weight)
        True
    """

    path: str
    sha256: str
    tensors: dict[str, Tensor]
    container: str

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a safetensors file or a torch file (zip or legacy) that holds a state dict.

        Numbers, strings, lists and dicts beside the state dict are ignored.

        Raises:
            UnsafeFileError: The file needs more than tensors; the text names what it asked for.
            ModelError: The file is missing, unreadable, damaged, of another kind, holds no state dict or more
                than one, or holds tensors that are not dense and real.
        """
        data = _bytes(path)
        with _reading(path):
            kind, loaded = _parse(path, data)
            wrapper, tensors = _state_dict(path, loaded)
            _refuse_odd_tensors(path, tensors, len(data))
        container = f"{kind}, under {wrapper!r}" if wrapper else kind
        return cls(str(path), sha256(data), unprefixed(tensors), container)

    def into(self, net: nn.Module) -> nn.Module:
        """Load the tensors into `net` in place.

        A missing `num_batches_tracked` is tolerated; floating types are converted to the network's. A network may be
        wrapped, so that all of its own names begin with `module.` or `_orig_mod.`.

        Returns:
            `net` itself, in evaluation mode.

        Raises:
            ModelError: Names, shapes or types differ, or a value is NaN or infinite; all is listed at once. Or the
                network is not initialized yet.
        """
        if any(is_lazy(each) for each in net.state_dict().values()):
            raise ModelError("the network has lazy layers; run it on one batch of images, so that they get a shape")
        own = {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
        expected = unprefixed(own)
        if problems := _misfits(expected, self.tensors):
            raise ModelError(
                "\n".join([f"{self.path} does not fit the network:", *problems, *_hints(expected, self.tensors)])
            )
        prefix = _prefix(own)
        net.load_state_dict({prefix + name: value for name, value in self.tensors.items()}, strict=False)
        return net.eval()


def file_sha256(path: str | Path) -> str:
    """Hash a file, as in :attr:`Checkpoint.sha256`.

    Raises:
        ModelError: The file is missing, unreadable or empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "net.safetensors"
        ...     save_state(file, {"w": torch.zeros(1)})
        ...     file_sha256(file) == Checkpoint.read(file).sha256
        True
    """
    return sha256(_bytes(path))


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and bits of a state dict, whatever file and order they came in.

    Args:
        tensors: Dense tensors of any shape and device.

    Returns:
        64 lower-case hex digits.

    Example:
        >>> a, b = torch.zeros(2), torch.ones(3)
        >>> state_sha256({"a": a, "b": b}) == state_sha256({"b": b, "a": a})
        True
        >>> state_sha256({"a": a}) == state_sha256({"a": -a})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\n")
        digest.update(octets(tensor).numpy().data)
    return digest.hexdigest()


def unprefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same state dict without the `module.` or `_orig_mod.` that wrappers put in front of all names.

    Example:
        >>> sorted(unprefixed({"module.weight": torch.ones(1), "module.bias": torch.ones(1)}))
        ['bias', 'weight']
    """
    length = len(_prefix(tensors))
    return {name[length:]: tensor for name, tensor in tensors.items()}


def octets(tensor: Tensor) -> Tensor:
    """The bits of a dense tensor, uint8 `(numel * itemsize,)`, on the CPU.

    Example:
        >>> octets(torch.tensor([1, -1], dtype=torch.int16))
        tensor([  1,   0, 255, 255], dtype=torch.uint8)
    """
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def save_state(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a state dict as safetensors, whole or not at all; the same input gives the same bytes.

    Args:
        path: The file to write, by convention `*.safetensors`.
        tensors: Dense tensors; shared and non-contiguous ones are written as separate copies.
        metadata: Texts to put into the file's header.

    Raises:
        OSError: The file cannot be written there.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(Path(folder) / "net.safetensors", nn.Linear(2, 1).state_dict())
        ...     Checkpoint.read(Path(folder) / "net.safetensors").container
        'safetensors'
    """
    copies = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    header, body = _split(safetensors.torch.save(copies))
    # The library writes metadata in random order.
    ordered = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    text = json.dumps(ordered | header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(Path(path), struct.pack("<Q", len(text)) + text + body)


def read_state(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read what :func:`save_state` wrote: the tensors, and the texts in the file's header.

    Raises:
        ModelError: The file is missing, damaged or of another kind.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        ...     save_state(file.name, {"a": torch.ones(1)}, {"made": "today"})
        ...     read_state(file.name)
        ({'a': tensor([1.])}, {'made': 'today'})
    """
    data = _bytes(path)
    with _reading(path):
        return safetensors.torch.load(data), _split(data)[0].get("__metadata__", {})


# Files


def _bytes(path: str | Path) -> bytes:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
    if not data:
        raise ModelError(f"cannot read {path}: the file is empty")
    if data.startswith(b"version https://git-lfs"):
        raise ModelError(f"cannot read {path}: it is a Git LFS pointer, not the weights; run `git lfs pull`")
    return data


@contextlib.contextmanager
def _reading(path: str | Path) -> Iterator[None]:
    """Turn whatever a parser trips over into one line."""
    try:
        yield
    except UntrojanError:
        raise
    except Exception as error:
        raise ModelError(
            f"cannot read {path}: the file is damaged or made by something else: {cause(error)}; "
            "get it again, or have its state dict saved with safetensors"
        ) from error


def _parse(path: str | Path, data: bytes) -> tuple[str, object]:
    """The kind of the file and what it holds."""
    if data.startswith(b"PK\x03\x04"):
        refuse_unsafe(path, [_zipped_pickle(path, data)])
        return "torch zip", _load_tensors(data)
    if data[4:9] == b"\0\0\0\0{":
        return "safetensors", dict(sorted(safetensors.torch.load(data).items()))
    file = io.BytesIO(data)
    refuse_unsafe(path, [file] * _PICKLES_IN_A_LEGACY_FILE)
    if not data.startswith(b"\x80"):
        raise ModelError(f"cannot read {path}: it is neither a safetensors file nor a torch file")
    return "torch legacy pickle", _load_tensors(data)


def _load_tensors(data: bytes) -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _zipped_pickle(path: str | Path, data: bytes) -> io.BytesIO:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        raise ModelError(f"cannot read {path}: the torch file is cut short; get it again")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if any(name.endswith("/constants.pkl") or "/code/" in name for name in names):
            raise UnsafeFileError(
                f"{path} is a TorchScript archive: a program with its weights, which would have to run to be "
                "opened; where you trust it, save `torch.jit.load(file).state_dict()` with safetensors"
            )
        if any(name.endswith(("/archive_format", "serialized_exported_program.json")) for name in names):
            raise ModelError(
                f"{path} is a torch.export archive: a program with its weights, not a state dict; "
                "where you trust it, save `torch.export.load(file).state_dict` with safetensors"
            )
        if len(pickles) != 1:
            raise ModelError(f"cannot read {path}: it is a zip archive that torch.save did not write")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ModelError(f"cannot read {path}: its entries are compressed, which torch.save never does")
        if sum(entry.file_size for entry in archive.infolist()) > len(data):
            raise ModelError(f"cannot read {path}: its entries claim more than the file holds")
        return io.BytesIO(archive.read(pickles[0]))


def _split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and body of a valid safetensors file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


# State dicts


def _state_dict(path: str | Path, loaded: object) -> tuple[str, dict[str, Tensor]]:
    """The one state dict in what was loaded, and the dotted keys that lead to it."""
    if not isinstance(loaded, dict):
        raise ModelError(f"{path} holds a {type(loaded).__name__}; expected a state dict: names and their tensors")
    found = dict(_state_dicts(loaded, ()))
    if not found:
        keys = [key if isinstance(key, str) else type(key).__name__ for key in dict.keys(loaded)]
        raise ModelError(f"{path} holds no tensors by name; at its top are: {enumerated(keys, ', ') or 'nothing'}")
    if len(found) > 1:
        raise ModelError(f"{path} holds {len(found)} state dicts, under {' and '.join(found)}; expected one by itself")
    return found.popitem()


def _state_dicts(value: dict[Any, Any], where: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    # A pickle may shadow methods of the dicts and tensors it makes, so they are called through their classes.
    wrapped = [(key, dict.get(value, key)) for key in WRAPPERS if len(where) < 2]
    inner = [state for key, held in wrapped if isinstance(held, dict) for state in _state_dicts(held, (*where, key))]
    own = {
        name: Tensor.detach(held)
        for name, held in dict.items(value)
        if isinstance(name, str) and isinstance(held, Tensor)
    }
    if inner:
        yield from inner
    elif own:
        yield ".".join(where), own


def _refuse_odd_tensors(path: str | Path, tensors: Mapping[str, Tensor], size: int) -> None:
    odd = [
        f"{name} ({tensor.dtype}, {tensor.layout})"
        for name, tensor in tensors.items()
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta
    ]
    if odd:
        raise ModelError(f"{path} holds tensors that are not dense and real: {enumerated(odd, ', ')}")
    if hollow := [name for name, tensor in tensors.items() if tensor.nbytes > size]:
        raise ModelError(f"{path} claims tensors that are larger than the file: {enumerated(hollow, ', ')}")


def _prefix(names: Collection[str]) -> str:
    """The `PREFIXES`, one after the other, that all names begin with."""
    prefix = ""
    while longer := next((prefix + each for each in PREFIXES if _all_begin(names, prefix + each)), ""):
        prefix = longer
    return prefix


def _all_begin(names: Collection[str], prefix: str) -> bool:
    return bool(names) and all(name.startswith(prefix) for name in names)


def _misfits(expected: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> list[str]:
    both = {name: (expected[name], came[name]) for name in expected if name in came}
    same_type = {
        name: pair for name, pair in both.items() if pair[0].is_floating_point() == pair[1].is_floating_point()
    }
    groups = {
        "missing in the file": [
            name for name in expected if name not in came and not name.endswith("num_batches_tracked")
        ],
        "unknown to the network": [name for name in came if name not in expected],
        "of another shape": [
            f"{name}: the network has {_shape(want)}, the file {_shape(got)}"
            for name, (want, got) in both.items()
            if want.shape != got.shape
        ],
        "of another type": [
            f"{name}: the network has {want.dtype}, the file {got.dtype}"
            for name, (want, got) in both.items()
            if name not in same_type
        ],
        "with NaN or infinite values": [
            name
            for name, (want, got) in same_type.items()
            if want.is_floating_point() and not (got.to(want.dtype).isfinite().all() or torch.equal(got, want))
        ],
    }
    return [
        f"  {len(names)} {title}:\n    {enumerated(names, chr(10) + '    ')}"
        for title, names in groups.items()
        if names
    ]


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single value"


def _hints(expected: Mapping[str, Tensor], came: Mapping[str, Tensor]) -> list[str]:
    weights = [name for name, value in expected.items() if value.ndim >= 2]
    if not expected.keys() & came.keys():
        return ["hint: not one name agrees; the file is of another architecture"]
    if not weights:
        return []
    (first, came_first), (last, came_last) = ((expected[name], came.get(name)) for name in (weights[0], weights[-1]))
    hints = []
    if came_last is not None and came_last.shape[1:] == last.shape[1:] and came_last.shape != last.shape:
        hints.append(f"hint: the file has {len(came_last)} classes; the net was built with {len(last)}")
    if came_first is not None and came_first.ndim >= 2 and came_first.shape[1] != first.shape[1]:
        hints.append(f"hint: the file takes {came_first.shape[1]} channels; the net was built with {first.shape[1]}")
    return hints
