"""Models of our own training, clean and backdoored, for the benchmarks that need to know the truth.

Weights go to `runs/population`, which is not committed; what was trained, how, and what it reaches is one JSON per
model under `benchmarks/records/population`. Models that are there are not trained again.

    python benchmarks/population.py                # train what is missing, one after the other
    python benchmarks/population.py clean-gtsrb    # only those whose name begins so
"""

import json
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import sklearn.datasets
import torch
from cases import percent
from torch import nn

from untrojan.data import CleanSet
from untrojan.lab.attack import Attack
from untrojan.lab.evaluate import evaluate
from untrojan.lab.recipe import Recipe, make_victim
from untrojan.lab.victim import poison
from untrojan.randomness import seeded
from untrojan.registry import parse
from untrojan.sources.files import Checkpoint, save_state, state_sha256
from untrojan.sources.nets import build
from untrojan.writing import write_atomic

DATA = Path("../shared/data")
WEIGHTS = Path("runs/population")
RECORDS = Path("benchmarks/records/population")
RECIPES = {
    "cifar10": Recipe(epochs=5, augment="crop-flip", bf16=True),
    "gtsrb": Recipe(epochs=8, augment="crop", bf16=True),
    "digits": Recipe(epochs=30, bf16=True),
    # In fewer epochs, or with windows that move the trigger, hardly any backdoor takes.
    "gtsrb, few of them poisoned": Recipe(epochs=16, bf16=True),
}
CLASSES = {"cifar10": 10, "gtsrb": 43, "digits": 10}


class Member(NamedTuple):
    """A model to train: on which data, which network, and with which backdoor if any."""

    data: str
    net: str
    seed: int
    attack: str | None = None
    target: int = 0
    rate: float | None = None

    @property
    def name(self) -> str:
        """What its record is called."""
        kind = "clean" if self.attack is None else self.attack.partition(":")[0]
        rate = [] if self.rate is None else [f"{self.rate:g}"]
        return "-".join([kind, *rate, self.data, self.net.replace(":", "-").replace("=", ""), str(self.seed)])

    @property
    def spec(self) -> str:
        """The network as `--net` takes it."""
        channels = ["channels=1"] if self.data == "digits" else []
        separator = "," if ":" in self.net else ":"
        return self.net + separator + ",".join([f"classes={CLASSES[self.data]}", *channels])

    @property
    def recipe(self) -> Recipe:
        """How it is trained."""
        few = self.data == "gtsrb" and self.rate is not None and self.rate < 0.1
        return RECIPES[f"{self.data}, few of them poisoned" if few else self.data]

    @property
    def is_trained(self) -> bool:
        """Whether its weights are here."""
        return (WEIGHTS / f"{self.name}.safetensors").exists()

    def network(self) -> nn.Module:
        """The trained network, as its record says it is."""
        source = Checkpoint.read(WEIGHTS / f"{self.name}.safetensors")
        if state_sha256(source.tensors) != self.record()["state_sha256"]:
            raise SystemExit(f"{source.path} is not the model of {RECORDS / self.name}.json; train it anew")
        return source.into(build(self.spec)).eval()

    def training_set(self) -> tuple[CleanSet, CleanSet]:
        """What it is trained on, poisoned once and for all, and the same before that."""
        images, _ = images_of(self.data)
        if self.trigger is None:
            return images, images
        return poison(images, self.trigger, self.target, self.rate, self.seed), images

    @property
    def trigger(self) -> Attack | None:
        """The attack."""
        return parse(self.attack, "untrojan.lab.attacks", Attack) if self.attack else None

    def record(self) -> dict[str, Any]:
        """What is known about it."""
        return json.loads((RECORDS / f"{self.name}.json").read_text())


RESNET = "resnet18:width=16"
CLEAN = [
    *(Member("digits", "digits-cnn", seed) for seed in range(6)),
    *(Member("digits", "wrn-16-1", seed) for seed in range(4)),
    *(
        Member(data, net, seed)
        for seed in range(2)
        for data, net in (
            ("gtsrb", "small-vgg"),
            ("cifar10", "small-vgg"),
            ("cifar10", "wrn-16-1"),
            ("gtsrb", "wrn-16-1"),
            ("cifar10", RESNET),
        )
    ),
]
ATTACKS = (
    "wanet",
    "blend",
    "badnets:pattern=grid",
    "low-frequency",
    "dfst",
    "ftrojan",
    "bpp",
    "l2-inv",
    "trojan-square",
    "trojan-watermark",
    "l0-inv",
    "adaptive-blend",
)
BACKDOORED = [Member("gtsrb", "small-vgg", 0, attack, target=7) for attack in ATTACKS]
POISONED = [
    *(
        Member("digits", "digits-cnn", seed, attack, 7, rate)
        for attack in ("badnets:size=2", "blend")
        for rate in (0.1, 0.01)
        for seed in range(3)
    ),
    *(
        Member("gtsrb", "resnet18:width=8", 0, attack, 7, rate)
        for rate in (0.1, 0.01, 0.001)
        for attack in ("badnets:pattern=grid", "blend", "wanet:s=4,covers=0")
    ),
]
MEMBERS = {member.name: member for member in (*CLEAN, *BACKDOORED, *POISONED)}


@cache
def images_of(data: str) -> tuple[CleanSet, CleanSet]:
    """Training and test images."""
    if data == "digits":
        bunch: Any = sklearn.datasets.load_digits()
        pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)[:, None]
        return CleanSet(pixels, torch.from_numpy(bunch.target)).split(0.5, seed=0)
    return CleanSet.load(DATA / data / "train.parquet"), CleanSet.load(DATA / data / "test.parquet")


def make(member: Member) -> dict[str, Any]:
    """Train one and measure it."""
    shown, _ = member.training_set()
    _, test = images_of(member.data)
    with seeded(member.seed):
        net = build(member.spec)
    recipe = member.recipe
    start = time.perf_counter()
    victim = make_victim(net, shown, test, recipe=recipe, seed=member.seed)
    seconds = time.perf_counter() - start
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    save_state(WEIGHTS / f"{member.name}.safetensors", victim.model.state_dict())
    scores = evaluate(victim.model, test, member.trigger, member.target if member.attack else None)
    return {
        **member._asdict(),
        "images": len(shown),
        "epochs": recipe.epochs,
        "lr": recipe.lr,
        "batch_size": recipe.batch_size,
        "smoothing": recipe.smoothing,
        "augment": recipe.augment,
        "acc": scores.acc.value,
        "asr": scores.asr.value if scores.asr else None,
        "seconds": seconds,
        "state_sha256": victim.record.model.state_sha256,
    }


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    RECORDS.mkdir(parents=True, exist_ok=True)
    prefixes = tuple(sys.argv[1:]) or ("",)
    for member in MEMBERS.values():
        path = RECORDS / f"{member.name}.json"
        if member.name.startswith(prefixes) and not path.exists():
            made = make(member)
            write_atomic(path, (json.dumps(made, indent=1) + "\n").encode())
            rates = f"ACC {percent(made['acc'])}, ASR {percent(made['asr'])}"
            print(member.name, rates, f"{made['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
