"""A recipe for a victim: train a network on poisoned or clean images, and record what it became."""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from untrojan.augmentation import AUGMENTATIONS
from untrojan.data import CleanSet
from untrojan.device import device_of, running_on
from untrojan.errors import ConfigError, DataError, utf8
from untrojan.lab import checkpoint
from untrojan.lab.attack import Attack, Target, known_target, require_together, target_labels
from untrojan.lab.evaluate import Scores, evaluate, require_measurable, why_missed
from untrojan.lab.learned import Learned
from untrojan.lab.online import Online
from untrojan.lab.victim import State, poison, train
from untrojan.model import require
from untrojan.randomness import seeded
from untrojan.record import AnyRecord, CleanInfo, ModelInfo
from untrojan.registry import config, files, identity
from untrojan.run import clean_info, collected, environment, model_info, peak_memory, tensors_of
from untrojan.sources.files import save_state, state_sha256
from untrojan.writing import RECORD, staged, write_atomic

MODEL, ATTACK = "model.safetensors", "attack.safetensors"
HELD_OUT = 0.2


@config
class Recipe:
    """How a victim is trained: :func:`untrojan.lab.victim.train` describes it.

    Attributes:
        epochs: Passes over the images, at least 1.
        lr: The highest learning rate of the one cycle, above 0.
        batch_size: Images per step, at least 1.
        weight_decay: At least 0.
        smoothing: Label smoothing in [0, 1).
        augment: What is done to each batch: "crop" cuts a random window of the padded image, "crop-flip" mirrors half
            of the images too.
        bf16: Multiply in bfloat16 where the device does so natively, which is faster there, and the network can.

    Example:
        >>> Recipe(epochs=5).lr
        0.1
    """

    epochs: Annotated[int, Field(ge=1)] = 30
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    batch_size: Annotated[int, Field(ge=1)] = 128
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.05
    augment: Literal["none", "crop", "crop-flip"] = "none"
    bf16: bool = False


class EpochLog(BaseModel):
    """The network after one epoch: mean loss and accuracy on what it was shown, and ACC and ASR on the test images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss: float
    accuracy: float
    acc: float | None
    asr: float | None
    seconds: float


class VictimRecord(AnyRecord):
    """Everything about the training of one victim or clean model.

    `status` is `trained` where there was no attack, `backdoored` where the attack took, and `attack_did_not_take` where
    it did not; `reason` says it in a sentence. :func:`untrojan.lab.evaluate.why_missed` tells the two apart.

    `recipe` holds all that decides the result: the network and its initial weights, the images before and after the
    attack, the attack with its target and rate, the seed, and how the network was trained. Of files that the attack
    reads it holds the hashes; `attack_files` says where they were. `clean` are the training images before `poisoned` of
    them were changed; that is `None` where the attack changes every batch anew. `test` are the images behind `epochs`
    and `scores`, a part of the data that was not trained on where `held_out` is set. `attack_sha256` is the hash of the
    tensors of a trigger that was learned.
    """

    kind: Literal["victim"] = "victim"  # pyright: ignore[reportIncompatibleVariableOverride]
    status: Literal["trained", "backdoored", "attack_did_not_take"]
    reason: str
    net: str | None = None
    recipe: dict[str, Any]
    clean: CleanInfo
    poisoned: int | None
    test: CleanInfo
    held_out: bool
    epochs: list[EpochLog]
    scores: Scores
    model: ModelInfo
    attack_sha256: str | None
    attack_files: dict[str, str] = Field(default_factory=dict)
    peak_memory_bytes: int
    environment: dict[str, str]
    command: str | None = None
    warnings: list[str]


class Victim(NamedTuple):
    """A trained network, in evaluation mode, its record, the attack with what it learned, and its checkpoint."""

    model: nn.Module
    record: VictimRecord
    attack: Attack | None
    checkpoint: Path | None

    def save(self, folder: str | Path, force: bool = False) -> None:
        """Write `model.safetensors`, `record.json` and, where the attack has learned its trigger, `attack.safetensors`.

        The folder appears whole, and then the checkpoint goes.

        Args:
            folder: Where to; made if it is not there.
            force: Replace these files when the folder holds something already; a trigger of an earlier victim goes.

        Raises:
            ConfigError: The folder is not empty and `force` is not set.
            OSError: It cannot be written.
        """
        learned = _learned(self.attack, self.record.clean.shape[0])
        with staged(folder, force) as made:
            save_state(made / MODEL, tensors_of(self.model))
            if learned:
                save_state(made / ATTACK, learned)
            write_atomic(made / RECORD, self.record.to_json().encode())
        if not learned:
            Path(folder, ATTACK).unlink(missing_ok=True)
        if self.checkpoint is not None:
            self.checkpoint.unlink(missing_ok=True)


def make_victim(
    net: nn.Module,
    data: CleanSet,
    test: CleanSet | None = None,
    *,
    attack: Attack | None = None,
    target: Target | None = None,
    rate: float | None = None,
    recipe: Recipe | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    resume: bool = True,
) -> Victim:
    """Train a victim, or without an attack a clean model, and measure it after every epoch.

    Args:
        net: The network with its initial weights; not changed.
        data: Clean training images of every class.
        test: Clean images to measure ACC and ASR on; left out, a fifth of `data` is held out for that.
        attack: What to plant; comes with `target`.
        target: The target class, or "all-to-all".
        rate: The poisoning rate as for :func:`untrojan.lab.victim.poison`; left out, the published one.
        recipe: How to train; left out, that of :class:`Recipe`.
        seed: Decides what is held out, which images are poisoned, and order and dropout; at least 0.
        checkpoint: A file to keep after every epoch what it takes to go on.
        resume: Where the checkpoint is there, go on from it, to the same result, bit for bit, on one version of torch
            with as many threads; else begin anew, and replace it after the first epoch.

    Returns:
        The network and its record, also where the attack did not take.

    Raises:
        ConfigError: Attack and target do not come together or do not fit the images, the rate is not in [0, 1], or the
            checkpoint is of another recipe.
        DataError: The images do not fit the network or the attack, or no test image can show whether the attack took.
        ModelError: The network does not give finite logits for the images, or its training diverged.
        RecordError: The checkpoint is damaged.

    Example:
        >>> import torch
        >>> from untrojan.lab.attacks.badnets import BadNets
        >>> images, labels = torch.zeros(80, 1, 4, 4), torch.arange(80) % 2
        >>> images[:, :, 0] = labels.view(80, 1, 1)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> recipe = Recipe(epochs=20, batch_size=8)
        >>> victim = make_victim(
        ...     net, CleanSet(images, labels), attack=BadNets(size=2), target=1, rate=0.2, recipe=recipe
        ... )
        >>> victim.record.status, victim.record.poisoned, len(victim.record.epochs)
        ('backdoored', 13, 20)
    """
    recipe = recipe or Recipe()
    with seeded(seed):
        images, judge = data.split(HELD_OUT, seed) if test is None else (data, test)
    require(net, images, learns=False)
    classes = require_measurable(net, judge)
    target = None if target is None else known_target(target, classes)
    _require_attack(attack, target, rate, images, judge, classes)
    device = device_of(net)
    with collected() as warned, running_on(device):
        images, judge = images.to(device), judge.to(device)
        shown, online = _planted(images, attack, target, rate, seed)
        attack = online.attack if online else attack
        told = {
            "architecture": type(net).__name__,
            "initial_sha256": state_sha256(tensors_of(net)),
            "shown_sha256": shown.sha256,
            **asked(images, judge, attack, target, rate, recipe, seed),
        }
        log = _Log(checkpoint, resume, told, judge, attack, target)
        how: dict[str, Any] = dataclasses.asdict(recipe) | {"augment": AUGMENTATIONS[recipe.augment]}
        model = train(net, shown, seed=seed, online=online, after_epoch=log.keep, begin=log.begin, **how)
        scores = evaluate(model, judge, attack, target)
    record = VictimRecord(
        status="trained" if attack is None else "attack_did_not_take" if why_missed(scores, attack) else "backdoored",
        reason=_reason(scores, attack),
        recipe=told,
        clean=clean_info(images, classes),
        poisoned=None if online else _count_changed(images, shown),
        test=clean_info(judge, classes),
        held_out=test is None,
        epochs=log.epochs,
        scores=scores,
        model=model_info(model, tensors_of(model), classes, None),
        attack_sha256=scores.attack_sha256,
        attack_files={name: utf8(str(path.absolute())) for name, path in files(attack).items()} if attack else {},
        peak_memory_bytes=peak_memory(device),
        environment=environment(device),
        warnings=warned,
    )
    return Victim(model, record, attack, checkpoint)


def asked(
    images: CleanSet,
    judge: CleanSet,
    attack: Attack | None,
    target: Target | None,
    rate: float | None,
    recipe: Recipe,
    seed: int,
) -> dict[str, Any]:
    """Give what a record says of its recipe that is known before anything is poisoned, as values that JSON can hold.

    Args:
        images: The training images.
        judge: The test images.
        attack: The attack; `None` for a clean model.
        target: Its target.
        rate: Its poisoning rate; `None` for the published one.
        recipe: How to train.
        seed: The seed.
    """
    return {
        "data_sha256": images.sha256,
        "test_sha256": judge.sha256,
        "attack": None if attack is None else identity(attack),
        "target": target,
        "rate": None if attack is None else attack.rate_or(rate),
        "seed": seed,
        **dataclasses.asdict(recipe),
    }


def checkpoint_of(folder: Path) -> Path:
    """Where the training of the victim that ends in `folder` is kept until then: a hidden file beside it.

    Raises:
        ConfigError: Nothing can be beside it.
    """
    folder = folder.absolute()
    if not folder.name:
        raise ConfigError(f"{folder} has no name; give a folder inside of it")
    return folder.with_name(f".{folder.name}.training.safetensors")


def _learned(attack: Attack | None, channels: int) -> dict[str, Tensor]:
    """The tensors behind a trigger that was learned, none where it was not."""
    return attack.network(channels).state_dict() if isinstance(attack, Learned) else {}


def _planted(
    images: CleanSet, attack: Attack | None, target: Target | None, rate: float | None, seed: int
) -> tuple[CleanSet, Online | None]:
    """The images to train on, and what the attack does to every batch of them."""
    if attack is None or target is None:
        return images, None
    online = attack.online(images, target, rate, seed)
    return (images, online) if online else (poison(images, attack, target, rate, seed), None)


class _Log:
    """Measures a network after each epoch, and keeps that and where the training stands in the checkpoint."""

    def __init__(
        self,
        path: Path | None,
        resume: bool,
        recipe: Mapping[str, Any],
        judge: CleanSet,
        attack: Attack | None,
        target: Target | None,
    ) -> None:
        self.path = path
        self.recipe = recipe
        self.judge = judge
        self.attack = attack
        self.target: Target | None = target
        found = checkpoint.load(path, recipe) if resume and path is not None and path.exists() else None
        self.begin: State | None = found["training"] if found else None
        self.epochs = [EpochLog(**epoch) for epoch in found["epochs"]] if found else []
        self.since = time.perf_counter()

    def keep(self, model: nn.Module, state: State) -> str:
        scores = evaluate(model, self.judge, self.attack, self.target)
        loss, accuracy, _ = state["fit"]["epochs"][-1]
        now = time.perf_counter()
        self.epochs.append(
            EpochLog(
                loss=loss,
                accuracy=accuracy,
                acc=scores.acc.value,
                asr=scores.asr.value if scores.asr else None,
                seconds=now - self.since,
            )
        )
        self.since = now
        if self.path is not None:
            epochs = [epoch.model_dump() for epoch in self.epochs]
            checkpoint.save(self.path, self.recipe, {"training": state, "epochs": epochs})
        return ", ".join(_rates(scores))


def _count_changed(images: CleanSet, shown: CleanSet) -> int:
    """How many images are other ones or have another label, as a white image that gets a white patch has."""
    return int(((shown.images != images.images).flatten(1).any(1) | (shown.labels != images.labels)).sum())


def _rates(scores: Scores) -> list[str]:
    known = {"ACC": scores.acc, "ASR": scores.asr}
    return [f"{name} {rate.value:.1%}" for name, rate in known.items() if rate is not None and rate.value is not None]


def _require_attack(
    attack: Attack | None,
    target: Target | None,
    rate: float | None,
    images: CleanSet,
    judge: CleanSet,
    classes: int,
) -> None:
    require_together(attack, target)
    if attack is None or target is None:
        if rate is not None:
            raise ConfigError(f"expected an attack with a poisoning rate, got rate {rate} alone")
        return
    if images.num_classes > classes:
        raise DataError(
            f"the images name {images.num_classes} classes, but the network has {classes}; leave out the rest"
        )
    if not (target_labels(judge.labels, target, classes) != judge.labels).any():
        raise DataError(f"every test image is of class {target}; expected others, to see whether the attack takes")


def _reason(scores: Scores, attack: Attack | None) -> str:
    if attack is None or scores.asr is None:
        return "no attack was asked for"
    kind = "a clean-label attack" if attack.clean_label else "an attack"
    of = "of the clean accuracy " if scores.target == "all-to-all" else ""
    missed = why_missed(scores, attack)
    return (
        f"{attack.name} {'did not take' if missed else 'took'}: it sends {scores.asr.count} of {scores.asr.total} "
        f"triggered test images to the label wanted; {missed or f'{kind} takes from {attack.bar:.0%} {of}on'}"
    )
