"""Suspect samples: labels in memory, images decoded a chunk at a time, so that a set may be larger than memory."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from untrojan.data import CleanSet
from untrojan.errors import DataError
from untrojan.progress import stage
from untrojan.readers import checked_labels, open_rows

CHUNK = 1024


@dataclass(frozen=True, eq=False, repr=False)
class Suspects:
    """Samples that may be poisoned, in the order of their source.

    Args:
        labels: Whole numbers (N,) from 0, N ≥ 1, as the training set has them.
        read: Maps ascending row numbers (n,) to images (n, C, H, W): uint8, or floating point in [0, 1].
        class_names: The name of each class, in label order.
        path: Where the samples came from.

    Raises:
        DataError: The labels are not as said above, or there is none.

    Example:
        >>> suspects = Suspects.of((torch.rand(5, 1, 8, 8), torch.arange(5)))
        >>> [len(chunk) for chunk in suspects.chunks(2)]
        [2, 2, 1]
    """

    labels: Tensor
    read: Callable[[np.ndarray], Tensor]
    class_names: tuple[str, ...] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise DataError(f"expected at least one sample{f' in {self.path}' if self.path else ''}, got none")
        object.__setattr__(self, "labels", checked_labels(self.labels))

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Suspects":
        """Open what :meth:`untrojan.CleanSet.load` reads; images stay where they are, but for those of an npz file.

        Raises:
            DataError: The source cannot be read.
            UnsafeFileError: An npz file holds pickled objects.
        """
        rows = open_rows(source)
        return cls(rows.labels, rows.images, rows.class_names, str(source))

    @classmethod
    def of(cls, data: Any) -> "Suspects":
        """Take a path or Hub id, or what :meth:`untrojan.CleanSet.of` takes, which is then in memory.

        Raises:
            DataError: The data are of another kind, or not as they must be.
        """
        if isinstance(data, Suspects):
            return data
        if isinstance(data, str | os.PathLike):
            return cls.load(data)
        held = CleanSet.of(data)
        return cls(held.labels, lambda rows: held.images[torch.from_numpy(rows)], held.class_names, held.path)

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Suspects({len(self)} samples {'x'.join(map(str, self.shape))})"

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the first image; a chunk of another shape is refused."""
        return self._decode(np.array([0])).shape

    def take(self, indices: Tensor) -> CleanSet:
        """Decode the samples at `indices` (n,), n ≥ 1, in that order."""
        rows, back = indices.unique(return_inverse=True)
        return self._decode(rows.cpu().numpy()).take(back)

    def chunks(self, size: int = CHUNK) -> Iterator[CleanSet]:
        """Go through all samples once, in order, with `size` of them in memory at a time.

        Raises:
            DataError: An image cannot be read, or is not like the first.
        """
        for start in range(0, len(self), size):
            chunk = self._decode(np.arange(start, min(start + size, len(self))))
            if chunk.shape != self.shape:
                sizes = ["x".join(map(str, shape)) for shape in (self.shape, chunk.shape)]
                raise DataError(
                    f"expected images of one size, got {sizes[0]} in row 0 and {sizes[1]} from row {start} "
                    "(channels x height x width); resize or convert them first"
                )
            yield chunk

    def map(self, function: Callable[[Tensor, Tensor], Tensor], batch_size: int, detail: str) -> Tensor:
        """Apply a function to all samples in batches, and join what it gives.

        Args:
            function: From images float `(b, C, H, W)` in [0, 1] and labels `(b,)` to a tensor `(b, ...)`.
            batch_size: Images per call.
            detail: What is being done, for progress.

        Returns:
            A tensor `(N, ...)` in the order of the samples.
        """
        return torch.cat(list(self.each(function, batch_size, detail)))

    def each(self, function: Callable[[Tensor, Tensor], Tensor], batch_size: int, detail: str) -> Iterator[Tensor]:
        """Do as :meth:`map`, but give the part of each batch as it comes."""
        with stage("screen", total=math.ceil(len(self) / CHUNK), detail=detail) as advance:
            for chunk in self.chunks():
                for images, labels in chunk.batches(batch_size):
                    yield function(images, labels)
                advance()

    def _decode(self, rows: np.ndarray) -> CleanSet:
        decoded = CleanSet(self.read(rows), self.labels[torch.from_numpy(rows)], self.class_names, self.path)
        return decoded.to(torch.get_default_device())
