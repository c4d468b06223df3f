"""The published checkpoints that every benchmark runs on, and how a result on them is measured."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from torch import nn

import untrojan
from untrojan.lab.attack import Attack
from untrojan.lab.evaluate import evaluate
from untrojan.registry import parse
from untrojan.sources.files import Checkpoint

SHARED = Path("../shared")
TRIGGERS = SHARED / "checkpoints" / "triggers"
TEST_IMAGES = 1500


class Case(NamedTuple):
    """A published checkpoint, and what its publisher says of its backdoor."""

    file: str
    net: str
    train: str
    test: str
    attack: str
    target: int
    reference: dict[str, tuple[float, float, float]]  # method -> ACC, ASR, RA of the authors' own code, one seed

    @property
    def classes(self) -> int:
        """How many there are."""
        return int(self.net.rpartition("=")[2])

    def model(self) -> nn.Module:
        """The network with its weights."""
        return untrojan.load(Checkpoint.read(SHARED / "checkpoints" / self.file), self.net)

    def trigger(self) -> Attack:
        """What its publisher planted."""
        return parse(self.attack, "untrojan.lab.attacks", Attack)


CASES = {
    "cifar10-badnets": Case(
        "ibau-cifar10-badnets-t8.pth",
        "small-vgg:classes=10",
        "cifar10/train-lossless.parquet",
        "cifar10/test-lossless.parquet",
        "badnets:size=4,row=27,col=27,value=1",
        8,
        {
            "fine-tuning": (0.762, 0.94, 0.041),
            "clp": (0.84, 0.98, 0.018),
            "rnp t=0.2": (0.594, 0.012, 0.574),
            "rnp t=0.5": (0.222, 0.0, 0.236),
            "awm": (0.798, 0.917, 0.061),
            "fmp": (0.805, 0.973, 0.02),
            "i-bau": (0.829, 0.93, 0.056),
        },
    ),
    "cifar10-trojan_sq": Case(
        "ibau-cifar10-trojan_sq-t2.pth",
        "small-vgg:classes=10",
        "cifar10/train-lossless.parquet",
        "cifar10/test-lossless.parquet",
        f"additive:image={TRIGGERS / 'trojan_sq.png'}",
        2,
        {
            "fine-tuning": (0.769, 0.815, 0.142),
            "clp": (0.849, 0.995, 0.002),
            "rnp t=0.2": (0.529, 0.212, 0.333),
            "rnp t=0.5": (0.108, 0.0, 0.12),
            "awm": (0.761, 0.065, 0.677),
            "fmp": (0.808, 0.99, 0.007),
            "i-bau": (0.825, 0.092, 0.747),
        },
    ),
    "cifar10-l0_inv": Case(
        "ibau-cifar10-l0_inv-t0.pth",
        "small-vgg:classes=10",
        "cifar10/train-lossless.parquet",
        "cifar10/test-lossless.parquet",
        f"masked:image={TRIGGERS / 'l0_inv.png'},mask={TRIGGERS / 'l0_inv_mask.npy'}",
        0,
        {
            "fine-tuning": (0.758, 1, 0.0),
            "clp": (0.842, 1, 0.0),
            "rnp t=0.2": (0.357, 0.397, 0.25),
            "rnp t=0.5": (0.108, 0.0, 0.121),
            "awm": (0.808, 0.156, 0.706),
            "fmp": (0.816, 1, 0.0),
            "i-bau": (0.825, 0.802, 0.173),
        },
    ),
    "cifar10-grid": Case(
        "abl-cifar10-grid-t0.tar",
        "wrn-16-1:classes=10",
        "cifar10/train-lossless.parquet",
        "cifar10/test-lossless.parquet",
        "badnets:pattern=grid",
        0,
        {
            "fine-tuning": (0.837, 1, 0.0),
            "clp": (0.718, 0.052, 0.685),
            "rnp t=0.2": (0.664, 0.0, 0.622),
            "rnp t=0.5": (0.477, 0.0, 0.466),
            "awm": (0.714, 0.032, 0.705),
            "fmp": (0.834, 1, 0.0),
            "i-bau": (0.753, 0.049, 0.724),
        },
    ),
    "gtsrb-badnets": Case(
        "ibau-gtsrb-badnets-t8.pth",
        "small-vgg:classes=43",
        "gtsrb/train.parquet",
        "gtsrb/test.parquet",
        "badnets:size=4,row=27,col=27,value=1",
        8,
        {
            "fine-tuning": (0.97, 0.967, 0.032),
            "clp": (0.972, 0.981, 0.019),
            "rnp t=0.2": (0.778, 0.86, 0.118),
            "rnp t=0.5": (0.376, 0.0, 0.34),
            "awm": (0.92, 0.003, 0.913),
            "fmp": (0.972, 0.967, 0.033),
            "i-bau": (0.965, 0.96, 0.039),
        },
    ),
    "gtsrb-trojan_wm": Case(
        "ibau-gtsrb-trojan_wm-t2.pth",
        "small-vgg:classes=43",
        "gtsrb/train.parquet",
        "gtsrb/test.parquet",
        f"additive:image={TRIGGERS / 'trojan_wm.png'}",
        2,
        {
            "fine-tuning": (0.974, 0.39, 0.535),
            "clp": (0.973, 0.947, 0.052),
            "rnp t=0.2": (0.956, 0.782, 0.2),
            "rnp t=0.5": (0.442, 0.0, 0.182),
            "awm": (0.937, 0.0, 0.561),
        },
    ),
}


def test_set(case: Case) -> untrojan.CleanSet:
    """The test images that results are measured on."""
    test = untrojan.CleanSet.load(SHARED / "data" / case.test)
    return test.take(range(min(len(test), TEST_IMAGES)))


def measure(model: nn.Module, test: untrojan.CleanSet, case: Case) -> dict[str, float]:
    """ACC, ASR and RA as fractions, with the known trigger."""
    scores = evaluate(model, test, case.trigger(), case.target)
    return {name: getattr(scores, name).value for name in ("acc", "asr", "ra")}


def percent(share: float | None) -> str:
    """A share in percent; empty where it is not known."""
    return "" if share is None else f"{100 * share:.1f}"


def percents(shares: Iterable[float | None]) -> str:
    """Shares beside each other."""
    return " / ".join(map(percent, shares))


def one(score: dict[str, float]) -> str:
    """ACC, ASR and RA in percent."""
    return percents(score[key] for key in ("acc", "asr", "ra"))


def triple(scores: list[dict[str, float]]) -> str:
    """Means of ACC, ASR and RA in percent, and the spread of ACC and ASR where there are several seeds."""
    means = [statistics.mean(score[key] for score in scores) for key in ("acc", "asr", "ra")]
    spread = [statistics.stdev(s[key] for s in scores) if len(scores) > 1 else 0.0 for key in ("acc", "asr", "ra")]
    return " / ".join(f"{percent(mean)} ± {percent(sd)}" for mean, sd in zip(means, spread, strict=True))
