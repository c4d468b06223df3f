"""How much less time a pass takes with `model.faster` and `model.folded`, as ratios measured in one run.

What a network runs in depends on the processor, so there is a record for each: bfloat16 where that is multiplied
natively, float32 elsewhere.

    python benchmarks/faster.py      # on an otherwise idle machine; writes benchmarks/records/faster and faster.md
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SHARED
from torch import Tensor, nn

import untrojan
from untrojan.model import faster, folded, multiplies_bfloat16
from untrojan.run import environment
from untrojan.writing import write_atomic

RECORDS = Path("benchmarks/records/faster")
PAGE = Path("benchmarks/faster.md")
NETS = {"small-vgg": "cifar10-badnets", "wrn-16-1": "cifar10-grid"}
BATCH = 128
TURNS = 7


def passes(net: nn.Module, images: Tensor) -> dict[str, Callable[[], None]]:
    """What is timed, by name; backward to the weights where they are to be learned."""

    def forward() -> None:
        with torch.no_grad():
            net(images)

    def to_images() -> None:
        given = images.clone().requires_grad_()
        torch.autograd.grad(net(given).sum(), given)

    def to_weights() -> None:
        torch.autograd.grad(net(images).sum(), weights)

    weights = [each for each in net.parameters() if each.requires_grad]
    both = {"forward": forward, "and back to the images": to_images}
    return both | {"and back to the weights": to_weights} if weights else both


def measure(case: str) -> dict[str, dict[str, float]]:
    """The shortest time of each pass, in seconds, by version of the network; versions take turns."""
    known = CASES[case]
    model = untrojan.load(SHARED / "checkpoints" / known.file, known.net).eval()
    clean = untrojan.CleanSet.load(SHARED / "data" / known.train, samples=BATCH, seed=0)
    versions = {"as it is": model, "faster": faster(model, clean), "folded": folded(model, clean)}
    jobs = {name: passes(net, clean.floats()) for name, net in versions.items()}
    best = {name: dict.fromkeys(each, float("inf")) for name, each in jobs.items()}
    for _ in range(TURNS):
        for name, each in jobs.items():
            for what, run in each.items():
                start = time.perf_counter()
                run()
                best[name][what] = min(best[name][what], time.perf_counter() - start)
    return best


def page(records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The records as Markdown."""
    yield "# What running a network faster saves"
    yield ""
    yield (
        f"Made by `python benchmarks/faster.py`: {BATCH} images of 32x32, the shortest of {TURNS} passes in turns. "
        "Times are shares of what the same pass takes in the network as it is, in the same run."
    )
    for kind, record in records.items():
        yield f"\n## In {kind}, {record['environment']['threads']} threads\n"
        yield "| network | pass | as it is | faster | folded |"
        yield "|---|---|---|---|---|"
        for net, times in record["seconds"].items():
            for what, plain in times["as it is"].items():
                others = [times[name].get(what) for name in ("faster", "folded")]
                shown = ["" if each is None else f"{each / plain:.2f}" for each in others]
                yield f"| {net} | {what} | {plain:.2f} s | {' | '.join(shown)} |"


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
