"""The attack contract: clean images in, images with the trigger out; and the labels the attacker wants."""

import operator
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from untrojan.data import CleanSet
from untrojan.errors import ConfigError, DataError
from untrojan.randomness import seeded
from untrojan.readers import decoded
from untrojan.registry import require_kind

if TYPE_CHECKING:
    from untrojan.lab.online import Online

Target = int | Literal["all-to-all"]
"""A target class (all-to-one), or `"all-to-all"`: class `y` is to become `(y + 1) mod K`."""


class Attack(ABC):
    """Base of every attack; subclasses are each a :func:`~untrojan.registry.config` with a `name`.

    Authors write :meth:`_trigger`. It is deterministic, and it saturates: what leaves [0, 1] is clipped. What the
    attacker does to training images is the same, unless authors also write :meth:`_poisoned` or :meth:`_cover`. Attacks
    that change training itself write :meth:`_online`.

    Attributes:
        name: What the attack is called in specs and records.
        rate: The published poisoning rate: poisoned images as a fraction of all training images, of every batch where
            the attack changes batches, or, where it is clean-label, of those of the target class.
        covers: Cover samples for each poisoned image; they get the trigger, or what :meth:`_cover` makes of them, and
            keep their label, so that the network learns the trigger more narrowly.
        clean_label: Whether images of the target class are poisoned and no label is changed.

    Example:
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> BadNets(size=1).trigger(torch.zeros(1, 1, 2, 2)).tolist()
        [[[[0.0, 0.0], [0.0, 1.0]]]]
    """

    name: ClassVar[str]
    rate: ClassVar[float] = 0.1
    covers: ClassVar[float] = 0.0
    clean_label: ClassVar[bool] = False

    @property
    def bar(self) -> float:
        """The attack success rate, in [0, 1], from which on it took."""
        return 0.7 if self.clean_label else 0.9

    @final
    def trigger(self, images: Tensor) -> Tensor:
        """Put the trigger on images, as at test time.

        Args:
            images: Float `(N, C, H, W)` in [0, 1]; not changed.

        Returns:
            The triggered images, of the same shape and type, in [0, 1].

        Raises:
            DataError: The images are not of that kind, or the trigger does not fit them.
        """
        _require_images(images, "images")
        return self._checked(self._trigger(images.clone()), images)

    @final
    def poisoned(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        """Make poisoned training images.

        Args:
            few: The images to poison, with their true labels.
            clean: All training images, before the attack; the batch, where the attack changes batches.
            rng: Draws whatever differs from image to image.

        Returns:
            Float32 `(N, C, H, W)` in [0, 1].

        Raises:
            DataError: The trigger does not fit the images.
        """
        return self._checked(self._poisoned(few, clean, rng), few.floats())

    @final
    def cover(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        """Make cover samples; arguments and result are those of :meth:`poisoned`."""
        return self._checked(self._cover(few, clean, rng), few.floats())

    @final
    def online(self, clean: CleanSet, target: Target, rate: float | None = None, seed: int = 0) -> "Online | None":
        """Begin what the attack does while a victim trains.

        Args:
            clean: All training images.
            target: The target class, or "all-to-all".
            rate: The poisoning rate in [0, 1]; left out, the published one.
            seed: Decides how networks that the attack trains begin, at least 0.

        Returns:
            What the training calls for every batch; `None` where images are poisoned once, before.

        Raises:
            ConfigError: The rate is not in [0, 1], or the target is no class of the images.
        """
        target_labels(clean.labels[:1], target, clean.num_classes)
        with seeded(seed):
            return self._online(clean, target, self.rate_or(rate))

    @classmethod
    def changes_batches(cls) -> bool:
        """Whether the attack works while a victim trains, instead of poisoning images once before."""
        return cls._online is not Attack._online

    def rate_or(self, rate: float | None) -> float:
        """Give a poisoning rate, the published one where it is left out.

        Raises:
            ConfigError: It is not in [0, 1].
        """
        rate = self.rate if rate is None else rate
        if not 0 <= rate <= 1:
            raise ConfigError(f"expected a poisoning rate between 0 and 1, got {rate}")
        return rate

    @abstractmethod
    def _trigger(self, images: Tensor) -> Tensor:
        """Return `images`, a checked copy that may be written to, with the trigger on them."""

    def _poisoned(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        """Return what the attacker makes of `few`; overridden where that is not the trigger of test time."""
        return self._trigger(few.floats())

    def _cover(self, few: CleanSet, clean: CleanSet, rng: np.random.Generator) -> Tensor:
        """Return the cover samples made of `few`; overridden where they get something else than poisoned images."""
        return self._poisoned(few, clean, rng)

    def _online(self, clean: CleanSet, target: Target, rate: float) -> "Online | None":
        """Return what changes every batch; overridden where images are not poisoned once, before training."""
        return None

    def _checked(self, triggered: Tensor, images: Tensor) -> Tensor:
        _require_images(triggered, f"images from {self.name}")
        if triggered.shape != images.shape or triggered.dtype != images.dtype:
            raise DataError(
                f"expected images from {self.name} of the shape and type that went in, "
                f"{tuple(images.shape)} {images.dtype}, got {tuple(triggered.shape)} {triggered.dtype}"
            )
        return triggered


def require_together(attack: Attack | None, target: Target | None) -> None:
    """Raise a ConfigError where an attack came without a target, a target without an attack, or something else."""
    if (attack is None) != (target is None):
        raise ConfigError("expected attack and target together, got only one of them")
    if attack is not None:
        require_kind(attack, Attack)


def known_target(target: Target, classes: int) -> Target:
    """Give a target as it goes into records: a whole number of another kind, as NumPy's, becomes Python's.

    Args:
        target: The target class, or `"all-to-all"`.
        classes: How many classes the model tells apart.

    Raises:
        ConfigError: The target is neither a class of the model nor `"all-to-all"`.

    Example:
        >>> known_target(np.int64(8), 10)
        8
    """
    if isinstance(target, str) and target == "all-to-all":
        return target
    try:
        label = -1 if isinstance(target, bool) else operator.index(target)
    except TypeError:
        label = -1
    if not 0 <= label < classes:
        raise ConfigError(f'expected target "all-to-all" or a class from 0 to {classes - 1}, got {target!r}')
    return label


def target_labels(labels: Tensor, target: Target, classes: int) -> Tensor:
    """Give the label that the attacker wants for each image.

    Args:
        labels: True labels, int64 `(N,)`, in [0, `classes`).
        target: The target class, or `"all-to-all"`.
        classes: How many classes the model tells apart.

    Returns:
        int64 `(N,)`.

    Raises:
        ConfigError: The target is neither a class of the model nor `"all-to-all"`.

    Example:
        >>> target_labels(torch.tensor([0, 8, 9]), "all-to-all", 10).tolist()
        [1, 9, 0]
        >>> target_labels(torch.tensor([0, 8, 9]), 8, 10).tolist()
        [8, 8, 8]
    """
    known = known_target(target, classes)
    return (labels + 1) % classes if known == "all-to-all" else torch.full_like(labels, known)


def read_image(path: Path) -> Tensor:
    """Read a trigger from an image file.

    Args:
        path: An 8-bit gray or RGB image without transparency, in a lossless format such as PNG.

    Returns:
        Float32 `(C, H, W)` in [0, 1], with C = 1 for gray and 3 for RGB.

    Raises:
        DataError: The file is no such image.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.NamedTemporaryFile(suffix=".png") as file:
        ...     Image.new("RGB", (5, 4), "white").save(file.name)
        ...     read_image(Path(file.name)).shape
        torch.Size([3, 4, 5])
    """
    values = decoded(path, str(path))
    return torch.as_tensor(values.astype(np.float32)) / 255


def _require_images(images: Tensor, what: str) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not images.is_floating_point():
        came = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"expected {what} as a float tensor (N, C, H, W) in [0, 1], got {came}")
    if images.numel():
        low, high = (extreme.item() for extreme in torch.aminmax(images))
        if not (low >= 0 and high <= 1):
            raise DataError(f"expected {what} in [0, 1], got {low:g} to {high:g}; divide 8-bit pixels by 255")
