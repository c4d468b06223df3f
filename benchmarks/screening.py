"""Every detector of poisoned samples on training sets whose poisoned samples are known.

Every poisoned training set of `population.py` is screened with the model trained on it: all of it, or 1,000 samples
with the same share of poisoned ones, but at least ten. One JSON per model under `benchmarks/records/screening`; those
that are there are not run again.

    python benchmarks/screening.py            # run what is missing, then write benchmarks/screening.md
    python benchmarks/screening.py badnets    # only those whose name begins so
"""

import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cases import percent
from population import MEMBERS, Member, images_of
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

import untrojan
from untrojan.data import CleanSet
from untrojan.record import Diagnosis
from untrojan.registry import discover
from untrojan.scanners.detectors.detector import Detector
from untrojan.writing import write_atomic

RECORDS = Path("benchmarks/records/screening")
DETECTORS = discover("untrojan.scanners.detectors", Detector)
CLEAN = 500
SAMPLES = 1000
LEAST = 10


def suspects(member: Member) -> tuple[CleanSet, Tensor]:
    """The samples to screen, and which of them are poisoned."""
    shown, before = member.training_set()
    changed = (shown.images != before.images).flatten(1).any(1) | (shown.labels != before.labels)
    generator = torch.Generator().manual_seed(member.seed)
    bad, good = ((changed == each).nonzero().flatten() for each in (True, False))
    bad, good = (each[torch.randperm(len(each), generator=generator)] for each in (bad, good))
    if len(shown) > SAMPLES:
        count = min(len(bad), max(LEAST, round(SAMPLES * len(bad) / len(shown))))
        bad, good = bad[:count], good[: SAMPLES - count]
    rows = torch.cat([bad, good]).sort().values
    return shown.take(rows), changed[rows]


def run(member: Member) -> dict[str, Any]:
    """Screen one training set with every detector."""
    samples, poisoned = suspects(member)
    _, test = images_of(member.data)
    clean = test.split(min(CLEAN, len(test) // 2) / len(test), member.seed)[1]
    network = member.network()
    nothing = Diagnosis(verdict="inconclusive", rule="not scanned", targets=[], runs=[])
    detectors = {}
    for name, method in DETECTORS.items():
        start = time.perf_counter()
        detector = method()  # pyright: ignore[reportAbstractUsage]
        done = untrojan.screen(network, clean, samples, detectors=[detector], diagnosis=nothing, seed=member.seed)
        scores = done.scores[name]
        false, true, _ = roc_curve(poisoned, scores)
        detectors[name] = {
            "auroc": float(roc_auc_score(poisoned, scores)),
            "tpr_at_1_percent_fpr": float(true[false <= 0.01].max()),
            "seconds": time.perf_counter() - start,
        }
    return {
        **member._asdict(),
        "asr": member.record()["asr"],
        "samples": len(samples),
        "poisoned": int(poisoned.sum()),
        "clean_images": len(clean),
        "detectors": detectors,
    }


def page() -> Iterator[str]:
    """All records as Markdown."""
    results = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    results.sort(key=lambda result: (result["data"], result["attack"], -result["rate"]))
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        key = tuple(result[name] for name in ("attack", "rate", "data", "net", "samples", "poisoned"))
        groups.setdefault(key, []).append(result)
    yield "# Detectors of poisoned samples\n"
    yield "Written by `benchmarks/screening.py` from `benchmarks/records/screening`."
    yield "AUROC / TPR at 1 % FPR, in percent, means over seeds. Where a backdoor did not take, there is less to see."
    yield "Of larger training sets 1,000 samples were screened, with at least ten poisoned ones.\n"
    yield f"| attack | rate | data | network | ASR | samples | poisoned | seeds | {' | '.join(DETECTORS)} |"
    yield f"|---|---|---|---|---|---|---|---|{'---|' * len(DETECTORS)}"
    for (attack, rate, data, net, samples, poisoned), group in groups.items():
        asr = percent(statistics.mean(result["asr"] for result in group))
        about = [f"`{attack}`", f"{rate:.1%}", data, net, asr, samples, poisoned, len(group)]
        cells = []
        for name in DETECTORS:
            auroc, caught = (
                statistics.mean(result["detectors"][name][measure] for result in group)
                for measure in ("auroc", "tpr_at_1_percent_fpr")
            )
            cells.append(f"{percent(auroc)} / {100 * caught:.0f}")
        yield f"| {' | '.join(map(str, [*about, *cells]))} |"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    RECORDS.mkdir(parents=True, exist_ok=True)
    prefixes = tuple(sys.argv[1:]) or ("",)
    for name, member in MEMBERS.items():
        if not name.startswith(prefixes):
            continue
        path = RECORDS / f"{name}.json"
        if member.rate and not path.exists() and member.is_trained:
            write_atomic(path, (json.dumps(run(member), indent=1) + "\n").encode())
            print(name, flush=True)
    write_atomic(Path("benchmarks/screening.md"), ("\n".join(page()) + "\n").encode())


if __name__ == "__main__":
    main()
