"""The grid: models whose attack is known, defenses, settings and seeds, all combined, read from one TOML file.

Every cell has a key, the hash of all that decides its result: the content of files, never their paths or the names that
the grid gives them.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import Field

from untrojan import __version__
from untrojan.data import CleanSet
from untrojan.defenses.defense import Defense
from untrojan.errors import ConfigError, UntrojanError
from untrojan.lab.attack import Attack, Target
from untrojan.lab.evaluate import evaluate
from untrojan.readers import fingerprint
from untrojan.registry import config, describe, identity, parse, read_toml, spec
from untrojan.scanners.scanner import Scanner
from untrojan.sources import load
from untrojan.sources.files import file_sha256

_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]


@config
class Case:
    """One model of a grid, what its attacker did, and the images that go with it.

    Attributes:
        file: The checkpoint: one of somebody else, or a victim trained here.
        net: Its architecture, as for :func:`untrojan.sources.nets.build`.
        mean: What the network subtracts from each channel, where it was trained on normalized images.
        std: What it then divides by.
        clean: Where the clean images are drawn from, as for :meth:`untrojan.CleanSet.load`.
        test: The test images; no defense sees them.
        test_images: Use the first so many of them; all if left out.
        attack: The attack, such as `badnets:size=4,row=27,col=27`; left out for a model without a backdoor.
        target: The target class or "all-to-all"; comes with `attack`.
    """

    file: str
    net: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    clean: str
    test: str
    test_images: _Count | None = None
    attack: str | None = None
    target: Target | None = None


@config
class Setting:
    """How many clean images a defender has; all of them where neither is given.

    Attributes:
        samples: Draw so many, spread evenly over the classes.
        samples_per_class: Draw so many of each class.

    Example:
        >>> str(Setting(samples=500)), str(Setting(samples_per_class=1)), str(Setting())
        ('500 images', '1 per class', 'all images')
    """

    samples: _Count | None = None
    samples_per_class: _Count | None = None

    def __str__(self) -> str:
        if self.samples_per_class is not None:
            return f"{self.samples_per_class} per class"
        return "all images" if self.samples is None else f"{self.samples} images"


class Cell(NamedTuple):
    """One repair that is measured.

    Attributes:
        key: Hash of `inputs`, 64 hex digits.
        scan_key: Hash of those inputs that decide the scan, which all defenses of a model, setting and seed share.
        setup: Hash of the inputs without defense and seed: cells that differ in it cannot be compared.
        inputs: All that decides the result, as values that JSON can hold.
        model: What the grid calls the model.
        case: The model.
        attack: Its attack, if it has one.
        method: The defense.
        scanner: What tells the defense which label is suspected.
        setting: How many clean images there are.
        seed: Draws the images and drives scan and defense.
    """

    key: str
    scan_key: str
    setup: str
    inputs: dict[str, Any]
    model: str
    case: Case
    attack: Attack | None
    method: Defense
    scanner: Scanner
    setting: Setting
    seed: int


@config
class Grid:
    """What a grid file asks for. Paths in it are taken from the current folder, as on the command line.

    Attributes:
        models: The models by name.
        defenses: What to try on each of them, such as `clp` or `rnp:select=threshold,threshold=0.2`.
        settings: How many clean images there are.
        seeds: Each draws other images.
        scan: The scanner whose diagnosis all defenses get, such as `unlearning:runs=2`.
    """

    models: Annotated[dict[str, Case], Field(min_length=1)]
    defenses: Annotated[list[str], Field(min_length=1)]
    settings: Annotated[list[Setting], Field(min_length=1)] = Field(default_factory=lambda: [Setting()])
    seeds: Annotated[list[_Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])
    scan: str = "triggers"

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a grid file.

        Raises:
            ConfigError: The file cannot be read, is not TOML, or holds other things than a grid.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = Path(folder, "grid.toml")
            ...     _ = file.write_text('defenses = ["clp"]')
            ...     Grid.load(file)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            untrojan.errors.ConfigError: .../grid.toml: `models` must be given
        """
        return read_toml(cls, path)

    def cells(self) -> list[Cell]:
        """List the cells: all models and defenses of the first seed first.

        Every model is measured on one test image per class, so that what does not fit is known before hours of work.

        Raises:
            ConfigError: There is no such defense, scanner, network, attack or target, an attack came without a target,
                a setting asks for both kinds of subset, or two cells are the same.
            ModelError: A checkpoint cannot be read, or does not fit its network.
            DataError: There are no such images, or the trigger does not fit them.
        """
        scanner = parse(self.scan, "untrojan.scanners", Scanner)
        methods = [parse(text, "untrojan.defenses", Defense) for text in self.defenses]
        images = functools.cache(fingerprint)
        few = functools.cache(functools.partial(CleanSet.load, samples_per_class=1))
        prepared = [_Prepared.of(name, case, images, few) for name, case in self.models.items()]
        cells = [
            _cell(model, method, scanner, setting, seed)
            for seed, setting, model, method in itertools.product(self.seeds, self.settings, prepared, methods)
        ]
        _require_different(cells)
        return cells


class _Prepared(NamedTuple):
    """A model with what its cells share: the parsed attack, and the inputs of a scan and of an evaluation."""

    name: str
    case: Case
    attack: Attack | None
    scanned: dict[str, Any]
    measured: dict[str, Any]

    @classmethod
    def of(cls, name: str, case: Case, images: Callable[[str], str], few: Callable[[str], CleanSet]) -> Self:
        try:
            attack = None if case.attack is None else parse(case.attack, "untrojan.lab.attacks", Attack)
            model = load(case.file, case.net, case.mean, case.std)
            evaluate(model, few(case.test), attack, case.target)
            clean, test = images(case.clean), images(case.test)
        except UntrojanError as error:
            raise type(error)(f"models.{name}: {error}") from error
        weights = {"sha256": file_sha256(case.file), "net": case.net, "mean": case.mean, "std": case.std}
        scanned = {"model": weights, "clean": clean}
        measured = {
            "test": test,
            "test_images": case.test_images,
            "attack": identity(attack) if attack else None,
            "target": case.target,
        }
        return cls(name, case, attack, scanned, measured)


def _cell(model: _Prepared, method: Defense, scanner: Scanner, setting: Setting, seed: int) -> Cell:
    if setting.samples is not None and setting.samples_per_class is not None:
        raise ConfigError("settings: expected a number of samples or of samples per class, got both")
    scanned = {
        "untrojan": __version__,
        **model.scanned,
        "setting": describe(setting),
        "scanner": identity(scanner),
        "seed": seed,
    }
    shared = {**scanned, **model.measured}
    inputs = {**shared, "method": identity(method)}
    return Cell(
        key=_hash(inputs),
        scan_key=_hash(scanned),
        setup=_hash({**shared, "seed": None}),
        inputs=inputs,
        model=model.name,
        case=model.case,
        attack=model.attack,
        method=method,
        scanner=scanner,
        setting=setting,
        seed=seed,
    )


def _require_different(cells: list[Cell]) -> None:
    first: dict[str, Cell] = {}
    for cell in cells:
        other = first.setdefault(cell.key, cell)
        if other is not cell:
            texts = [f"{each.model}, {spec(each.method)}, {each.setting}, seed {each.seed}" for each in (other, cell)]
            raise ConfigError(f"expected different cells, got the same one twice: {' and '.join(texts)}")


def _hash(inputs: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
