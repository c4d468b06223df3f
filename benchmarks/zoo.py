"""The zoo of `zoo.toml` and the three files beside it: its images, and the page about what came of it.

Weights go to `runs/zoo`, which is not committed; the records go to `benchmarks/records/zoo`.

    python benchmarks/zoo.py images                              # write images and triggers to runs/zoo-images
    untrojan lab zoo benchmarks/zoo.toml --out runs/zoo          # train what is missing; the other files alike
    python benchmarks/zoo.py records                             # keep the records of what is there
    python benchmarks/zoo.py page                                # write zoo.md from them
    python benchmarks/zoo.py grid                                # write runs/zoo.toml: auto on every victim
    untrojan bench run runs/zoo.toml --out runs/zoo-cells        # run what is missing of it
    python benchmarks/zoo.py cells                               # keep its records; `page` writes them too
"""

import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import percent, percents
from PIL import Image
from population import images_of
from torch.nn import functional

from untrojan.data import CleanSet
from untrojan.defenses.auto import Auto
from untrojan.lab.attack import Attack
from untrojan.lab.recipe import ATTACK, MODEL, VictimRecord
from untrojan.lab.zoo import CLEAN, MANIFEST, Manifest, Member, Zoo, manifest
from untrojan.registry import describe, discover
from untrojan.writing import RECORD, write_atomic

ZOOS = [Path(f"benchmarks/{name}.toml") for name in ("zoo", "zoo-photographs", "zoo-cifar10", "zoo-gtsrb")]
IMAGES = Path("runs/zoo-images")
ROOT = Path("runs/zoo")
RECORDS = Path("benchmarks/records/zoo")
PAGE = Path("benchmarks/zoo.md")
GRID = Path("runs/zoo.toml")
CELLS = Path("runs/zoo-cells")
COST = 0.03
FREQUENT = [1, 2, 4, 5, 7, 10, 12, 13, 25, 38]  # signs of which there are most training images
SIGNS = {"train": 400, "test": 100}  # images of each
JUDGED = 2000  # test images of CIFAR-10 and GTSRB
CLEANS = 500
MISSED = """
## What is missed, and what was tried for it

* sig on photographs and signs is not found. Waves of any frequency, direction and phase were searched: as high as the
  true one, that and another reach their label with all images, and one does in a clean model, too; lower ones tell
  no more. Nor do the probability that they reach, by how much less a wave of another direction reaches, how much of
  that wave the clean images of the label have, or the largest margin by which any image can be given a label
  (MM-BD): what tells these three victims from their clean models is found in labels of other networks as well. No
  perturbation of the whole image, smooth or not, reaches the target further than other labels, and unlearning does
  not leave the target on top. Given the label, `auto` removes it; only the scan fails.
* sig on digits of 32x32 has no digit 7 without a wave in its training images, and waves into other labels reach as far.
* label-consistent on digits of 8x8 puts nine pixels into each corner, more than half of the image. Patches as large
  as can be searched do not reach its target further than others.
* Some victims on digits, and input-aware on signs, are inconclusive: their label is named and the attack removed, but
  no repair is called repaired then.
* On CIFAR-10, accuracy is lost on triggers that are spread over the image. Clean images that count twice or
  half of the carriers from the target class win back less than a point, for more of the attack; nothing laid
  over, a higher logit of the target, part of the way back to the original weights, and longer averages of the
  weights win nothing, or as little."""


def write_images() -> None:
    write_triggers()
    for name, images in zip(("train", "test"), images_of("digits"), strict=True):
        _write_set(f"digits-{name}", images)
        larger = functional.interpolate(images.images.float(), size=(32, 32), mode="bilinear")
        _write_set(f"digits-32-{name}", CleanSet(larger.round().to(torch.uint8), images.labels))
    for (name, each), images in zip(SIGNS.items(), images_of("gtsrb"), strict=True):
        _write_set(f"signs-{name}", signs(images, each))
    for name in ("cifar10", "gtsrb"):
        train, test = images_of(name)
        _write_set(f"{name}-train", train)
        _write_set(f"{name}-test", CleanSet.of((test.images, test.labels), samples=JUDGED + CLEANS, seed=0))
    few = CLEANS / (JUDGED + CLEANS)
    for data, share in {"digits": 0.5, "digits-32": 0.5, "signs": 0.5, "cifar10": few, "gtsrb": few}.items():
        judge, clean = CleanSet.load(IMAGES / f"{data}-test.npz").split(share, seed=0)
        _write_set(f"{data}-clean", clean)
        _write_set(f"{data}-judge", judge)


def write_triggers() -> None:
    """Write the triggers that are not there; no zoo file that names them can be read without."""
    IMAGES.mkdir(parents=True, exist_ok=True)
    cross = np.maximum(np.eye(8), np.eye(8)[::-1]) * 100
    corner, mask = np.zeros((8, 8)), np.zeros((8, 8))
    corner[7, 5:], mask[7, 5:] = (255, 0, 255), 255
    for name, values in {"cross": cross, "corner": corner, "corner-mask": mask}.items():
        if not (IMAGES / f"{name}.png").exists():
            Image.fromarray(values.astype(np.uint8)).save(IMAGES / f"{name}.png")


def signs(images: CleanSet, each: int) -> CleanSet:
    """Draw so many images of each of ten traffic signs of GTSRB, numbered anew."""
    places, labels = (images.labels[:, None] == torch.tensor(FREQUENT)).nonzero().unbind(1)
    return CleanSet.of((images.images[places], labels), samples_per_class=each)


def _write_set(name: str, images: CleanSet) -> None:
    np.savez(IMAGES / f"{name}.npz", images=images.images.numpy(), labels=images.labels.numpy())


def keep_records() -> None:
    told = manifest(ROOT).victims
    if not told:
        raise SystemExit(f"there is nothing in {ROOT}; train the zoo first")
    for name in told:
        path = RECORDS / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, (ROOT / name / RECORD).read_bytes())
    kept = Manifest.load(RECORDS / MANIFEST).victims if (RECORDS / MANIFEST).exists() else {}
    write_atomic(RECORDS / MANIFEST, Manifest(victims=dict(sorted({**kept, **told}.items()))).to_json().encode())


def members() -> list[Member]:
    write_triggers()
    return [member for file in ZOOS for member in Zoo.load(file).members()]


def write_grid() -> None:
    """Ask for `auto` on every victim and clean model; part of the test images are its clean ones, others judge it."""
    lines = ['defenses = ["auto"]', ""]
    for member in members():
        record = _record(member)
        if record is None or record.status == "attack_did_not_take":
            continue
        images = member.data.train.removesuffix("-train.npz")
        lines += [f'[models."{member.name}"]', f'file = "{ROOT / member.name / MODEL}"', f'net = "{record.net}"']
        lines += [f'clean = "{images}-clean.npz"', f'test = "{images}-judge.npz"']
        if member.planted:
            target = json.dumps(member.planted.target)
            lines += [f'attack = "{_attack(member, record)}"', f"target = {target}"]
        lines.append("")
    write_atomic(GRID, "\n".join(lines).encode())


def _attack(member: Member, record: VictimRecord) -> str:
    assert member.planted
    spec = member.planted.attack
    if record.attack_sha256 is None:
        return spec
    return f"{spec}{',' if ':' in spec else ':'}weights={ROOT / member.name / ATTACK}"


def keep_cells() -> None:
    """Keep the records of cells; older ones of the same models go."""
    kept = RECORDS.parent / "zoo-auto"
    kept.mkdir(parents=True, exist_ok=True)
    made = {path: json.loads(path.read_text())["model"] for path in sorted(CELLS.glob("cells/*/*.json"))}
    for path in kept.glob("*.json"):
        if json.loads(path.read_text())["model"] in made.values():
            path.unlink()
    for path in made:
        write_atomic(kept / path.name, path.read_bytes())


def write_page() -> None:
    write_atomic(PAGE, ("\n".join([*page(), *repaired()]) + "\n").encode())


def repaired() -> Iterator[str]:
    """What `auto` made of the victims and of the clean models."""
    rows = {cell["model"]: cell for cell in _cells()}
    yield "\n## `auto` on these models\n"
    yield f"Half of the test images, or {CLEANS} of CIFAR-10 and GTSRB, were its clean images; others measured it; one"
    yield "seed. Those of cifar10, gtsrb and signs-convnext are by an earlier version: all-to-all was told by smaller"
    yield "patches, an inconclusive scan by another rule, varied views were asked about up to a hundred images, and"
    yield "what patches do to images of the target itself was remembered. That of low-frequency on CIFAR-10 is from"
    yield "before a repair after an inconclusive scan was called inconclusive, too.\n"
    yield "| model | scan | named | status | ACC, ASR, RA before | and after | seconds with scan |"
    yield "|---|---|---|---|---|---|---|"
    for name, cell in sorted(rows.items()):
        told = cell["outcome"]
        if told is None:
            yield f"| {name} | | | failed to run | | | |"
            continue
        older = "" if cell["inputs"]["method"]["fields"] == describe(Auto()) else " \\*"
        named = "" if told["suspect"] is None else str(told["suspect"])
        seconds = told["repair_seconds"] + told["scan_seconds"]
        yield (
            f"| {name}{older} | {told['verdict']} | {named} | {told['status']} | {_three(told['before'])} | "
            f"{_three(told['after'])} | {seconds:.0f} |"
        )
    told = _of_victims()
    named = [each for each in told if _is_named(each)]
    yield f"\n{_mean(told)} over all {len(told)} victims;"
    yield f"{_mean(named)} over the {len(named)} whose label is named."
    yield MISSED


def victims() -> list[dict[str, dict[str, float]]]:
    """ACC, ASR and RA of each victim that was repaired, before and after."""
    return [
        {when: {key: told[when][key]["value"] for key in ("acc", "asr", "ra")} for when in ("before", "after")}
        for told in _of_victims()
    ]


def _cells() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in (RECORDS.parent / "zoo-auto").glob("*.json")]


def _of_victims() -> list[dict[str, Any]]:
    return [cell["outcome"] for cell in _cells() if cell["outcome"] and cell["outcome"]["before"]["asr"]]


def _is_named(told: dict[str, Any]) -> bool:
    target = told["before"]["target"]
    return told["verdict"] == "found" if target == "all-to-all" else told["suspect"] == target


def _mean(outcomes: list[dict[str, Any]]) -> str:
    lost = statistics.mean(each["before"]["acc"]["value"] - each["after"]["acc"]["value"] for each in outcomes)
    left = statistics.mean(each["after"]["asr"]["value"] for each in outcomes)
    return f"{percent(lost)} points of ACC are lost and {percent(left)} % ASR is left on average"


def _three(scores: dict[str, Any]) -> str:
    return percents(scores[key]["value"] for key in ("acc", "asr", "ra") if scores[key])


def page() -> Iterator[str]:
    known = {member.name: _record(member) for member in members()}
    planted = [member for member in members() if member.attack]
    good = [member for member in planted if _verdict(member, known) == "yes"]
    taken = {member.attack.name for member in good if member.attack}
    tried = {member.attack.name for member in planted if member.attack}
    missing = sorted(discover("untrojan.lab.attacks", Attack).keys() - tried)
    files = ", ".join(f"`{file.name}`" for file in ZOOS)
    yield "# A zoo of victims\n"
    yield f"Written by `benchmarks/zoo.py` from `{RECORDS}`; what was asked for is in {files}."
    yield "ACC and ASR on the test images, in percent; the clean model has the same data, net, recipe and seed."
    yield "An attack is good with an ASR from 90 % on (70 % if clean-label) and ACC within 3 points of the clean model."
    yield f"Good are {len(good)} of {len(planted)}, and {len(taken)} of {len(tried)} attacks somewhere.\n"
    yield from ([f"Not tried: {', '.join(missing)}.\n"] if missing else [])
    yield "| data | network | attack | target | rate | ACC, clean model | ACC | ASR | status | good | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|---|---|"
    yield from (_row(member, known) for member in planted)
    yield f"\nSettings that are not shown are the defaults; why some differ is said in {files}."
    yield "Seconds are those of all epochs and of measuring after each, on a core shared with other work."


def _record(member: Member) -> VictimRecord | None:
    path = RECORDS / f"{member.name}.json"
    return VictimRecord.load(path) if path.exists() else None


def _row(member: Member, known: dict[str, VictimRecord | None]) -> str:
    data, net, _, _ = member.name.split("/")
    record, control = known[member.name], known[_control(member)]
    assert member.planted
    start = [data, net, f"`{member.planted.attack}`"]
    if record is None or control is None:
        return f"| {' | '.join([*start, str(member.planted.target), '', '', '', '', 'not trained', 'no', ''])} |"
    told = record.recipe
    seconds = sum(epoch.seconds for epoch in record.epochs)
    measured = [percent(control.scores.acc.value), percent(record.scores.acc.value)]
    measured += [percent(record.scores.asr.value if record.scores.asr else None), record.status.replace("_", " ")]
    cells = [*start, str(told["target"]), f"{told['rate']:g}", *measured, _verdict(member, known), f"{seconds:.0f}"]
    return f"| {' | '.join(cells)} |"


def _verdict(member: Member, known: dict[str, VictimRecord | None]) -> str:
    record, control = known[member.name], known[_control(member)]
    if record is None or control is None or record.status != "backdoored":
        return "no"
    lost = (control.scores.acc.value or 0) - (record.scores.acc.value or 0)
    return "yes" if lost <= COST else f"no: {percent(lost)} points of ACC lost"


def _control(member: Member) -> str:
    data, net, _, seed = member.name.split("/")
    return f"{data}/{net}/{CLEAN}/{seed}"


def main() -> None:
    verbs = {
        "images": write_images,
        "records": keep_records,
        "page": write_page,
        "grid": write_grid,
        "cells": keep_cells,
    }
    if len(sys.argv) != 2 or sys.argv[1] not in verbs:
        raise SystemExit(__doc__)
    verbs[sys.argv[1]]()


if __name__ == "__main__":
    main()
