"""Pickles, read without running them.

Before a pickle reaches torch's tensors-only reader, its instructions are listed, and a single name that is not needed
for tensors is enough to refuse the file. The list of such names is untrojan's own: nothing that calls
`torch.serialization.add_safe_globals` elsewhere in the process widens it. The instructions also tell of tuples that
hold each other so often that to hash one would never end.
"""

import contextlib
import io
import pickletools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from untrojan.errors import ModelError, UnsafeFileError, enumerated

Instruction = tuple[pickletools.OpcodeInfo, Any]

_HARMLESS = frozenset(
    {
        "collections.OrderedDict",
        "collections.Counter",
        "torch._utils._rebuild_tensor",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_tensor_v3",
        "torch._utils._rebuild_parameter",
        "torch._utils._rebuild_parameter_with_state",
        "torch._tensor._rebuild_from_type_v2",
        "torch.nn.parameter.Parameter",
        "torch.serialization._get_layout",
        "torch.Tensor",
        "torch.Size",
        "torch.device",
        "torch.storage.UntypedStorage",
        "torch.storage.TypedStorage",
        "builtins.set",
        "builtins.bytearray",
        "__builtin__.set",
        "__builtin__.bytearray",
    }
    | {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype | torch.qscheme)}
)
_STORAGE = re.compile(r"torch\.(cuda\.)?[A-Z][A-Za-z0-9]*Storage")
_HEAVIEST = 100_000
_MARK = -1
_NOT_DENSE = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta",
}


def refuse_unsafe(path: str | Path, pickles: Iterable[io.BytesIO]) -> None:
    """Refuse pickles that would have to run code to be read.

    Args:
        path: The file that they are from, for the message.
        pickles: Files, each at the beginning of a pickle; a file given twice holds two, one after the other.

    Raises:
        UnsafeFileError: They need more than tensors; the text names what they ask for.
        ModelError: They hold tensors that are not dense, or tuples of tuples without end.

    Example:
        >>> import os, pickle
        >>> refuse_unsafe("net.pt", [io.BytesIO(pickle.dumps(os.getcwd))])
        Traceback (most recent call last):
        untrojan.errors.UnsafeFileError: net.pt needs more than tensors to be read, and nothing of it was run: ...
    """
    listed = [_instructions(file) for file in pickles]
    named = dict.fromkeys(name for instructions in listed for name in _globals(instructions))
    known = _HARMLESS | _NOT_DENSE.keys()
    if unsafe := [name for name in named if name not in known and not _STORAGE.fullmatch(name)]:
        raise UnsafeFileError(
            f"{path} needs more than tensors to be read, and nothing of it was run: "
            f"it asks for {enumerated(unsafe, ', ')}\n"
            "Ask its author for the weights alone, or convert it on an isolated machine, with safetensors:\n"
            f"    loaded = torch.load({Path(path).name!r}, map_location='cpu', weights_only=False)\n"
            "    weights = loaded.state_dict()  # loaded['model'] or the like, where a dict was saved\n"
            "    save_file({k: v.contiguous() for k, v in weights.items()}, 'weights.safetensors')"
        )
    if odd := [_NOT_DENSE[name] for name in named if name in _NOT_DENSE]:
        raise ModelError(
            f"{path} holds {' and '.join(odd)} tensors; expected dense ones: save `tensor.to_dense()` "
            "or `tensor.dequantize()` instead"
        )
    if any(_heaviest(instructions) > _HEAVIEST for instructions in listed):
        raise ModelError(f"{path} holds tuples of more than {_HEAVIEST:,} values, counted as often as they are used")


def _instructions(file: io.BytesIO) -> list[Instruction]:
    """The instructions of the next pickle in `file`, as far as it is sound."""
    listed: list[Instruction] = []
    with contextlib.suppress(Exception):  # a broken pickle is torch's to report
        listed.extend((opcode, argument) for opcode, argument, _ in pickletools.genops(file))
    return listed


def _globals(instructions: Iterable[Instruction]) -> list[str]:
    """Every `module.name` that a pickle would import."""
    found: list[str] = []
    pushed = ["", ""]
    memo: dict[int, str] = {}
    for opcode, argument in instructions:
        match opcode.name:
            case "GLOBAL" | "INST":
                found.append(str(argument).replace(" ", ".", 1))
            case "STACK_GLOBAL":
                found.append(".".join(pushed[-2:]))
            case "MEMOIZE":
                memo[len(memo)] = pushed[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(str(argument))] = pushed[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                pushed.append(memo.get(int(str(argument)), ""))
            case _ if isinstance(argument, str):
                pushed.append(argument)
    return found


def _heaviest(instructions: Iterable[Instruction]) -> int:
    """How many values the largest tuple of a pickle has, with those of tuples in it, each as often as it is used."""
    stack: list[int] = []
    memo: dict[int, int] = {}
    heaviest = 0
    with contextlib.suppress(IndexError, KeyError):  # a pickle that breaks off here
        for opcode, argument in instructions:
            match opcode.name:
                case "MARK":
                    stack.append(_MARK)
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[int(str(argument))] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[int(str(argument))])
                case "DUP":
                    stack.append(stack[-1])
                case "POP":
                    stack.pop()
                case _:
                    taken = _taken(stack, opcode.stack_before)
                    is_tuple = opcode.name.startswith("TUPLE") or opcode.name == "REDUCE"
                    weight = 1 + sum(taken) if is_tuple else 1
                    stack += [weight] * len(opcode.stack_after)
                    heaviest = max(heaviest, weight)
    return heaviest


def _taken(stack: list[int], wanted: Sequence[pickletools.StackObject]) -> list[int]:
    """Take from the stack what an instruction takes: so many values, or all down to the mark and so many below."""
    taken: list[int] = []
    if pickletools.markobject in wanted:
        while (value := stack.pop()) != _MARK:
            taken.append(value)
        wanted = wanted[: wanted.index(pickletools.markobject)]
    return taken + [stack.pop() for _ in wanted]
