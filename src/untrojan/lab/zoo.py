"""A zoo: victims of every attack and clean models beside them, trained from one TOML file, and opened by name.

Each has a folder of its own, `ROOT/<data>/<net>/<attack, or clean>/<seed>`, and `ROOT/manifest.json` tells what is in
all of them.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from untrojan.data import CleanSet
from untrojan.device import chosen
from untrojan.errors import ConfigError, RecordError, UntrojanError
from untrojan.lab.attack import Attack, Target
from untrojan.lab.recipe import ATTACK, MODEL, Recipe, Victim, VictimRecord, asked, checkpoint_of, make_victim
from untrojan.randomness import seeded
from untrojan.record import AnyRecord
from untrojan.registry import config, discover, files, identity, parse, read_toml
from untrojan.sources.files import Checkpoint, state_sha256
from untrojan.sources.nets import NETS, build
from untrojan.writing import RECORD, sha256, write_atomic

MANIFEST = "manifest.json"
CLEAN = "clean"

_ATTACKS = "untrojan.lab.attacks"
_Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
_Seed = Annotated[int, Field(ge=0, lt=2**32)]


@config
class Planted:
    """What an attacker does.

    Attributes:
        attack: Such as `badnets:size=2`.
        target: The target class or "all-to-all".
        rate: The poisoning rate in [0, 1]; left out, the published one.
    """

    attack: str
    target: Target
    rate: Annotated[float, Field(ge=0, le=1)] | None = None

    def parsed(self) -> Attack:
        """The attack.

        Raises:
            ConfigError: There is no such attack, or a field of it is wrong.
        """
        return parse(self.attack, _ATTACKS, Attack)


@config
class Habitat:
    """A data set, and what is trained on it.

    Attributes:
        train: Clean training images, as for :meth:`untrojan.CleanSet.load`.
        test: Clean images to measure ACC and ASR on.
        nets: Architectures as for :func:`untrojan.sources.nets.build`, by the names of their folders.
        attacks: Names of the attacks that are planted in each of them; a clean model is trained beside.
        recipe: How all of these are trained.
    """

    train: str
    test: str
    nets: Annotated[dict[_Name, str], Field(min_length=1)]
    attacks: list[str]
    recipe: Recipe = Field(default_factory=Recipe)


class Member(NamedTuple):
    """One model of a zoo, to be trained; `planted` and `attack` are `None` where it is clean."""

    name: str
    data: Habitat
    net: str
    planted: Planted | None
    attack: Attack | None
    seed: int


@config
class Zoo:
    """What a zoo file asks for. Paths in it are taken from the current folder, as on the command line.

    Attributes:
        data: The data sets by name.
        attacks: The attacks by name; one attack may have several, with other settings each.
        seeds: Each gives other initial weights, poisoned images and order.
    """

    data: Annotated[dict[_Name, Habitat], Field(min_length=1)]
    attacks: dict[_Name, Planted] = Field(default_factory=dict)
    seeds: Annotated[list[_Seed], Field(min_length=1)] = Field(default_factory=lambda: [0])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a zoo file.

        Raises:
            ConfigError: The file cannot be read, is not TOML, or holds other things than a zoo.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     file = Path(folder, "zoo.toml")
            ...     _ = file.write_text("seeds = [0, 1]")
            ...     Zoo.load(file)  # doctest: +ELLIPSIS
            Traceback (most recent call last):
            untrojan.errors.ConfigError: .../zoo.toml: `data` must be given
        """
        return read_toml(cls, path)

    def members(self) -> list[Member]:
        """List the models: data set by data set, the first seed first, the clean model before those with a backdoor.

        Raises:
            ConfigError: There is no such attack, or its fields are wrong; a name is unknown, twice, or taken.
        """
        if CLEAN in self.attacks:
            raise ConfigError(f"attacks.{CLEAN}: this is what the models without an attack are called; rename it")
        parsed = {name: planted.parsed() for name, planted in self.attacks.items()}
        found: dict[str, Member] = {}
        for where, data in self.data.items():
            if unknown := [name for name in data.attacks if name not in self.attacks]:
                raise ConfigError(f"data.{where}: no attack is named {unknown[0]!r}; add a table attacks.{unknown[0]}")
            for seed in self.seeds:
                for net, spec in data.nets.items():
                    for name in (CLEAN, *data.attacks):
                        full = f"{where}/{net}/{name}/{seed}"
                        if full in found:
                            raise ConfigError(f"expected different models, got {full} twice")
                        found[full] = Member(full, data, spec, self.attacks.get(name), parsed.get(name), seed)
        return list(found.values())


class Entry(BaseModel):
    """What the manifest tells of one model; rates are in [0, 1].

    `record_sha256` is the hash of its record as a file, `state_sha256` and `attack_sha256` are those of the tensors of
    the model and of a trigger that was learned. The rest is what the record says: `recipe` holds the seed, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    status: Literal["trained", "backdoored", "attack_did_not_take"]
    acc: float | None
    asr: float | None
    net: str | None
    recipe: dict[str, Any]
    state_sha256: str
    attack_sha256: str | None
    record_sha256: str


class Manifest(AnyRecord):
    """What is in the folders of a zoo, by name, such as `digits/digits-cnn/wanet/0`."""

    kind: Literal["zoo"] = "zoo"  # pyright: ignore[reportIncompatibleVariableOverride]
    victims: dict[str, Entry]


class Outcome(NamedTuple):
    """What became of one model: its entry, or the error that it ended with; `trained` where it was not there before."""

    name: str
    entry: Entry | None
    trained: bool
    error: str

    def __str__(self) -> str:
        if self.entry is None:
            return f"{self.name}: failed: {self.error}"
        rates = {"ACC": self.entry.acc, "ASR": self.entry.asr}
        told = [f"{name} {rate:.1%}" for name, rate in rates.items() if rate is not None]
        return f"{self.name}: {', '.join([self.entry.status, *told])}{'' if self.trained else ', was there'}"


def fill(zoo: Zoo, root: str | Path) -> Iterator[Outcome]:
    """Train what is missing of a zoo, one after the other, and write its manifest.

    What is there is kept when it is whole and what the zoo asks for; an interrupted training goes on. A model that
    cannot be trained, or whose folder holds something else, is told, and the next one's turn comes. The manifest is
    written in the end, also where the caller stops before.

    Args:
        zoo: What to train.
        root: The folder of the zoo; made if it is not there.

    Yields:
        What became of each model, in the order of :meth:`Zoo.members`.

    Raises:
        ConfigError: The zoo asks for what there is not.
        OSError: The manifest cannot be written.
    """
    root = Path(root)
    members = zoo.members()
    images = lru_cache(maxsize=2)(CleanSet.load)  # the training and the test images of one data set
    root.mkdir(parents=True, exist_ok=True)
    try:
        for member in members:
            yield _settled(member, root, images)
    finally:
        write_atomic(root / MANIFEST, manifest(root).to_json().encode())


def manifest(root: str | Path) -> Manifest:
    """Make the manifest of what is in the folders of a zoo; what is damaged is left out.

    Args:
        root: The folder of the zoo.
    """
    root, victims = Path(root), {}
    for record in sorted(root.glob(f"*/*/*/*/{RECORD}")):
        try:
            victims[record.parent.relative_to(root).as_posix()] = _entry(record.parent)
        except UntrojanError:
            continue
    return Manifest(victims=victims)


def load(name: str, root: str | Path, net: str | None = None) -> Victim:
    """Open a model of a zoo, after checking that it is the one that the manifest tells of.

    Args:
        name: Such as `digits/digits-cnn/wanet/0`.
        root: The folder of the zoo.
        net: The architecture where it is code of your own; a file is never let choose what code to run.

    Returns:
        The network in evaluation mode, its record, and its attack with what it has learned.

    Raises:
        ConfigError: The manifest knows no such model, `net` is missing, or a file of the attack is.
        RecordError: The manifest or the record cannot be read, record, weights or trigger differ from the manifest, a
            file of the attack is not what it was, or there is no such attack here.
        ModelError: The weights cannot be read, or do not fit the architecture.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, MANIFEST).write_text(manifest(folder).to_json())
        ...     load("digits/digits-cnn/wanet/0", folder)
        Traceback (most recent call last):
        untrojan.errors.ConfigError: the zoo has no digits/digits-cnn/wanet/0; it has nothing
    """
    root = Path(root)
    victims = Manifest.load(root / MANIFEST).victims
    if name not in victims:
        raise ConfigError(f"the zoo has no {name}; it has {', '.join(victims) or 'nothing'}")
    folder, entry = root / name, victims[name]
    differing = [key for key, value in _entry(folder) if value != getattr(entry, key)]
    if differing:
        raise RecordError(f"{folder} is not what {root / MANIFEST} tells of: {', '.join(differing)} differ")
    record = VictimRecord.load(folder / RECORD)
    model = Checkpoint.read(folder / MODEL).into(_network(name, entry, net))
    return Victim(model, record, _attack(folder, record), None)


def _network(name: str, entry: Entry, net: str | None) -> nn.Module:
    known = entry.net or ""
    if net is None and known.partition(":")[0] not in NETS:
        raise ConfigError(f"{name} is a network of somebody's own code, {known!r}; look at it, and give it as `net`")
    return build(net or known)


def _attack(folder: Path, record: VictimRecord) -> Attack | None:
    told = record.recipe["attack"]
    if told is None:
        return None
    classes = discover(_ATTACKS, Attack)
    if told["name"] not in classes:
        raise RecordError(f"{folder} is of an attack that is not known here, {told['name']!r}; update untrojan")
    attack = classes[told["name"]](**told["fields"] | record.attack_files)  # pyright: ignore[reportAbstractUsage]
    now = identity(attack)["fields"]
    if any(now[name] != told["fields"][name] for name in files(attack)):
        names = " and ".join(map(str, files(attack).values()))
        raise RecordError(f"{folder} is not known to be trained with what is in {names} now; remove it to train anew")
    return type(attack)(**told["fields"] | {"weights": folder / ATTACK}) if record.attack_sha256 else attack


def _entry(folder: Path) -> Entry:
    """What is in a folder.

    Raises:
        RecordError: The record cannot be read, or is not that of the weights beside it.
        ModelError: The weights cannot be read.
    """
    record = VictimRecord.load(folder / RECORD)
    hashes = {MODEL: record.model.state_sha256, ATTACK: record.attack_sha256}
    for name, expected in hashes.items():
        if expected and state_sha256(Checkpoint.read(folder / name).tensors) != expected:
            raise RecordError(f"{folder / name} is not what its record tells of; remove {folder} to train anew")
    scores = record.scores
    return Entry(
        status=record.status,
        acc=scores.acc.value,
        asr=scores.asr.value if scores.asr else None,
        net=record.net,
        recipe=record.recipe,
        state_sha256=record.model.state_sha256,
        attack_sha256=record.attack_sha256,
        record_sha256=sha256((folder / RECORD).read_bytes()),
    )


def _settled(member: Member, root: Path, images: Callable[[str], CleanSet]) -> Outcome:
    folder = root / member.name
    try:
        train, test = images(member.data.train), images(member.data.test)
        trained = not folder.exists()
        if trained:
            _train(member, train, test, folder)
        entry = _entry(folder)
        _require_same(member, train, test, entry, folder)
    except (Exception, SystemExit) as error:  # whatever it is, the other models do not depend on it
        told = str(error) if isinstance(error, UntrojanError) else f"{type(error).__name__}: {error}"
        return Outcome(member.name, None, False, told)
    return Outcome(member.name, entry, trained, "")


def _train(member: Member, images: CleanSet, test: CleanSet, folder: Path) -> None:
    with seeded(member.seed):
        net = build(member.net).to(chosen())
    folder.parent.mkdir(parents=True, exist_ok=True)
    victim = make_victim(
        net,
        images,
        test,
        attack=member.attack,
        target=member.planted.target if member.planted else None,
        rate=member.planted.rate if member.planted else None,
        recipe=member.data.recipe,
        seed=member.seed,
        checkpoint=checkpoint_of(folder),
    )
    victim._replace(record=victim.record.model_copy(update={"net": member.net})).save(folder)


def _require_same(member: Member, images: CleanSet, test: CleanSet, entry: Entry, folder: Path) -> None:
    planted = member.planted
    target, rate = (planted.target, planted.rate) if planted else (None, None)
    wanted = asked(images, test, member.attack, target, rate, member.data.recipe, member.seed)
    differing = [name for name, value in wanted.items() if entry.recipe.get(name) != value]
    differing += ["net"] if entry.net != member.net else []
    if differing:
        raise RecordError(f"{folder} holds another model than the zoo asks for ({', '.join(differing)}); remove it")
