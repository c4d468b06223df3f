"""What each part of `auto` contributes: backdoored models, repaired with parts of it taken away, one at a time.

They are small victims of the zoo, which `zoo.py` has to train first, and published checkpoints. One row is the oracle:
the same training, shown the true trigger instead of what was found. The last rows have one image per class. Every cell
(variant x victim) is one JSON under `benchmarks/records/ablation`; cells that are there are not run again.

    python benchmarks/ablation.py --jobs 2
"""

import argparse
import copy
import functools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import methods
import torch
from cases import CASES, one, percents, test_set, triple
from pool import side_by_side
from torch import Tensor, nn
from zoo import IMAGES, ROOT

import untrojan
from untrojan.data import CleanSet
from untrojan.defenses import auto, views
from untrojan.lab import zoo
from untrojan.lab.attack import Attack
from untrojan.lab.evaluate import evaluate
from untrojan.randomness import seeded
from untrojan.record import Diagnosis
from untrojan.scanners.aim import Aim
from untrojan.scanners.patches import Patches
from untrojan.writing import write_atomic

RECORDS = Path("benchmarks/records/ablation")
PAGE = Path("benchmarks/ablation.md")
DIGITS = ["badnets", "l0-inv", "masked", "blend", "dfst", "low-frequency"]
TARGET = 7
FEW = "one image per class"
ALL = "all of it"
ROUND = "one round, as many updates"
ANY = "any patches found, not the surest"
ALWAYS = "changes of the whole image, always"
UNMIXED = "no images mixed"
LAST = "no average of the weights"
ORACLE = "the true trigger (oracle)"

Parts = dict[str, Any]
View = Callable[[Tensor, torch.Generator], Tensor]


def _any_patches(
    student: nn.Module, clean: CleanSet, aim: Aim, found: Patches, generator: torch.Generator, *_: object
) -> Patches:
    return found.at(found.keys[found.draw(12, generator)])


def _weigh(triggers: Any, *_: object, spread: bool) -> None:
    triggers.spread, triggers.shares = spread, torch.full((3,), auto.CHANGED / 3)


def _as_they_are(images: Tensor, *_: object) -> Tensor:
    return images


def _shifted_and(change: View) -> View:
    return lambda images, generator: change(views.shifted(images, generator), generator)


def _known(attack: Attack) -> Parts:
    return {"_Triggers.put_on": lambda _, images, *__: attack.trigger(images)}


VARIANTS: dict[str, Callable[[Attack], tuple[Parts, dict[str, Any]]]] = {
    ALL: lambda _: ({}, {}),
    ROUND: lambda _: ({}, {"rounds": 1, "steps": 384}),
    ANY: lambda _: ({"pinpoint": _any_patches}, {}),
    "patches and faint perturbations alone": lambda _: (
        {"_Triggers.weigh": functools.partialmethod(_weigh, spread=False)},
        {},
    ),
    ALWAYS: lambda _: (
        {"_Triggers.weigh": functools.partialmethod(_weigh, spread=True)},
        {},
    ),
    "no other images or noise laid over": lambda _: ({"_distracted": _as_they_are}, {}),
    UNMIXED: lambda _: ({"mixed": _as_they_are}, {}),
    "images mixed, always": lambda _: ({"mixed": _as_they_are, "shifted": _shifted_and(views.mixed)}, {}),
    LAST: lambda _: ({"DECAY": 0.0}, {}),
    ORACLE: lambda attack: (_known(attack), {}),
    FEW: lambda _: ({}, {}),
    f"{FEW}, none varied": lambda _: ({"varied": _as_they_are}, {}),
    f"{FEW}, no other images or noise laid over": lambda _: ({"_distracted": _as_they_are}, {}),
    f"{FEW}, all varied": lambda _: ({"varied": _as_they_are, "shifted": _shifted_and(views.varied)}, {}),
}


# Parts that tell there; the small VGGs take minutes a cell.
TRIED = [ALL, ROUND, ANY, ALWAYS, UNMIXED, LAST, ORACLE]
PUBLISHED = {case: TRIED if case == "cifar10-badnets" else [ALL, ORACLE] for case in CASES}


class Victim(NamedTuple):
    """A backdoored model, its trigger and target, clean images, other images to judge by, and what the scan says."""

    model: nn.Module
    attack: Attack
    target: int
    clean: CleanSet
    judge: CleanSet
    diagnosis: Diagnosis


def path_of(variant: str, victim: str) -> Path:
    name = "".join(letter if letter.isalpha() else "-" for letter in variant)
    return RECORDS / f"{name}-{victim}.json"


def opened(name: str, few: bool) -> Victim:
    """Open a victim on digits, with few images or all, or a published checkpoint."""
    if name in CASES:
        case, cell = CASES[name], methods.Cell("auto", name, "500 images", 0)
        drawn, diagnosis = methods.drawn(cell), methods.diagnose(cell)
        return Victim(case.model(), case.trigger(), case.target, drawn, test_set(case), diagnosis)
    victim = zoo.load(f"digits/digits-cnn/{name}/0", ROOT)
    assert victim.attack is not None
    draw = {"samples_per_class": 1} if few else {}
    clean, judge = CleanSet.load(IMAGES / "digits-clean.npz", **draw), CleanSet.load(IMAGES / "digits-judge.npz")
    diagnosis = Diagnosis.model_validate_json(path_of("scan", name).read_text())
    return Victim(victim.model, victim.attack, TARGET, clean, judge, diagnosis)


def run(cell: tuple[str, str]) -> None:
    """Repair one victim with one variant and measure it with its trigger."""
    variant, name = cell
    victim = opened(name, variant.startswith(FEW))
    parts, fields = VARIANTS[variant](victim.attack)
    start = time.perf_counter()
    with ExitStack() as stack, seeded(0):
        for part, instead in parts.items():
            stack.enter_context(mock.patch(f"untrojan.defenses.auto.{part}", instead))
        model = copy.deepcopy(victim.model)
        repaired = auto.Auto(**fields).tune(model, victim.clean, victim.clean, victim.diagnosis, 0)
    result = {"variant": variant, "victim": name, "seconds": time.perf_counter() - start}
    for when, model in (("before", victim.model), ("after", repaired)):
        scores = evaluate(model, victim.judge, victim.attack, victim.target)
        result[when] = {key: getattr(scores, key).value for key in ("acc", "asr", "ra")}
    write_atomic(path_of(variant, name), (json.dumps(result, indent=1) + "\n").encode())
    print(variant, name, percents(result["after"].values()), flush=True)


def look(name: str) -> None:
    """Scan one victim."""
    victim = zoo.load(f"digits/digits-cnn/{name}/0", ROOT)
    found = untrojan.scan(victim.model, CleanSet.load(IMAGES / "digits-clean.npz")).diagnosis
    blank = [trigger.model_copy(update={"picture": "", "examples": ""}) for trigger in found.triggers]
    short = found.model_copy(update={"triggers": blank, "runs": [], "calibration": None})
    write_atomic(path_of("scan", name), (short.model_dump_json(indent=1) + "\n").encode())


def page() -> Iterator[str]:
    yield "# What each part of `auto` contributes\n"
    yield (
        "Made by `python benchmarks/ablation.py` from `benchmarks/records/ablation`: models repaired without one part "
        "of `auto`, with the true trigger in place of what was found, and with few images. The training alone, on all "
        "clean images, with none held out and no check. Percent, ACC / ASR / RA on other images, seed 0.\n\n"
        "Where the trigger is taken to be spread over the image, images are mixed in one row only. Cells on digits are "
        "by an earlier version, which remembered what patches do to images of the target itself. With many images on "
        "digits, what matters are the changes of the whole image, and that images that carry them are not mixed; the "
        "other rows differ by no more than chance.\n"
    )
    yield from table("Victims of the zoo, on digits of 8x8", DIGITS, list(VARIANTS))
    known = [case for case in PUBLISHED if _scores(ALL, case, "after")]
    yield from table("Published checkpoints, 500 images", known, TRIED)


def table(title: str, victims: list[str], variants: list[str]) -> Iterator[str]:
    """One row for each variant; the oracle gap is what all of it leaves, or loses, more than the true trigger does."""
    yield f"## {title}\n"
    yield f"| variant | {' | '.join(victims)} | mean |"
    yield f"|---|{'---|' * len(victims)}---|"
    found = {variant: [_scores(variant, victim, "after") for victim in victims] for variant in variants}
    for variant, scores in ({"none": [_scores(ALL, victim, "before") for victim in victims]} | found).items():
        if not any(scores):
            continue
        known = [each for each in scores if each]
        mean = triple(known) if len(known) == len(victims) else ""
        yield f"| {variant} | {' | '.join(one(each) if each else '' for each in scores)} | {mean} |"
    pairs = zip(found[ALL], found[ORACLE], strict=True)
    gaps = [each and true and {key: each[key] - true[key] for key in each} for each, true in pairs]
    known = [gap for gap in gaps if gap]
    mean = triple(known) if len(known) == len(victims) else ""
    yield f"| oracle gap | {' | '.join(one(gap) if gap else '' for gap in gaps)} | {mean} |\n"


def _scores(variant: str, victim: str, when: str) -> dict[str, float] | None:
    path = path_of(variant, victim)
    return json.loads(path.read_text())[when] if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--victims", nargs="+", default=[*DIGITS, *PUBLISHED], choices=[*DIGITS, *PUBLISHED])
    parser.add_argument("--jobs", type=int, default=1)
    asked = parser.parse_args()
    RECORDS.mkdir(parents=True, exist_ok=True)
    digits = [each for each in DIGITS if each in asked.victims]
    failed = side_by_side(look, [each for each in digits if not path_of("scan", each).exists()], asked.jobs)
    cells = [(variant, victim) for victim in asked.victims for variant in PUBLISHED.get(victim, VARIANTS)]
    failed += side_by_side(run, [each for each in cells if not path_of(*each).exists()], asked.jobs)
    write_atomic(PAGE, ("\n".join(page()) + "\n").encode())
    if failed:
        raise SystemExit(f"{failed} cells failed")


if __name__ == "__main__":
    main()
