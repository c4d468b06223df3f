"""What RNP costs: passes counted against the count that methods say it needs, and time against bare passes.

F is one image through the network once. Unlearning an image costs 3 F (forward, and backward to activations and to
weights), recovering one 2 F (the weights are frozen), judging one 1 F. The count that RNP needs is therefore
`3 F x images x unlearning epochs + 2 F x images x recovery epochs` per learned mask. A global hook counts the images
that really went through; then the same numbers of images go through bare loops, without masks, augmentation,
optimizer or bookkeeping, in the same run on the same machine.

    python benchmarks/cost.py      # on an otherwise idle machine; writes benchmarks/records/cost.json and cost.md
"""

import copy
import json
import resource
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import untrojan
from untrojan.record import Record, UnlearningRun, environment, write_atomic
from untrojan.sources.nets import SmallVGG

SHARED = Path("../shared")
MODEL = SHARED / "checkpoints" / "ibau-cifar10-badnets-t8.pth"
CLEAN = SHARED / "data" / "cifar10" / "train-lossless.parquet"
NET = "small-vgg:classes=10"
SAMPLES = 500
F_PER_IMAGE = {"unlearn": 3, "recover": 2, "judge": 1}
METHODS = {"fixed": untrojan.RNP(), "released": untrojan.RNP(variant="released", select="threshold", threshold=0.2)}
Job = Callable[[], object]


def counted(job: Job) -> tuple[Counter[str], float]:
    """Run a job; give the images that went through the network by kind of pass, and the seconds it took."""
    images: Counter[str] = Counter()

    def count(module: nn.Module, arguments: tuple[Any, ...], _: object) -> None:
        if isinstance(module, SmallVGG):
            weights = module.features[0].weight.requires_grad
            images["judge" if not torch.is_grad_enabled() else "unlearn" if weights else "recover"] += len(arguments[0])

    handle = nn.modules.module.register_module_forward_hook(count)
    start = time.perf_counter()
    try:
        job()
    finally:
        handle.remove()
    return images, time.perf_counter() - start


def needed(method: untrojan.RNP, runs: list[UnlearningRun]) -> int:
    """What learning one mask from each of these unlearning runs takes, in F."""
    return sum(run.images * (3 * len(run.trace) + 2 * method.recover_epochs) for run in runs)


def bare(model: nn.Module, batch: Tensor, labels: Tensor, images: Counter[str]) -> float:
    """Seconds that the same numbers of images take in plain loops."""
    whole = copy.deepcopy(model).train()
    scales = copy.deepcopy(model).train().requires_grad_(False)
    for module in scales.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(True)
    judged = copy.deepcopy(model).eval()
    start = time.perf_counter()
    for _ in range(round(images["unlearn"] / len(batch))):
        functional.cross_entropy(whole(batch), labels).backward()
    for _ in range(round(images["recover"] / len(batch))):
        functional.cross_entropy(scales(batch), labels).backward()
    with torch.no_grad():
        for _ in range(round(images["judge"] / len(batch))):
            judged(batch)
    return time.perf_counter() - start


def measure(name: str, job: Job, model: nn.Module, clean: untrojan.CleanSet) -> dict[str, Any]:
    """Count and time a job, then the bare loops over as many images."""
    batch, labels = next(clean.batches(125))
    images, seconds = counted(job)
    plain = bare(model, batch, labels, images)
    passes = {kind: images[kind] * each for kind, each in F_PER_IMAGE.items()}
    return {
        "job": name,
        "images": dict(images),
        "passes_f": passes,
        "seconds": seconds,
        "bare_seconds": plain,
        "ratio": seconds / plain,
    }


def memory() -> int:
    """Peak resident bytes of the command line on 500 images, in a process of its own."""
    command = ["-m", "untrojan", "repair", MODEL, "--net", NET, "--clean", CLEAN, "--samples", SAMPLES, "--out"]
    folder = Path("runs/cost")
    arguments = [sys.executable, *map(str, command), str(folder), "--force", "--quiet"]
    subprocess.run(arguments, check=False, stdout=subprocess.DEVNULL)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return max(peak, Record.load(folder / "record.json").peak_memory_bytes)


def page(result: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = [
        "# What RNP costs",
        "",
        f"Made by `python benchmarks/cost.py`: {NET}, {SAMPLES} images of 32x32, {result['environment']['threads']} "
        "threads. F is one image through the network once. Each job ran once, and after it bare loops over as many "
        "images.",
        "",
        "| job | unlearn | recover | judge | count it needs | seconds | bare loops | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["jobs"]:
        passes = " | ".join(f"{row['passes_f'][kind]:,} F" for kind in F_PER_IMAGE)
        count = f"{row['needed_f']:,} F" if "needed_f" in row else ""
        times = f"{row['seconds']:.1f} | {row['bare_seconds']:.1f} | {row['ratio']:.2f}"
        lines.append(f"| {row['job']} | {passes} | {count} | {times} |")
    lines += [
        "",
        "A whole repair adds to the masks: the pruning curve and the accuracies, unlearning the repaired model twice "
        "as a check, and for `fixed` masks from either half, to judge the threshold on images that the masks were not "
        "learned on, and two unlearning runs with noise for the label.",
        "",
        f"Peak resident memory of `untrojan repair` on these images: {result['peak_memory_bytes'] / 2**20:,.0f} MiB.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the record and the page."""
    warnings.simplefilter("ignore", untrojan.UntrojanWarning)
    model = untrojan.load(MODEL, NET)
    clean = untrojan.CleanSet.load(CLEAN, samples=SAMPLES, seed=0)
    jobs = []
    for name, method in METHODS.items():
        masks = measure(f"masks, {name}", partial(method.learn, model, clean, 0), model, clean)
        jobs.append(masks | {"needed_f": needed(method, [method.learn(model, clean, 0).run])})
    result = {"environment": environment(), "jobs": jobs, "peak_memory_bytes": memory()}
    write_atomic(Path("benchmarks/records/cost.json"), (json.dumps(result, indent=1) + "\n").encode())
    write_atomic(Path("benchmarks/cost.md"), page(result).encode())
    print(page(result))


if __name__ == "__main__":
    main()
