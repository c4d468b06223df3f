"""Reads labeled images from files, folders and the Hugging Face Hub; every file is data and never runs code.

Each kind of source becomes :class:`Rows`: labels known up front, images decoded only for the rows asked for.
"""

import contextlib
import hashlib
import io
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from untrojan.errors import DataError, UnsafeFileError, UntrojanError, cause

if TYPE_CHECKING:
    import pyarrow

T = TypeVar("T")

_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".gif"}
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "GIF")
_SPLITS = {"train", "test", "validation", "val", "valid", "dev"}
_NUMBERED = re.compile(r"[-_.]?\d+([-_]of[-_]\d+([-_.][0-9a-f]{8,})?)?$")
_IMAGE_COLUMNS = ("image", "img")
_LABEL_COLUMNS = ("label", "labels", "fine_label")
_NPZ_PAIRS = (("images", "labels"), ("x", "y"), ("image", "label"))
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FILES = {".parquet", ".npz", ".npy", ".zip", ".tar", ".gz", ".csv", ".json"}
_ROWS_AT_A_TIME = 64
_MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Rows:
    """Labels known up front, and a way to decode the images of chosen rows.

    Args:
        labels: The label of every row, as :func:`checked_labels` gives them.
        images: Maps ascending row numbers (n,) to images (n, C, H, W).
        class_names: The name of each class, in label order, where the source tells.

    Example:
        >>> rows = Rows(torch.tensor([0, 1]), lambda chosen: torch.zeros(len(chosen), 3, 8, 8))
        >>> rows.images(np.array([1])).shape
        torch.Size([1, 3, 8, 8])
    """

    labels: Tensor
    images: Callable[[np.ndarray], Tensor]
    class_names: tuple[str, ...] | None = None


def open_rows(source: str | os.PathLike[str]) -> Rows:
    """Open a parquet file or folder of shards, a saved data set, an image folder, an npz file or a Hub id.

    Args:
        source: A path, or a Hub id `owner/name` when there is no such path.

    Raises:
        DataError: The source does not exist, is of no known kind, or cannot be read.
        UnsafeFileError: An npz file holds pickled objects.

    Example:
        >>> open_rows("missing.npz")
        Traceback (most recent call last):
        untrojan.errors.DataError: no such file or folder: missing.npz; a Hub id would be owner/name
    """
    path = Path(source)
    with _reading(path):
        is_folder, exists = path.is_dir(), path.exists()
    if is_folder:
        return _open_folder(path)
    if not exists:
        return _open_hub(str(source))
    if path.suffix.lower() == ".parquet":
        return _open_parquet([path])
    if path.suffix.lower() == ".npz":
        return _open_npz(path)
    raise DataError(
        f"expected a .parquet or .npz file, a folder of shards, a saved data set or an image folder, got {path}"
    )


def fingerprint(source: str | os.PathLike[str]) -> str:
    """Hash what a source holds, without decoding it.

    Args:
        source: As for :func:`open_rows`. Of a folder the names count too, hidden files do not. Of a Hub id only the
            name counts, for its content is not here.

    Returns:
        64 lower-case hex digits.

    Raises:
        DataError: The source does not exist or cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "a.npz").write_bytes(b"same"), Path(folder, "b.npz").write_bytes(b"same")
        ...     fingerprint(Path(folder, "a.npz")) == fingerprint(Path(folder, "b.npz"))
        True
    """
    path = Path(source)
    with _reading(path):
        if path.is_file():
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        if path.is_dir():
            entries = [(each.name, fingerprint(each)) for each in _visible(path)]
            return hashlib.sha256(json.dumps(entries).encode()).hexdigest()
        _require_hub_id(str(source))
        return hashlib.sha256(json.dumps(["hub", str(source)]).encode()).hexdigest()


def to_tensor(values: Any) -> Tensor:
    """Turn an array or a list of numbers into a tensor of the same numbers, in native byte order.

    Raises:
        DataError: The values are not an array of numbers that torch knows.

    Example:
        >>> to_tensor([1, 2])
        tensor([1, 2])
    """
    if isinstance(values, Tensor):
        return values.detach()
    try:
        array = np.asarray(values)
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except (TypeError, ValueError) as error:
        raise DataError(f"expected an array of numbers, got {type(values).__name__}: {error}") from error


def checked_labels(labels: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Copy labels to a device as int64.

    Raises:
        DataError: They are not whole numbers (N,) from 0 to 999,999.

    Example:
        >>> checked_labels(torch.tensor([0, 1], dtype=torch.uint8))
        tensor([0, 1])
    """
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise DataError(f"expected labels as whole numbers, got {labels.dtype}")
    if labels.ndim != 1:
        raise DataError(f"expected labels as (N,), got shape {tuple(labels.shape)}")
    labels = labels.detach().to(device, torch.int64, copy=True)
    if len(labels) and not 0 <= labels.min() <= labels.max() < _MAX_CLASSES:
        raise DataError(
            f"expected labels from 0 to {_MAX_CLASSES - 1:,}, got {int(labels.min())} to {int(labels.max())}"
        )
    return labels


def channels_first(images: np.ndarray) -> np.ndarray:
    """Turn (N, H, W, C) into (N, C, H, W) where only the last axis can be one or three channels, as (N, H, W) is gray.

    Example:
        >>> channels_first(np.zeros((5, 32, 32, 3))).shape
        (5, 3, 32, 32)
    """
    if images.ndim == 3:
        return images[:, None]
    if images.ndim == 4 and images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
        return images.transpose(0, 3, 1, 2)
    return images


def pixels(image: Image.Image, name: str) -> np.ndarray:
    """Give a Pillow image as uint8 (C, H, W); palettes become RGB and bitmaps gray, EXIF rotation is ignored.

    Args:
        image: An RGB or grayscale image, or one that becomes so without loss.
        name: What an error calls it.

    Raises:
        DataError: The image has transparency, CMYK colors or more than 8 bits.

    Example:
        >>> pixels(Image.new("RGB", (4, 2)), "row 0").shape
        (3, 2, 4)
    """
    if image.mode == "1":
        image = image.convert("L")
    elif image.mode == "P" and not image.has_transparency_data:
        image = image.convert("RGB")
    if image.mode not in ("RGB", "L"):
        raise DataError(
            f"{name}: expected an RGB or grayscale image without transparency, got mode {image.mode}; "
            "convert it first, e.g. PIL Image.convert('RGB')"
        )
    if image.has_transparency_data:
        raise DataError(f"{name}: expected an image without transparency, got a color that is transparent")
    values = np.asarray(image)
    return values[None] if values.ndim == 2 else values.transpose(2, 0, 1)


def stack(images: Iterable[tuple[str, np.ndarray]], count: int) -> Tensor:
    """Stack `count` named images (C, H, W) into one tensor (count, C, H, W), one at a time.

    Raises:
        DataError: Two images differ in shape or type; both are named.

    Example:
        >>> stack([("a.png", np.zeros((3, 8, 8), np.uint8))], count=1).shape
        torch.Size([1, 3, 8, 8])
    """
    stacked, first = np.empty(0), ""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for index, (name, image) in enumerate(images):
            if index == 0:
                stacked, first = np.empty((count, *image.shape), image.dtype), name
            check_alike(first, stacked[0], name, image)
            stacked[index] = image
    return to_tensor(stacked)


def check_alike(first: str, expected: np.ndarray, name: str, image: np.ndarray) -> None:
    """Check that two named images (C, H, W) have one shape and one type.

    Raises:
        DataError: They do not.

    Example:
        >>> check_alike("a.png", np.zeros((1, 8, 8)), "b.png", np.ones((1, 8, 8)))
    """
    if (image.shape, image.dtype) != (expected.shape, expected.dtype):
        sizes = ["x".join(map(str, each.shape)) + f" {each.dtype}" for each in (expected, image)]
        raise DataError(
            f"expected images of one size, got {first} with {sizes[0]} and {name} with {sizes[1]} "
            "(channels x height x width); resize or convert them first"
        )


@contextlib.contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever the decoder of an image trips over into one line with its name.

    Example:
        >>> with decoding("row 0"):
        ...     Image.open(io.BytesIO(b"no image"))
        Traceback (most recent call last):
        untrojan.errors.DataError: row 0: cannot decode the image: unknown or broken format
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # a decoder may raise anything on hostile bytes
        reason = "unknown or broken format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"{name}: cannot decode the image: {reason}") from error


def decoded(file: io.BytesIO | Path, name: str) -> np.ndarray:
    """Decode an image of a known format; others may be given to programs outside, as EPS is to Ghostscript."""
    with decoding(name), Image.open(file, formats=_FORMATS) as image:
        return pixels(image, name)


def _decode_cell(cell: Any, name: str, paths: bool = False) -> np.ndarray:
    """Decode the image of a row; only a set that was saved here may name a file instead of holding it."""
    held = cell
    if isinstance(cell, dict):
        held = cell.get("bytes") or Path(cell.get("path") or "")
    if isinstance(held, bytes):
        return decoded(io.BytesIO(held), name)
    with decoding(name):
        if paths and isinstance(held, Path) and held.is_file():
            return decoded(held, name)
    raise DataError(f"{name}: expected an encoded image, got {'no bytes' if isinstance(cell, dict) else type(cell)}")


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """Put where images or labels came from, unless it is `None`, in front of what is wrong with them.

    Example:
        >>> with naming("a.npz"):
        ...     raise DataError("expected labels from 0")
        Traceback (most recent call last):
        untrojan.errors.DataError: a.npz: expected labels from 0
    """
    try:
        yield
    except DataError as error:
        if source is None:
            raise
        raise DataError(f"{source}: {error}") from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except UntrojanError:
        raise
    except Exception as error:  # a reader may raise anything on hostile bytes
        raise DataError(f"cannot read {path}: {cause(error)}") from error


def _visible(folder: Path) -> list[Path]:
    return sorted((entry for entry in folder.iterdir() if not entry.name.startswith(".")), key=lambda each: each.name)


def _train_split(splits: Mapping[str, T], path: Path) -> T:
    if "train" in splits:
        return splits["train"]
    raise DataError(f"{path}: expected a split named train, got {', '.join(splits)}; give the path of one split")


def _open_folder(path: Path) -> Rows:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _open_saved(path)
    with _reading(path):
        entries = _visible(path)
    shards = [entry for entry in entries if entry.suffix.lower() == ".parquet"]
    if shards:
        return _open_parquet(_one_split(shards, path))
    return _open_image_folder([entry for entry in entries if entry.is_dir()], path)


def _one_split(shards: list[Path], path: Path) -> list[Path]:
    groups: dict[str, list[Path]] = {}
    for shard in shards:
        name = _NUMBERED.sub("", shard.stem)
        groups.setdefault(next((part for part in re.split("[-_.]", name) if part in _SPLITS), name), []).append(shard)
    if len(groups) == 1 or not _SPLITS & groups.keys():
        return shards
    return _train_split(groups, path)


def _open_image_folder(folders: list[Path], path: Path) -> Rows:
    if not folders:
        raise DataError(f"{path}: expected one subfolder of images per class, got none")
    if all(folder.name.isdecimal() for folder in folders):
        folders = sorted(folders, key=lambda folder: int(folder.name))
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        with _reading(folder):
            found = [file for file in _visible(folder) if file.suffix.lower() in _SUFFIXES]
        if not found:
            raise DataError(f"{folder}: the class folder holds no image ({', '.join(sorted(_SUFFIXES))})")
        files += found
        labels += [label] * len(found)

    def images(chosen: np.ndarray) -> Tensor:
        return stack(((str(files[row]), decoded(files[row], str(files[row]))) for row in chosen), len(chosen))

    return Rows(torch.tensor(labels), images, tuple(folder.name for folder in folders))


def _open_npz(path: Path) -> Rows:
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is not an npz archive")
    try:
        with _reading(path), naming(path), np.load(path, allow_pickle=False) as archive:
            for images, labels in _NPZ_PAIRS:
                if images in archive.files and labels in archive.files:
                    held = to_tensor(channels_first(archive[images]))
                    known = checked_labels(to_tensor(archive[labels]))
                    break
            else:
                pairs = ", or ".join(" and ".join(pair) for pair in _NPZ_PAIRS)
                raise DataError(f"expected arrays {pairs}, got {', '.join(archive.files)}")
            if held.ndim != 4:
                raise DataError(f"expected images as (N, C, H, W), (N, H, W, C) or (N, H, W), got {tuple(held.shape)}")
            if len(known) != len(held):
                raise DataError(f"expected one label per image, got {len(held)} images, {len(known)} labels")
    except DataError as error:
        if "allow_pickle" in str(error):
            raise UnsafeFileError(f"{path} holds pickled objects; save plain arrays of numbers instead") from error
        raise
    return Rows(known, lambda chosen: held[torch.from_numpy(chosen)])


def _open_parquet(files: list[Path]) -> Rows:
    from pyarrow import parquet

    labels, image_columns, names = [], [], []
    for file in files:
        with _reading(file), parquet.ParquetFile(file) as table:
            schema = table.schema_arrow
            features = _features(schema.metadata or {})
            image, label = _image_and_label_columns(schema.names, features, str(file))
            labels.append(_label_column(table.read([label]).column(label), str(file)))
            image_columns.append(image)
            names.append(_class_names(features.get(label)))
    if len(set(names)) > 1:
        raise DataError(f"{files[0].parent}: the shards do not agree on the class names")

    def images(chosen: np.ndarray) -> Tensor:
        return stack(_parquet_images(files, image_columns, chosen), len(chosen))

    return Rows(torch.cat(labels), images, names[0])


def _parquet_images(files: list[Path], columns: list[str], chosen: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    from pyarrow import parquet

    start = 0
    for file, column in zip(files, columns, strict=True):
        with _reading(file), parquet.ParquetFile(file) as table:
            inside = chosen - start
            for row, cell in _parquet_cells(table, column, inside):
                name = f"{file} row {row}"
                yield name, _decode_cell(cell, name)
            start += table.metadata.num_rows


def _parquet_cells(table: Any, column: str, chosen: np.ndarray) -> Iterator[tuple[int, Any]]:
    start = 0
    for group in range(table.num_row_groups):
        end = start + table.metadata.row_group(group).num_rows
        if not np.any((chosen >= start) & (chosen < end)):
            start = end
            continue
        for batch in table.iter_batches(_ROWS_AT_A_TIME, row_groups=[group], columns=[column]):
            for row in chosen[(chosen >= start) & (chosen < start + len(batch))]:
                yield int(row), batch.column(0)[int(row) - start].as_py()
            start += len(batch)


def _open_saved(path: Path) -> Rows:
    import datasets

    with _reading(path):
        saved = datasets.load_from_disk(path)
    if isinstance(saved, datasets.DatasetDict):
        saved = _train_split({str(name): split for name, split in saved.items()}, path)
    return _open_dataset(saved, str(path))


def _require_hub_id(source: str) -> None:
    path = Path(source)
    like_a_path = path.parent.is_dir() or path.suffix.lower() in _SUFFIXES | _FILES
    if like_a_path or not _HUB_ID.fullmatch(source):
        raise DataError(f"no such file or folder: {source}; a Hub id would be owner/name")


def _open_hub(source: str) -> Rows:
    _require_hub_id(source)
    import datasets

    try:
        dataset = datasets.load_dataset(source, split="train")
    except Exception as error:  # the Hub client lets errors of several network libraries through
        raise DataError(
            f"no such file or folder: {source}; and the Hugging Face Hub could not be reached or has no such "
            f"data set with a split named train ({cause(error)})"
        ) from error
    return _open_dataset(dataset, source)


def _open_dataset(dataset: Any, where: str) -> Rows:
    features = dataset.features.to_dict()
    image, label = _image_and_label_columns(dataset.column_names, features, where)
    labels = _label_column(dataset.with_format("arrow", columns=[label])[:].column(label), where)
    cells = dataset.with_format("arrow", columns=[image])

    def named(chosen: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        for start in range(0, len(chosen), _ROWS_AT_A_TIME):
            rows = chosen[start : start + _ROWS_AT_A_TIME].tolist()
            for row, cell in zip(rows, cells[rows].column(image).to_pylist(), strict=True):
                name = f"{where} row {row}"
                yield name, _decode_cell(cell, name, paths=True)

    return Rows(labels, lambda chosen: stack(named(chosen), len(chosen)), _class_names(features[label]))


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, Any]:
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return features if isinstance(features, dict) else {}


def _is_typed(feature: Any) -> bool:
    return isinstance(feature, dict) and isinstance(feature.get("_type"), str)


def _class_names(feature: Any) -> tuple[str, ...] | None:
    names = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return tuple(names)
    return None


def _image_and_label_columns(columns: Sequence[str], features: Mapping[str, Any], where: str) -> tuple[str, str]:
    kinds = {(name, feature["_type"]) for name, feature in features.items() if _is_typed(feature)}

    def find(kind: str, usual: tuple[str, ...]) -> str:
        named = [name for name in usual if name in columns]
        typed = [name for name in columns if (name, kind) in kinds]
        if named or len(typed) == 1:
            return (named or typed)[0]
        raise DataError(f"{where}: expected one column named {' or '.join(usual)}, got {', '.join(columns)}")

    return find("Image", _IMAGE_COLUMNS), find("ClassLabel", _LABEL_COLUMNS)


def _label_column(column: "pyarrow.ChunkedArray", where: str) -> Tensor:
    with naming(where):
        if column.null_count:
            raise DataError(f"{column.null_count} of {len(column)} rows have no label")
        return checked_labels(to_tensor(column.to_numpy()))
