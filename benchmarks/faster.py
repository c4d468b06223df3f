"""How much less time a pass takes with `speed.faster`, `folded` and `lay_out`, as ratios measured in one run.

What a network runs in depends on the processor, so there is a record for each: bfloat16 where that is multiplied
natively, float32 elsewhere.

    python benchmarks/faster.py      # on an otherwise idle machine; writes benchmarks/records/faster and faster.md
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SHARED
from cost import KINDS, bare

import untrojan
from untrojan.run import environment
from untrojan.speed import faster, folded, lay_out, multiplies_bfloat16
from untrojan.writing import write_atomic

RECORDS = Path("benchmarks/records/faster")
PAGE = Path("benchmarks/faster.md")
NETS = {"small-vgg": "cifar10-badnets", "wrn-16-1": "cifar10-grid"}
SEARCHED = ("judge", "input")
BATCH = 128
TURNS = 7


def measure(case: str) -> dict[str, dict[str, float]]:
    """The shortest time of each kind of pass, in seconds, by version of the network; versions take turns."""
    known = CASES[case]
    model = untrojan.load(SHARED / "checkpoints" / known.file, known.net).eval()
    clean = untrojan.CleanSet.load(SHARED / "data" / known.train, samples=BATCH, seed=0)
    laid_out = copy.deepcopy(model)
    lay_out(laid_out, torch.channels_last)
    versions = {
        "as it is": model,
        "laid out": laid_out,
        "faster": faster(model, clean),
        "folded": folded(model, clean),
    }
    spent: dict[str, dict[str, float]] = {name: {} for name in versions}
    for _ in range(TURNS):
        for name, net in versions.items():
            for kind in SEARCHED if name == "folded" else (*SEARCHED, "weights"):
                took = bare(kind, net, clean.floats(), clean.labels, BATCH)
                spent[name][kind] = min(took, spent[name].get(kind, took))
    return spent


def page(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The records as Markdown."""
    yield "# What running a network faster saves"
    yield ""
    yield (
        f"Made by `python benchmarks/faster.py`: {BATCH} images of 32x32, the shortest of {TURNS} passes in turns. "
        "Times are shares of what the same pass takes in the network as it is, in the same run. Methods get a network "
        "that is laid out; a folded one is for searches, which leave the weights alone."
    )
    for precision, record in records.items():
        yield f"\n## In {precision}, {record['environment']['threads']} threads\n"
        yield "| network | pass | as it is | laid out | faster | folded |"
        yield "|---|---|---|---|---|---|"
        for net, times in record["seconds"].items():
            for kind, plain in times["as it is"].items():
                others = [times[name].get(kind) for name in ("laid out", "faster", "folded")]
                shown = ["" if each is None else f"{each / plain:.2f}" for each in others]
                yield f"| {net} | {KINDS[kind]} | {plain:.2f} s | {' | '.join(shown)} |"


def main() -> None:
    """Measure on this machine and write the page of all records."""
    times = {net: measure(case) for net, case in NETS.items()}
    record = {"seconds": times, "environment": environment()}
    path = RECORDS / f"{'bfloat16' if multiplies_bfloat16('cpu') else 'float32'}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())
    records = {path.stem: json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))}
    write_atomic(PAGE, ("\n".join(page(records)) + "\n").encode())


if __name__ == "__main__":
    main()
