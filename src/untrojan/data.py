"""Clean images: everything that a defender has, and the only data a scan or a repair ever sees."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from untrojan.augmentation import Augment
from untrojan.errors import ConfigError, DataError, labelled, utf8
from untrojan.loaders import Numbers, items, known_labels, parts
from untrojan.readers import check_alike, checked_labels, naming, open_rows

_ROUNDING = 1e-6
_GRID_ROUNDING = 1e-4
_IMAGES_AT_A_TIME = 256


@dataclass(frozen=True, eq=False, repr=False)
class CleanSet:
    """Clean images with their labels, checked once and never changed.

    Images are copied and kept as uint8 when all of them sit on the 8-bit grid (multiples of 1/255), else as
    float32. Whatever is kept, :meth:`batches` and :meth:`floats` serve float32 in [0, 1]. They stay on the device that
    they are on; labels come to the same.

    Args:
        images: Images (N, C, H, W): uint8, or floating point in [0, 1]. N may be 0 for methods that need no data.
        labels: Whole numbers (N,) from 0; kept as int64.
        class_names: The name of each class, in label order.
        path: Where the images came from.

    Raises:
        DataError: The images or labels are not as said above.

    Example:
        >>> clean = CleanSet(torch.rand(6, 3, 8, 8), torch.tensor([0, 0, 0, 1, 1, 1]))
        >>> clean
        CleanSet(6 images 3x8x8, 2 classes)
        >>> clean.counts
        [3, 3]
    """

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...] | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        with naming(self.path):
            for name, given in (("images", self.images), ("labels", self.labels)):
                if not isinstance(given, Tensor):
                    text = f"expected {name} as a tensor, got {type(given).__name__}"
                    raise DataError(f"{text}; give arrays as a pair to CleanSet.of, or call torch.from_numpy")
            images, labels = _checked_images(self.images), checked_labels(self.labels, self.images.device)
            if len(labels) != len(images):
                raise DataError(f"expected one label per image, got {len(images)} images, {len(labels)} labels")
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", labels)
        if self.class_names is not None:
            object.__setattr__(self, "class_names", tuple(utf8(name) for name in self.class_names))
        if self.path is not None:
            object.__setattr__(self, "path", utf8(self.path))

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        samples: int | None = None,
        samples_per_class: int | None = None,
        seed: int = 0,
    ) -> "CleanSet":
        """Read clean images; of a subset, only the chosen images are decoded.

        A source is a Hugging Face parquet file, a folder of parquet shards, a saved `datasets` directory, a
        folder with one subfolder of images per class, an npz file with `images` and `labels` (or `x` and
        `y`, or `image` and `label`), or a Hub id `owner/name` when there is no such path. Where a source has several
        splits, `train` is read. In an image folder classes are numbered in the order of their names, which is that of
        numbers where all names are; hidden files and files without an image suffix are ignored.

        Args:
            source: The path or Hub id.
            samples: Draw this many images, spread over the classes present as evenly as they allow.
            samples_per_class: Draw exactly this many images of each class present; 1 is one-shot.
            seed: Decides which images are drawn; they stay in the order of the source.

        Raises:
            DataError: The source cannot be read or holds too few images.
            UnsafeFileError: An npz file holds pickled objects.
            ConfigError: Both kinds of subset are asked for, or one below 1.

        Example:
            >>> import tempfile
            >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
            ...     np.savez(file, images=np.zeros((6, 8, 8, 3), np.uint8), labels=np.arange(6) % 3)
            ...     file.flush()
            ...     CleanSet.load(file.name, samples_per_class=1)
            CleanSet(3 images 3x8x8, 3 classes)
        """
        subset = _Subset(samples, samples_per_class, seed)
        rows = open_rows(source)
        if len(rows.labels) == 0:
            raise DataError(f"{source} holds no images")
        with naming(source):
            chosen = subset.choose(rows.labels, rows.class_names)
        return CleanSet(rows.images(chosen), rows.labels[torch.from_numpy(chosen)], rows.class_names, str(source))

    @classmethod
    def of(
        cls,
        data: "CleanSet | tuple[Numbers, Numbers] | Dataset[Any] | DataLoader[Any]",
        *,
        samples: int | None = None,
        samples_per_class: int | None = None,
        seed: int = 0,
    ) -> "CleanSet":
        """Take clean images from what is already in memory, or from a torch data set or loader.

        Args:
            data: A clean set; a pair of images (N, C, H, W) and labels (N,), where arrays may also be
                (N, H, W, C), or (N, H, W) where gray; a data set of (image, label), where an image is a
                tensor (C, H, W), a Pillow image or an array (H, W, C) or (H, W); or a loader of batches
                (images, labels). The `targets` or `labels` of a data set serve to draw a subset before any image
                is read; the labels kept are those that come with the images.
            samples: As in :meth:`load`.
            samples_per_class: As in :meth:`load`.
            seed: As in :meth:`load`.

        Raises:
            DataError: The data are of another kind, or not as a clean set must be.
            ConfigError: Both kinds of subset are asked for, or one below 1.

        Example:
            >>> CleanSet.of((np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 0, 1])), samples=2).counts
            [1, 1]
        """
        subset = _Subset(samples, samples_per_class, seed)
        if isinstance(data, CleanSet):
            return subset.draw(data)
        if isinstance(data, Dataset):
            labels = known_labels(data)
            if labels is not None:
                return _join(items(data, subset.choose(labels).tolist()))
        return subset.draw(_join(parts(data)))

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"CleanSet({len(self)} images {'x'.join(map(str, self.shape))}, {self.num_classes} classes)"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """One more than the largest label, or the number of class names where that is larger."""
        largest = int(self.labels.max()) if len(self) else -1
        return max(largest + 1, len(self.class_names or ()))

    @property
    def counts(self) -> list[int]:
        """How many images there are of each class, in label order."""
        return torch.bincount(self.labels, minlength=self.num_classes).tolist()

    @cached_property
    def sha256(self) -> str:
        """Hash of the type, shape and content of images and labels, as lower-case hex."""
        digest = hashlib.sha256(f"{self.images.dtype} {tuple(self.images.shape)}".encode())
        digest.update(self.images.cpu().numpy().data)
        digest.update(self.labels.cpu().numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "CleanSet":
        """Give the images on a device; the same object where they are there.

        Example:
            >>> CleanSet(torch.rand(2, 1, 8, 8), torch.tensor([0, 1])).to("cpu").images.device
            device(type='cpu')
        """
        if self.images.device == torch.device(device):
            return self
        return CleanSet(self.images.to(device), self.labels, self.class_names, self.path)

    def take(self, indices: Numbers | Sequence[int]) -> "CleanSet":
        """Give the images at `indices`, in that order.

        Args:
            indices: Positions (n,), n ≥ 1, or a boolean mask (N,).

        Raises:
            DataError: No image is left.
            IndexError: A position is out of range.

        Example:
            >>> CleanSet(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])).take([2, 0]).labels
            tensor([2, 0])
        """
        at = torch.as_tensor(indices, device=self.images.device)
        at = at if at.dtype == torch.bool else at.long()
        if not at.sum() if at.dtype == torch.bool else not len(at):
            raise DataError("expected at least one image to take, got none")
        return CleanSet(self.images[at], self.labels[at], self.class_names, self.path)

    def some(self, count: int, generator: torch.Generator) -> "CleanSet":
        """Draw `count` of the images without replacement, or all of them in random order where there are fewer.

        Args:
            count: How many, at least 1.
            generator: Decides which, and their order.

        Raises:
            DataError: There is no image to draw.

        Example:
            >>> len(CleanSet(torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])).some(2, torch.Generator()))
            2
        """
        return self.take(torch.randperm(len(self), generator=generator, device=generator.device)[:count])

    def floats(self) -> Tensor:
        """Give all images as a new float32 tensor (N, C, H, W) in [0, 1].

        Example:
            >>> CleanSet(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8), torch.tensor([0])).floats()
            tensor([[[[1., 1.]]]])
        """
        return _as_floats(self.images.clone())

    def batches(
        self, size: int, generator: torch.Generator | None = None, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through all images once: float32 images (n, C, H, W) in [0, 1] and int64 labels (n,).

        Args:
            size: Images per batch; the last batch may be smaller.
            generator: Shuffles the images; without one they come in order.
            augment: Changes each batch of images, drawing from the same generator.

        Raises:
            ConfigError: `size` is below 1, or there is `augment` without `generator`.

        Example:
            >>> clean = CleanSet(torch.rand(5, 3, 8, 8), torch.arange(5))
            >>> [labels.tolist() for _, labels in clean.batches(2)]
            [[0, 1], [2, 3], [4]]
        """
        if size < 1:
            raise ConfigError(f"expected a batch size of at least 1, got {size}")
        if generator is None:
            if augment is not None:
                raise ConfigError("augmentation draws random numbers; give batches a generator")
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=generator, device=generator.device)
        return self._serve(order.split(size), generator, augment)

    def _serve(
        self, parts: Sequence[Tensor], generator: torch.Generator | None, augment: Augment | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for part in parts:
            images = _as_floats(self.images[part])
            if augment is not None and generator is not None:
                images = augment(images, generator)
            yield images, self.labels[part]

    def draws(
        self, size: int, count: int, generator: torch.Generator, augment: Augment | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw `count` batches of `size` images with replacement, as methods do that count steps, not epochs.

        Args:
            size: Images per batch; may exceed the number of images.
            count: Number of batches.
            generator: Draws the images.
            augment: As in :meth:`batches`.

        Example:
            >>> clean = CleanSet(torch.rand(5, 3, 8, 8), torch.arange(5))
            >>> [len(labels) for _, labels in clean.draws(8, 2, torch.Generator())]
            [8, 8]
        """
        device = generator.device
        parts = [torch.randint(len(self), (size,), generator=generator, device=device) for _ in range(count)]
        return self._serve(parts, generator, augment)

    def split(self, fraction: float, seed: int) -> tuple["CleanSet", "CleanSet"]:
        """Split into *fit* and *hold-out*, each class in the same proportion as far as whole images allow.

        Args:
            fraction: Share of the images to hold out, in (0, 1); at least one image goes to either side.
            seed: Decides which images are held out; both sides stay in order.

        Returns:
            The images to fit on, and the held-out images.

        Raises:
            DataError: There is only one image.
            ConfigError: `fraction` is not in (0, 1).

        Example:
            >>> CleanSet(torch.rand(10, 3, 8, 8), torch.arange(10) % 2).split(0.4, seed=0)
            (CleanSet(6 images 3x8x8, 2 classes), CleanSet(4 images 3x8x8, 2 classes))
        """
        total = len(self)
        if not 0 < fraction < 1:
            raise ConfigError(f"expected a hold-out fraction between 0 and 1, got {fraction}")
        if total < 2:
            raise DataError("a split needs at least two images, got 1")
        count = min(max(round(fraction * total), 1), total - 1)
        rng = np.random.default_rng(seed)
        steps = (np.arange(total + 1) * count + rng.integers(total)) // total
        held = np.empty(total, dtype=bool)
        held[_by_class(self.labels, rng)] = np.diff(steps) > 0
        return self.take(~held), self.take(held)

    def folds(self, count: int, seed: int) -> list[tuple["CleanSet", "CleanSet"]]:
        """Split `count` times into *fit* and *hold-out* so that every image is held out exactly once.

        Sizes of the hold-outs differ by at most one image, in all and per class.

        Args:
            count: Number of folds, at least 2.
            seed: Decides which images are held out together.

        Raises:
            DataError: There are fewer images than folds.
            ConfigError: `count` is below 2.

        Example:
            >>> clean = CleanSet(torch.rand(5, 3, 8, 8), torch.tensor([0, 0, 0, 1, 1]))
            >>> [len(held) for _, held in clean.folds(2, seed=0)]
            [3, 2]
        """
        if count < 2:
            raise ConfigError(f"expected at least 2 folds, got {count}")
        if count > len(self):
            raise DataError(f"{count} folds need at least {count} images, got {len(self)}")
        fold = np.empty(len(self), dtype=np.int64)
        fold[_by_class(self.labels, np.random.default_rng(seed))] = np.arange(len(self)) % count
        return [(self.take(fold != number), self.take(fold == number)) for number in range(count)]


@dataclass(frozen=True)
class _Subset:
    samples: int | None
    samples_per_class: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.samples is not None and self.samples_per_class is not None:
            raise ConfigError("expected a number of samples or of samples per class, got both")
        for name, value in (("samples", self.samples), ("samples_per_class", self.samples_per_class)):
            if value is not None and value < 1:
                raise ConfigError(f"expected {name} of at least 1, got {value}")

    def draw(self, clean: CleanSet) -> CleanSet:
        chosen = self.choose(clean.labels, clean.class_names)
        return clean if len(chosen) == len(clean) else clean.take(chosen)

    def choose(self, labels: Tensor, class_names: Sequence[str] | None = None) -> np.ndarray:
        rank, turn = _ranks(labels, np.random.default_rng(self.seed))
        if self.samples_per_class is not None:
            present, counts = labels.unique(return_counts=True)
            if counts.min() < self.samples_per_class:
                short = int(counts.argmin())
                raise DataError(
                    f"{self.samples_per_class} samples per class were asked for, "
                    f"class {labelled(int(present[short]), class_names)} has {counts[short]}"
                )
            return np.flatnonzero(rank < self.samples_per_class)
        if self.samples is None:
            return np.arange(len(labels))
        if self.samples > len(labels):
            raise DataError(f"{self.samples} samples were asked for, there are {len(labels)} images")
        classes = int(turn.max()) + 1
        if self.samples < classes:
            raise DataError(f"{classes} classes need at least {classes} samples, got {self.samples}")
        return np.sort(np.lexsort((turn, rank))[: self.samples])


def _ranks(labels: Tensor, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle each class: the random rank of every image within its class, and the random turn of its class.

    A rank depends on the order of the images within their class alone, so that the same images in a file
    sorted by class and in a mixed one get the same ranks.
    """
    _, classes, counts = np.unique(labels.cpu().numpy(), return_inverse=True, return_counts=True)
    turn = rng.permutation(len(counts))[classes]
    rank = np.empty(len(classes), dtype=np.int64)
    for members in np.split(np.argsort(classes, kind="stable"), np.cumsum(counts)[:-1]):
        rank[members] = rng.permutation(len(members))
    return rank, turn


def _by_class(labels: Tensor, rng: np.random.Generator) -> np.ndarray:
    rank, turn = _ranks(labels, rng)
    return np.lexsort((rank, turn))


def _as_floats(images: Tensor) -> Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _checked_images(images: Tensor) -> Tensor:
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise DataError(f"expected images as (N, C, H, W), got shape {tuple(images.shape)}")
    images = images.detach()
    if images.dtype == torch.uint8:
        return images.clone(memory_format=torch.contiguous_format)
    if not images.is_floating_point():
        raise DataError(f"expected images as uint8 or floating point, got {images.dtype}")
    if not len(images):
        return images.to(torch.uint8)
    images = images.float()
    low, high = (float(end) for end in images.aminmax())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("expected images in [0, 1], got values that are NaN or infinite")
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        cure = (
            "put the normalization into the model with Normalize"
            if low < 0
            else "divide them by their largest possible value, or give uint8"
        )
        raise DataError(f"expected images in [0, 1], got {low:.3g} to {high:.3g}; {cure}")
    return _on_grid(images)


def _on_grid(images: Tensor) -> Tensor:
    grid = torch.empty_like(images, dtype=torch.uint8, memory_format=torch.contiguous_format)
    for part, out in zip(images.split(_IMAGES_AT_A_TIME), grid.split(_IMAGES_AT_A_TIME), strict=True):
        scaled = part.clamp(0, 1) * 255
        rounded = scaled.round()
        if (scaled - rounded).abs().max() > _GRID_ROUNDING:
            return images.clamp(0, 1).contiguous()
        out.copy_(rounded)
    return grid


def _first(clean: CleanSet) -> np.ndarray:
    return _as_floats(clean.images[0]).cpu().numpy()


def _join(loaded: Iterable[tuple[str, Tensor, Tensor]]) -> CleanSet:
    named = [(name, CleanSet(images, labels)) for name, images, labels in loaded]
    if not named:
        raise DataError("expected at least one image, got none")
    first, reference = named[0]
    if len(named) == 1:
        return reference
    for name, part in named:
        check_alike(first, _first(reference), name, _first(part))
    packed = all(part.images.dtype == torch.uint8 for _, part in named)
    images = torch.cat([part.images if packed else part.floats() for _, part in named])
    return CleanSet(images, torch.cat([part.labels for _, part in named]))
