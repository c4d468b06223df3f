"""What methods cost: images through the network counted against what their specifications need, and time against it.

F is one image through the network once; backward to activations is another F, and backward to weights a third. A hook
counts the images that really go through. Then the same passes are made in bare loops, without masks, projections,
optimizer or bookkeeping, in the same run on the same machine. Iterations are few, because passes repeat.

    python benchmarks/cost.py      # on an otherwise idle machine; writes benchmarks/records/cost.json and cost.md
"""

import argparse
import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cases import SHARED
from torch import Tensor, nn
from torch.nn import functional

import untrojan
from untrojan.model import tapped
from untrojan.record import Diagnosis, Record
from untrojan.run import environment
from untrojan.sources.architectures import SmallVGG
from untrojan.writing import write_atomic

RECORD = Path("benchmarks/records/cost.json")
MODEL = SHARED / "checkpoints" / "ibau-cifar10-badnets-t8.pth"
CLEAN = SHARED / "data" / "cifar10" / "train-lossless.parquet"
NET = "small-vgg:classes=10"
SAMPLES = 500
BATCH = 125
TURNS = 3
GIVEN = Diagnosis(verdict="inconclusive", rule="given", targets=[], runs=[])
F = {"judge": 1, "maps": 0.5, "input": 2, "scales": 2, "weights": 3, "twice": 18}
KINDS = {
    "judge": "forward",
    "maps": "backward from one of the layers, on average half of one from the end",
    "input": "forward, and backward to the images",
    "scales": "forward, and backward to the scales of BatchNorm",
    "weights": "forward, and backward to all weights",
    "twice": "forward, backward, and the products with second derivatives of the implicit gradient",
}


class Job(NamedTuple):
    """Something to measure, and the images that it has to put through the network, by kind of pass."""

    name: str
    run: Callable[[], object]
    needed: dict[str, int]


def jobs(model: nn.Module, clean: untrojan.CleanSet) -> list[Job]:
    """The methods whose passes are specified."""
    images = len(clean)
    released = untrojan.RNP(variant="released", select="threshold", threshold=0.2)
    awm, anp = untrojan.AWM(outer_rounds=1, hold_out=0), untrojan.ANP(iterations=20)
    fmp, ibau = untrojan.FMP(images=32), untrojan.IBAU(rounds=1, hold_out=0, variant="released")
    half = -(-images // awm.batch_size) * awm.inner_rounds * awm.batch_size
    widths = [module.out_channels for module in model.modules() if isinstance(module, nn.Conv2d)]
    maps = sum(width for width in widths if width >= fmp.p)
    first, steps = ibau.batch_size, images // ibau.batch_size
    return [
        *(
            Job(
                f"RNP, {method.variant}: unlearn and recover",
                partial(method.learn, model, clean, 0),
                {
                    "weights": images * len(method.learn(model, clean, 0).run.trace),
                    "scales": images * method.recover_epochs,
                },
            )
            for method in (untrojan.RNP(), released)
        ),
        Job(
            "AWM, one round",
            partial(awm.tune, copy.deepcopy(model), clean, clean, GIVEN, 0),
            {"judge": images, "input": half, "weights": 2 * half},
        ),
        Job(
            f"ANP, {anp.iterations} iterations",
            partial(anp.score, model, clean, 0),
            {"scales": 3 * anp.iterations * anp.batch_size},
        ),
        Job(
            f"FMP, ranking {maps} maps on {fmp.images} images",
            partial(fmp.rank, model, clean, 0),
            {"judge": fmp.images * (maps + 2), "maps": fmp.images * maps},
        ),
        Job(
            "I-BAU, one round",
            partial(ibau.tune, copy.deepcopy(model), clean, clean, GIVEN, 0),
            {"judge": images, "input": images, "weights": images, "twice": first * steps},
        ),
    ]


def measure(job: Job, model: nn.Module, batch: Tensor, labels: Tensor) -> dict[str, Any]:
    """Count and time a job and bare loops over the images that it needs, in turns; the shortest times count."""
    seen = 0

    def count(module: nn.Module, arguments: tuple[Any, ...], _: object) -> None:
        nonlocal seen
        seen += len(arguments[0]) if isinstance(module, SmallVGG) else 0

    spent, plain = [], []
    for _ in range(TURNS):
        handle = nn.modules.module.register_module_forward_hook(count)
        try:
            spent.append(seconds(job.run))
        finally:
            handle.remove()
        plain.append(sum(bare(kind, model, batch, labels, images) for kind, images in job.needed.items()))
    return {
        "job": job.name,
        "needed": job.needed,
        "images": seen // TURNS,
        "images_needed": sum(images for kind, images in job.needed.items() if kind != "maps"),
        "f": sum(F[kind] * images for kind, images in job.needed.items()),
        "seconds": min(spent),
        "bare_seconds": min(plain),
        "ratio": min(spent) / min(plain),
    }


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def bare(kind: str, model: nn.Module, batch: Tensor, labels: Tensor, images: int) -> float:
    """Seconds that so many images take in a plain loop of one kind of pass."""
    net = copy.deepcopy(model).requires_grad_(kind in ("weights", "twice")).train(kind in ("weights", "scales"))
    if kind == "scales":
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.requires_grad_(True)
    if kind == "maps":  # a fourth of forward and backward to the images
        images = images // 4
    pixels = batch.clone().requires_grad_(kind in ("input", "maps", "twice"))
    parameters = list(net.parameters())

    def once() -> None:
        if kind == "judge":
            with torch.no_grad():
                net(pixels)
            return
        loss = functional.cross_entropy(net(pixels), labels)
        if kind != "twice":
            loss.backward()
            return
        (slope,) = torch.autograd.grad(loss, pixels, create_graph=True)
        carried = torch.ones_like(slope)
        for _ in range(4):
            (carried,) = torch.autograd.grad(slope, pixels, carried, retain_graph=True)
        torch.autograd.grad(slope, parameters, carried, allow_unused=True)

    rounds = max(1, round(images / len(batch)))
    return seconds(lambda: [once() for _ in range(rounds)]) * images / (rounds * len(batch))


def one_map_at_a_time(model: nn.Module, clean: untrojan.CleanSet, every: int = 16) -> tuple[float, float]:
    """Seconds of FMP's ranking, and of the published loop: per map two passes, one backward pass and one for scores.

    The loop ranks every 16th map, and its time is scaled up. It takes gradients to all weights, as published.
    """
    method = untrojan.FMP(images=32)
    images, labels = next(clean.batches(32))
    net = copy.deepcopy(model).eval().requires_grad_(True)
    layers = {name: module for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    maps = [(name, channel) for name, layer in layers.items() for channel in range(layer.out_channels)]

    def rank_one(name: str, channel: int) -> None:
        start = (images + method.alpha * torch.rand_like(images)).clamp(0, 1).requires_grad_()
        with tapped(net, [name]) as taps:
            net(images)
            net(start)
        seen = taps[name]
        (seen[1][:, channel] - seen[0][:, channel]).square().mean().backward()
        assert start.grad is not None
        made = (start.detach() + method.eps * start.grad.sign()).clamp(0, 1)
        (net(made).argmax(1) == labels).float().mean()

    slow = seconds(lambda: [rank_one(*each) for each in maps[::every]]) * len(maps) / len(maps[::every])
    return seconds(lambda: method.rank(model, clean, 0)), slow


def memory(seed: int) -> int:
    """Peak resident bytes of the command line on 500 images, in a process of its own."""
    command = ["-m", "untrojan", "repair", MODEL, "--net", NET, "--clean", CLEAN, "--samples", SAMPLES, "--seed", seed]
    folder = Path("runs/cost")
    arguments = [sys.executable, *map(str, command), "--out", str(folder), "--method", "rnp", "--force", "--quiet"]
    subprocess.run(arguments, check=False, stdout=subprocess.DEVNULL)
    return Record.load(folder / "record.json").peak_memory_bytes


def page(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    threads = result["environment"]["threads"]
    lines = [
        "# What methods cost",
        "",
        f"Made by `python benchmarks/cost.py`: {NET}, {SAMPLES} images of 32x32, {threads} threads. Each job and bare "
        f"loops over as many images ran {TURNS} times in turns; the shortest times count.",
        "",
        "| job | images through the network | needed | F | seconds | bare loops | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["jobs"]:
        times = f"{row['seconds']:.1f} | {row['bare_seconds']:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['job']} | {row['images']:,} | {row['images_needed']:,} | {row['f']:,.0f} | {times} |")
    fast, slow = result["fmp_seconds"], result["fmp_one_at_a_time_seconds"]
    peaks = ", ".join(f"{peak / 1e6:,.0f}" for peak in result["peak_memory_bytes"])
    lines += [
        "",
        "Kinds of passes, in F per image: "
        + "; ".join(f"{F[kind]:g} for {text}" for kind, text in KINDS.items())
        + ".",
        "A whole repair adds the scan, masks from either half of the images, the pruning curve, and the checks.",
        "",
        f"Ranking feature maps takes {fast:.1f} s, one map at a time as published {slow:.1f} s: "
        f"{slow / fast:.1f} times as long.",
        "",
        f"Peak resident memory of `untrojan repair --method rnp` on these images, seeds 0 to 2, in MB: {peaks}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the record and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", help="measure only jobs that begin so, or `memory`; keep the other numbers"
    )
    only = parser.parse_args().only
    torch.set_flush_denormal(True)  # as the command line does, before torch starts its threads
    warnings.simplefilter("ignore", untrojan.UntrojanWarning)
    result: dict[str, Any] = json.loads(RECORD.read_text()) if only else {"environment": environment(), "jobs": []}
    model = untrojan.load(MODEL, NET)
    clean = untrojan.CleanSet.load(CLEAN, samples=SAMPLES, seed=0)
    batch, labels = next(clean.batches(BATCH))
    asked = [job for job in jobs(model, clean) if not only or job.name.startswith(tuple(only))]
    kept = [row for row in result["jobs"] if not row["job"].startswith(tuple(only or ()))]
    result["jobs"] = [*kept, *(measure(job, model, batch, labels) for job in asked)]
    if not only or "FMP" in only:
        result["fmp_seconds"], result["fmp_one_at_a_time_seconds"] = one_map_at_a_time(model, clean)
    if not only or "memory" in only:
        result["peak_memory_bytes"] = [memory(seed) for seed in range(3)]
    write_atomic(RECORD, (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(Path("benchmarks/cost.md"), page(result).encode())
    print(page(result))


if __name__ == "__main__":
    main()
