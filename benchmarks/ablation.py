"""What each part of `auto` contributes: small victims of the zoo, repaired with parts of it taken away, one at a time.

One row is the oracle: the same training, shown the true trigger instead of what was found. The last rows have one
image per class. Needs the victims of `zoo.py`. Every cell (variant x victim) is one JSON under
`benchmarks/records/ablation`; cells that are there are not run again.

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
from typing import Any
from unittest import mock

import torch
from cases import one, percents, triple
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
VICTIMS = ["badnets", "l0-inv", "masked", "blend", "dfst", "low-frequency"]
TARGET = 7
FEW = "one image per class"

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
    "all of it": lambda _: ({}, {}),
    "one round, as many updates": lambda _: ({}, {"rounds": 1, "steps": 384}),
    "any patches found, not the surest": lambda _: ({"pinpoint": _any_patches}, {}),
    "patches and faint perturbations alone": lambda _: (
        {"_Triggers.weigh": functools.partialmethod(_weigh, spread=False)},
        {},
    ),
    "changes of the whole image, always": lambda _: (
        {"_Triggers.weigh": functools.partialmethod(_weigh, spread=True)},
        {},
    ),
    "no other images or noise laid over": lambda _: ({"_distracted": _as_they_are}, {}),
    "no images mixed": lambda _: ({"mixed": _as_they_are}, {}),
    "images mixed, always": lambda _: ({"mixed": _as_they_are, "shifted": _shifted_and(views.mixed)}, {}),
    "no average of the weights": lambda _: ({"DECAY": 0.0}, {}),
    "the true trigger (oracle)": lambda attack: (_known(attack), {}),
    FEW: lambda _: ({}, {}),
    f"{FEW}, none varied": lambda _: ({"varied": _as_they_are}, {}),
    f"{FEW}, no other images or noise laid over": lambda _: ({"_distracted": _as_they_are}, {}),
    f"{FEW}, all varied": lambda _: ({"varied": _as_they_are, "shifted": _shifted_and(views.varied)}, {}),
}


def path_of(variant: str, victim: str) -> Path:
    name = "".join(letter if letter.isalpha() else "-" for letter in variant)
    return RECORDS / f"{name}-{victim}.json"


def run(cell: tuple[str, str]) -> None:
    """Repair one victim with one variant and measure it with its trigger."""
    variant, name = cell
    victim = zoo.load(f"digits/digits-cnn/{name}/0", ROOT)
    assert victim.attack is not None
    draw = {"samples_per_class": 1} if variant.startswith(FEW) else {}
    clean, judge = CleanSet.load(IMAGES / "digits-clean.npz", **draw), CleanSet.load(IMAGES / "digits-judge.npz")
    diagnosis = Diagnosis.model_validate_json(path_of("scan", name).read_text())
    parts, fields = VARIANTS[variant](victim.attack)
    start = time.perf_counter()
    with ExitStack() as stack, seeded(0):
        for part, instead in parts.items():
            stack.enter_context(mock.patch(f"untrojan.defenses.auto.{part}", instead))
        repaired = auto.Auto(**fields).tune(copy.deepcopy(victim.model), clean, clean, diagnosis, 0)
    result = {"variant": variant, "victim": name, "seconds": time.perf_counter() - start}
    for when, model in (("before", victim.model), ("after", repaired)):
        scores = evaluate(model, judge, victim.attack, TARGET)
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
        "Made by `python benchmarks/ablation.py` from `benchmarks/records/ablation`: victims of the zoo on digits of "
        "8x8, repaired without one part of `auto`, with the true trigger in place of what was found, and with few "
        "images. Percent, ACC / ASR / RA on held-out digits, seed 0.\n\n"
        "Where the trigger is taken to be spread over the image, images are mixed in one row only.\n"
    )
    yield f"| variant | {' | '.join(VICTIMS)} | mean |"
    yield f"|---|{'---|' * len(VICTIMS)}---|"
    for variant in ("none", *VARIANTS):
        wanted = [path_of("all of it" if variant == "none" else variant, victim) for victim in VICTIMS]
        results = [json.loads(path.read_text()) if path.exists() else None for path in wanted]
        scores = [each and each["before" if variant == "none" else "after"] for each in results]
        shown = [one(each) if each else "" for each in scores]
        yield f"| {variant} | {' | '.join(shown)} | {triple([each for each in scores if each])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    jobs = parser.parse_args().jobs
    RECORDS.mkdir(parents=True, exist_ok=True)
    failed = side_by_side(look, [each for each in VICTIMS if not path_of("scan", each).exists()], jobs)
    cells = [(variant, victim) for variant in VARIANTS for victim in VICTIMS]
    failed += side_by_side(run, [each for each in cells if not path_of(*each).exists()], jobs)
    write_atomic(PAGE, ("\n".join(page()) + "\n").encode())
    if failed:
        raise SystemExit(f"{failed} cells failed")


if __name__ == "__main__":
    main()
