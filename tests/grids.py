"""A tiny grid on disk, and ways to run one without processes."""

import numpy as np
import torch
from tiny import make_clean, train

from untrojan.lab.work import Answer, work
from untrojan.record import CleanInfo, Diagnosis, MethodInfo, ModelInfo, ScanRecord
from untrojan.sources.files import save_state
from untrojan.sources.nets import build

NET = "digits-cnn:classes=4"
SPOILS = [f"clp:select=count,count={count}" for count in (40, 50, 60)]
"""Defenses that ruin the model, so that the checks are over after the first."""


def save_images(path, images):
    np.savez(path, images=images.images.permute(0, 2, 3, 1).numpy(), labels=images.labels.numpy())


def make_grid(folder, models=("one",), defenses=SPOILS[:2], seeds=(0,), extra=""):
    """Write models, images and `grid.toml` into a folder."""
    images = make_clean(count=80, shape=(1, 8, 8))
    save_images(folder / "clean.npz", images.take(range(40)))
    save_images(folder / "test.npz", images.take(range(40, 80)))
    lines = [
        f"defenses = {list(defenses)}",
        f"seeds = {list(seeds)}",
        "settings = [{ samples = 20 }]",
        'scan = "unlearning:runs=1,unlearn_epochs=1"',
    ]
    for number, name in enumerate(models):
        torch.manual_seed(number)
        net = train(build(NET), images.take(range(40)), epochs=15)
        save_state(folder / f"{name}.safetensors", net.state_dict())
        lines += [
            f"[models.{name}]",
            f'file = "{folder / name}.safetensors"',
            f'net = "{NET}"',
            f'clean = "{folder / "clean.npz"}"',
            f'test = "{folder / "test.npz"}"',
            'attack = "badnets:size=2"',
            "target = 1",
            extra,
        ]
    file = folder / "grid.toml"
    file.write_text("\n".join(lines))
    return file


class Here:
    """A pool that does the oldest job when it is waited for, in this process.

    `work` may give `None` for a worker that died.
    """

    def __init__(self, size=1, work=work):
        self.size, self.work = size, work
        self.jobs, self.log, self.most, self.closed = [], [], 0, False

    def start(self, job):
        self.jobs.append(job)
        self.most = max(self.most, len(self.jobs))

    def wait(self):
        job = self.jobs.pop(0)
        self.log.append(("scan" if job.scan is None else "cell", job.cell))
        return job, self.work(job)

    def close(self):
        self.closed = True


SCAN = ScanRecord(
    method=MethodInfo(name="none", fields={}),
    seed=0,
    model=ModelInfo(state_sha256="0", architecture="none", parameters=0, classes=4),
    clean=CleanInfo(sha256="0", images=0, shape=(1, 8, 8), per_class=[0] * 4),
    diagnosis=Diagnosis(verdict="inconclusive", rule="as told", targets=[], runs=[]),
    seconds={},
    peak_memory_bytes=0,
    environment={},
).to_json()


def pretend(job):
    """Answer at once, for a cell with something that is no record."""
    return Answer(SCAN if job.scan is None else f"cell of {job.cell.model}")
