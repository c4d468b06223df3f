"""The default scan on models that are known: published backdoored ones, and those of `population.py`.

Every cell (model x number of clean images x seed) is one JSON under `benchmarks/records/scan`, made on one thread;
those that are there are not run again. Clean models calibrate the scan: with `--calibrate` how far triggers reached in
each of them is written into the package. With `--alone` two scans run one after the other on two threads, which tells
the time that a scan takes on a quiet machine.

    python benchmarks/scan.py --jobs 2        # run what is missing, then write benchmarks/scan.md
    python benchmarks/scan.py --calibrate     # the same, and src/untrojan/scanners/clean_models.json
    python benchmarks/scan.py --alone         # the scans that are timed, and nothing else
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from cases import CASES, SHARED, percent
from pool import side_by_side
from population import MEMBERS, images_of
from torch import nn

import untrojan
from untrojan.data import CleanSet
from untrojan.device import chosen
from untrojan.record import Comparison, Diagnosis, Rate
from untrojan.run import forget_peak_memory
from untrojan.scanners.reach import BOTH, how_far
from untrojan.sources.files import Checkpoint
from untrojan.writing import write_atomic

RECORDS = Path("benchmarks/records/scan")
CALIBRATION = Path("src/untrojan/scanners/clean_models.json")
REPAIRED = "nad-cifar10-finetuned"
IMAGES = 500
FEW = 50
ALONE = "cifar10-badnets", "gtsrb-badnets"


class Cell(NamedTuple):
    """One scan."""

    model: str
    images: int
    seed: int
    threads: int = 1

    @property
    def path(self) -> Path:
        """Where its record is."""
        folder = RECORDS if self.threads == 1 else RECORDS / "alone"
        return folder / f"{self.model}-{self.images}-{self.seed}.json"

    @property
    def target(self) -> int | None:
        """The label that the scan should find, if there is a backdoor."""
        if self.model in CASES:
            return CASES[self.model].target
        member = MEMBERS.get(self.model)
        return member.target if member and member.attack else None


def cells() -> list[Cell]:
    """All of them, what matters most first."""
    asr = {name: member.record()["asr"] for name, member in MEMBERS.items() if member.is_trained}
    took = [name for name, share in asr.items() if share is None or share >= 0.9]
    seeds = [Cell(case, images, seed) for seed in range(5) for images in (IMAGES, FEW) for case in CASES]
    return [*seeds[: len(CASES)], *(Cell(name, IMAGES, 0) for name in (REPAIRED, *took)), *seeds[len(CASES) :]]


def alone() -> list[Cell]:
    """Those that are timed."""
    return [Cell(case, IMAGES, 0, threads=2) for case in ALONE]


def inputs(cell: Cell) -> tuple[nn.Module, CleanSet]:
    """The model and the clean images of a cell."""
    if cell.model in MEMBERS:
        member = MEMBERS[cell.model]
        _, test = images_of(member.data)
        return member.network(), test.split(cell.images / len(test), cell.seed)[1]
    checkpoint, net, train = REPAIRED + ".tar", "wrn-16-1:classes=10", "cifar10/train-lossless.parquet"
    if cell.model in CASES:
        checkpoint, net, train = CASES[cell.model].file, CASES[cell.model].net, CASES[cell.model].train
    model = untrojan.load(Checkpoint.read(SHARED / "checkpoints" / checkpoint), net).to(chosen())
    return model, CleanSet.load(SHARED / "data" / train, samples=cell.images, seed=cell.seed)


def run(cell: Cell) -> None:
    """Scan one model."""
    forget_peak_memory()
    model, clean = inputs(cell)
    start = time.perf_counter()
    record = untrojan.scan(model, clean, seed=cell.seed)
    seconds = time.perf_counter() - start
    long = {"triggers": {"__all__": {"picture", "examples"}}, "runs": {"__all__": {"trace"}}}
    diagnosis = record.diagnosis.model_dump(exclude={**long, "calibration": True})
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        **cell._asdict(),
        "target": cell.target,
        "diagnosis": diagnosis,
        "method": record.method.model_dump(),
        "stages": record.seconds,
        "seconds": seconds,
        "peak_memory_bytes": record.peak_memory_bytes,
        "environment": record.environment,
    }
    write_atomic(cell.path, (json.dumps(content, indent=1) + "\n").encode())
    print(*cell, "true", cell.target, record.diagnosis.verdict, record.diagnosis.found, f"{seconds:.0f} s")


def furthest(result: dict[str, Any]) -> float:
    """How far triggers reach into the label that they reach furthest into."""
    return max(reach["far"] for reach in result["diagnosis"]["reaches"])


def recorded() -> list[dict[str, Any]]:
    """All records; how far triggers reach in older ones is told as it is now."""
    results = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    for result in results:
        diagnosis = result["diagnosis"]
        faint = {reach["label"]: reach["faint"] for reach in diagnosis["reaches"]}
        compared = [Comparison(**each) for each in diagnosis.get("comparisons", [])]
        scores = {target["label"]: target["score"] for target in diagnosis["targets"]}
        result["survived"] = {each["label"]: scores[each["label"]] - each["far"] for each in diagnosis["reaches"]}
        for reach in diagnosis["reaches"]:
            reach["far"] = how_far(reach["label"], reach["shares"], faint, compared)
    return sorted(results, key=lambda result: (result["model"] not in CASES, result["model"], -result["images"]))


def page() -> Iterator[str]:
    """All records as Markdown."""
    results = recorded()
    clean = [result for result in results if result["target"] is None]
    bad = [result for result in results if result["target"] is not None]
    alarms = Rate.of(sum(result["diagnosis"]["verdict"] == "found" for result in clean), len(clean))
    yield "# The scan on models that are known\n"
    yield "Written by `benchmarks/scan.py` from `benchmarks/records/scan`; one thread per scan, two scans at a time, or"
    yield "where the record names a GPU (half of those with one image per class), on that, shared with other work."
    yield "Searches ran in bfloat16, and warps and recolorings were compared, for published models, the repaired one"
    yield "and clean ones on digits and GTSRB, the last wrn-16-1 left out; the repaired and the clean ones were"
    yield "searched for a target for every class, too. Others are older, and so are cifar10-badnets with 10 and 50"
    yield "images, seed 0. Published models on GTSRB with 500 images, seeds 1 to 4, and with 43 on seed 0, are older"
    yield "than the second search for the more promising half of many labels. Reaches are told as now,"
    yield "with warps, and perturbations by what they have over other labels; verdicts are those of the scans."
    yield "With 500 images most took the first 64 held-out ones, which lie in random order, where 64 are drawn now;"
    yield "badnets, l0_inv and trojan_sq on CIFAR-10, seed 0, are as now, on a processor without bfloat16. A target for"
    yield "every class was told by smaller patches, and by images instead of classes. Clean models on digits are by the"
    yield "present code, and so are four of zoo.md."
    yield "Seconds are those of a machine with other work on it.\n"
    yield "## Models without a backdoor\n"
    yield (
        f"Called `found`: {alarms.count} of {alarms.total} (95 % interval {100 * (alarms.low or 0):.0f} to "
        f"{100 * (alarms.high or 0):.0f} %).\n"
    )
    yield "| model | accuracy | verdict | reach | into label | survives, share | reach times share | seconds |"
    yield "|---|---|---|---|---|---|---|---|"
    for result in sorted(clean, key=furthest, reverse=True):
        ends = [(run["label"], run["share"]) for run in result["diagnosis"]["runs"]]
        label = statistics.mode(label for label, _ in ends)
        share = statistics.mean(share for each, share in ends if each == label)
        survives = f"{label} in {sum(each == label for each, _ in ends)} of {len(ends)} runs, {100 * share:.0f} %"
        accuracy = percent(MEMBERS[result["model"]].record()["acc"]) if result["model"] in MEMBERS else ""
        first = max(result["diagnosis"]["reaches"], key=lambda reach: reach["far"])
        shown = [result["model"], accuracy, result["diagnosis"]["verdict"], f"{first['far']:.2f}", str(first["label"])]
        yield f"| {' | '.join(shown)} | {survives} | {together(result):.2f} | {result['seconds']:.0f} |"
    yield "\nA reach of 1 or more is called `found`, unless more than half of the labels have it. Reach times share, of"
    yield f"the label for which they add up to most, is inconclusive from {BOTH:g} on; scans of photographs had another"
    yield "rule for that. These models, but on digits others like them, were in view when the limits were set.\n"
    yield "## Models with a backdoor\n"
    yield "Reach: the least into the target, the greatest into another label, over seeds. Trigger: of the first seed.\n"
    columns = ["model", "images", "scans", "found", "label right", "reach", "others", "trigger", "success", "seconds"]
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for name, images in dict.fromkeys((result["model"], result["images"]) for result in bad):
        yield backdoored([result for result in bad if (result["model"], result["images"]) == (name, images)])
    yield "\n## Time on two threads, with nothing beside it\n"
    for cell in alone():
        if cell.path.exists():
            result = json.loads(cell.path.read_text())
            stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result["stages"].items())
            yield f"* {cell.model}, {cell.images} images: {result['seconds']:.0f} s ({stages})"


def backdoored(results: list[dict[str, Any]]) -> str:
    """The scans of one model as a row; what was recovered is that of the first seed."""
    first = results[0]
    diagnoses = [Diagnosis.model_validate(complete(result["diagnosis"])) for result in results]
    target = first["target"]
    reach = [each.far for d in diagnoses for each in d.reaches if each.label == target]
    others = [each.far for d in diagnoses for each in d.reaches if each.label != target]
    right = sum(diagnosis.targets[0].label == target for diagnosis in diagnoses)
    triggers = [trigger for trigger in diagnoses[0].triggers if trigger.label == target]
    what, success = (triggers[0].what, f"{percent(triggers[0].success.value)} %") if triggers else ("", "")
    found = sum(diagnosis.verdict == "found" for diagnosis in diagnoses)
    return (
        f"| {first['model']} | {first['images']} | {len(results)} | {found} | {right} | {min(reach):.2f} | "
        f"{max(others):.2f} | {what} | {success} | {statistics.median(r['seconds'] for r in results):.0f} |"
    )


def together(result: dict[str, Any]) -> float:
    """How far the most suspicious label is reached times its share of the predictions after unlearning."""
    survived = result["survived"]
    first = max(result["diagnosis"]["reaches"], key=lambda reach: reach["far"] + survived[reach["label"]])
    return first["far"] * survived[first["label"]]


def complete(diagnosis: dict[str, Any]) -> dict[str, Any]:
    """A diagnosis with empty fields in place of those that the records leave out, without what older ones have."""
    kept = [{name: value for name, value in each.items() if name != "places"} for each in diagnosis["triggers"]]
    triggers = [{**trigger, "picture": "", "examples": ""} for trigger in kept]
    return diagnosis | {"triggers": triggers, "runs": [{**each, "trace": []} for each in diagnosis["runs"]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--only", nargs="*", default=[""], help="beginnings of the names of the models to scan")
    parser.add_argument("--calibrate", action="store_true")
    parser.add_argument("--alone", action="store_true")
    given = parser.parse_args()
    wanted = alone() if given.alone else [cell for cell in cells() if cell.model.startswith(tuple(given.only))]
    missing = [cell for cell in wanted if not cell.path.exists()]
    failed = side_by_side(run, missing, given.jobs, threads=2 if given.alone else 1)
    write_atomic(Path("benchmarks/scan.md"), ("\n".join(page()) + "\n").encode())
    if failed:
        raise SystemExit(f"{failed} cells failed")
    if given.calibrate:
        scores = [furthest(result) for result in recorded() if result["target"] is None]
        write_atomic(CALIBRATION, (json.dumps([round(score, 4) for score in sorted(scores)]) + "\n").encode())


if __name__ == "__main__":
    main()
