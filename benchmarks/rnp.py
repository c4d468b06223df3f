"""RNP on models that other people trained and poisoned: what it names, what it removes, what it costs.

Every cell (checkpoint x variant x seed) is one JSON under `benchmarks/records/rnp`; cells that are there are not run
again. The defense gets the checkpoint and 500 clean training images. Only afterwards, in this script, the known
trigger measures the result and every other point of the same pruning order, so that the choice made without it
(*chosen*) can be set beside the choice made with it (*oracle*).

    python benchmarks/rnp.py             # run what is missing, then write benchmarks/rnp.md
    python benchmarks/rnp.py --seeds 0   # fewer
"""

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SHARED, Case, measure, percents, test_set, triple

import untrojan
from untrojan.mask import Mask
from untrojan.sources.files import Checkpoint
from untrojan.writing import write_atomic

RECORDS = Path("benchmarks/records/rnp")
SAMPLES = 500
BUDGET = 0.02
VARIANTS = {"fixed": untrojan.RNP(), "released": untrojan.RNP(variant="released", select="threshold", threshold=0.2)}


def run_cell(case: Case, variant: str, seed: int) -> dict[str, Any]:
    """Repair one checkpoint with clean images alone, then measure the result with the known trigger."""
    source = Checkpoint.read(SHARED / "checkpoints" / case.file)
    model = untrojan.load(source, case.net)
    clean = untrojan.CleanSet.load(SHARED / "data" / case.train, samples=SAMPLES, seed=seed)
    repair = VARIANTS[variant].repair(model, clean, seed=seed, source=source)

    test = test_set(case)
    layers = {f"{layer.name}.weight": torch.tensor(layer.values) for layer in repair.record.layers}
    scores = Mask(layers, "neuron")
    curve = repair.record.selection.curve if repair.record.selection else []
    counts = sorted({point.pruned for point in curve if point.drop <= 2 * BUDGET}) if variant == "fixed" else []
    record = json.loads(repair.record.to_json())
    del record["layers"]
    return {
        "record": record,
        "before": measure(model, test, case),
        "chosen": measure(repair.model, test, case),
        "thresholds": {str(each): measure(scores.threshold(each).bake(model), test, case) for each in (0.0, 0.2, 0.5)},
        "curve": [{"pruned": each} | measure(scores.count(each).bake(model), test, case) for each in counts],
    }


def oracle(cell: dict[str, Any]) -> dict[str, float]:
    """The lowest ASR on the same pruning order that stays within the budget on test images: needs the trigger."""
    floor = cell["before"]["acc"] - BUDGET
    return min([cell["before"], *(p for p in cell["curve"] if p["acc"] >= floor)], key=lambda point: point["asr"])


def table(cells: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Write all cells as Markdown, means over seeds."""
    seeds = sorted({seed for _, _, seed in cells})
    lines = [
        "# RNP on published checkpoints",
        "",
        f"Made by `python benchmarks/rnp.py` from the records beside it: {SAMPLES} clean training images, seeds "
        f"{', '.join(map(str, seeds))}, default settings for every checkpoint. Percent, ACC/ASR/RA, means over seeds.",
        "",
        "## The choice made without the trigger, and with it",
        "",
        "*label* counts the seeds on which the surviving class is the true target; *chosen* is what `repair` delivers; "
        "*oracle* is the lowest ASR on the same pruning order within the same budget, chosen with the trigger and the "
        "test images in sight.",
        "",
        "| checkpoint | before | label | status | pruned | chosen | oracle |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        group = [cells[name, "fixed", seed] for seed in seeds if (name, "fixed", seed) in cells]
        if group:
            lines.append(fixed_row(name, case, group))
    lines += [
        "",
        '## `variant="released"` beside the published code',
        "",
        "The reference columns are one run of the authors' own code (one seed, other images), so that only the kind of "
        "result can agree.",
        "",
        "| checkpoint | label | t = 0.2 | reference | t = 0.5 | reference |",
        "|---|---|---|---|---|---|",
    ]
    for name, case in CASES.items():
        group = [cells[name, "released", seed] for seed in seeds if (name, "released", seed) in cells]
        if group:
            lines.append(released_row(name, case, group))
    return "\n".join(lines) + "\n"


def fixed_row(name: str, case: Case, group: list[dict[str, Any]]) -> str:
    """One checkpoint under the default settings."""
    statuses = [cell["record"]["status"] for cell in group]
    status = ", ".join(f"{statuses.count(each)} {each.replace('_', ' ')}" for each in sorted(set(statuses)))
    pruned = ", ".join(str(cell["record"]["units_changed"]) for cell in group)
    cells = [triple([cell[key] for cell in group]) for key in ("before", "chosen")]
    best = triple([oracle(cell) for cell in group])
    return f"| {name} | {cells[0]} | {named(case, group)} | {status} | {pruned} | {cells[1]} | {best} |"


def released_row(name: str, case: Case, group: list[dict[str, Any]]) -> str:
    """One checkpoint under the published settings."""
    columns = []
    for threshold in ("0.2", "0.5"):
        reference = percents(case.reference[f"rnp t={threshold}"])
        columns += [triple([cell["thresholds"][threshold] for cell in group]), reference]
    return f"| {name} | {named(case, group)} | {' | '.join(columns)} |"


def named(case: Case, group: list[dict[str, Any]]) -> str:
    """On how many seeds the target was named."""
    right = sum(cell["record"]["diagnosis"]["targets"][0]["label"] == case.target for cell in group)
    return f"{right} of {len(group)}"


def main() -> None:
    """Run missing cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", untrojan.UntrojanWarning)
    for name in arguments.cases:
        for seed in arguments.seeds:
            for variant in VARIANTS:
                path = RECORDS / f"{name}-{variant}-{seed}.json"
                if not path.exists():
                    cell = run_cell(CASES[name], variant, seed)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomic(path, (json.dumps(cell, indent=1) + "\n").encode())
                    print(path, cell["record"]["status"], cell["before"], cell["chosen"], flush=True)
    cells = {}
    for path in sorted(RECORDS.glob("*.json")):
        name, variant, seed = path.stem.rsplit("-", 2)
        cells[name, variant, int(seed)] = json.loads(path.read_text())
    write_atomic(Path("benchmarks/rnp.md"), table(cells).encode())


if __name__ == "__main__":
    main()
