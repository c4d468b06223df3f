"""Images and labels that are already in memory, or come from data sets and loaders of torch, as pairs of tensors."""

from collections.abc import Iterable, Iterator, Sized
from itertools import islice
from operator import index as whole_number
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from untrojan.errors import DataError
from untrojan.readers import channels_first, checked_labels, decoding, pixels, stack, to_tensor

Numbers = Tensor | np.ndarray
Part = tuple[str, Tensor, Tensor]
"""A name for messages, images (n, C, H, W) and labels (n,), neither of which is checked yet."""

_AT_A_TIME = 256


def known_labels(data: Dataset[Any]) -> Tensor | None:
    """Give the labels (N,) of a data set that knows them before it reads any image, as torchvision's do.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> print(known_labels(TensorDataset(torch.zeros(2, 1, 2, 2), torch.tensor([0, 1]))))
        None
    """
    if isinstance(data, IterableDataset):
        return None
    for name in ("targets", "labels"):
        try:
            labels = checked_labels(to_tensor(getattr(data, name, None)))
        except DataError:
            continue
        if len(labels) == _length(data) > 0:
            return labels
    return None


def items(data: Dataset[Any], rows: Iterable[int]) -> Iterator[Part]:
    """Read chosen items of a data set.

    Raises:
        DataError: An item is no pair (image, label), or two images differ in shape or type.

    Example:
        >>> [tuple(images.shape) for _, images, _ in items([(torch.zeros(1, 2, 2), 0), (torch.zeros(1, 2, 2), 1)], [1])]
        [(1, 1, 2, 2)]
    """
    return _chunks((f"item {row}", data[row]) for row in rows)


def parts(data: Any) -> Iterator[Part]:
    """Read a pair (images, labels), a loader of such pairs, or a data set of (image, label).

    Raises:
        DataError: The data are of another kind, or as for :func:`items`.

    Example:
        >>> [name for name, _, _ in parts(DataLoader([(torch.zeros(1, 2, 2), 0)] * 3, batch_size=2))]
        ['batch 0', 'batch 1']
    """
    if isinstance(data, DataLoader):
        return (_pair(f"batch {number}", batch) for number, batch in enumerate(data))
    if isinstance(data, IterableDataset):
        return _chunks((f"item {number}", item) for number, item in enumerate(data))
    if isinstance(data, Dataset):
        return items(data, range(_length(data)))
    return iter([_pair("the images", data)])


def _length(dataset: Dataset[Any]) -> int:
    if isinstance(dataset, Sized):
        return len(dataset)
    raise DataError(f"expected a data set of known length, got {type(dataset).__name__}")


def _pair(name: str, data: Any) -> Part:
    if not isinstance(data, tuple | list) or len(data) != 2:
        raise DataError(
            "expected a CleanSet, a pair (images, labels), a Dataset of (image, label) or a DataLoader of "
            f"(images, labels), got {type(data).__name__}"
        )
    images, labels = data
    images = channels_first(images) if isinstance(images, np.ndarray) else images
    return name, to_tensor(images), to_tensor(labels)


def _chunks(named: Iterable[tuple[str, Any]]) -> Iterator[Part]:
    rest = iter(named)
    while chunk := [(name, *_image_and_label(item, name)) for name, item in islice(rest, _AT_A_TIME)]:
        images = stack(((name, image) for name, image, _ in chunk), len(chunk))
        yield chunk[0][0], images, torch.tensor([label for _, _, label in chunk])


def _image_and_label(item: Any, name: str) -> tuple[np.ndarray, int]:
    try:
        image, label = item
        label = whole_number(label)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected a pair (image, label) with a whole number as label: {error}") from error
    if isinstance(image, Image.Image):
        with decoding(name):
            return pixels(image, name), label
    if isinstance(image, np.ndarray) and image.ndim == 2:
        return image[None], label
    if isinstance(image, np.ndarray) and image.ndim == 3:
        return image.transpose(2, 0, 1), label
    if isinstance(image, Tensor) and image.ndim == 3:
        image = image.detach().cpu()
        return (image.float() if image.dtype == torch.bfloat16 else image).numpy(), label
    raise DataError(
        f"{name}: expected a tensor (C, H, W), a Pillow image or an array (H, W, C), "
        f"got {type(image).__name__} of shape {tuple(getattr(image, 'shape', ()))}"
    )
