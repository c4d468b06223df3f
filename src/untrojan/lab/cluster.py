"""Workers of a Ray cluster, for grids that one machine is too small for.

Ray is an extra: `pip install 'untrojan[cluster]'`.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from untrojan.errors import ConfigError
from untrojan.lab.work import Answer, Job, work


class Cluster:
    """A pool of Ray workers, one core and a share of a GPU each; see :class:`untrojan.lab.runner.Pool`.

    Every machine of the cluster needs untrojan, and sees the files of the grid, and the current folder where paths are
    relative, under the same names. Records are written by the process that started the grid alone.

    Args:
        address: Of the cluster, such as `10.0.0.1:6379`, or `auto` for the one that runs on this machine.
        size: How many jobs at a time; as many as the cluster has cores and GPUs for if left out.
        gpus: GPUs of each job, such as 0.25 where four share one; at 0 it runs on the CPU.
        work: What to do with a job; a function that the workers can import.

    Raises:
        ConfigError: Ray is not installed, or there is no cluster, or it has no cores, or no GPUs where some are asked
            for.
    """

    def __init__(
        self, address: str, size: int | None = None, gpus: float = 0.0, work: Callable[[Job], Answer] = work
    ) -> None:
        self._ray = _ray()
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"cannot reach a Ray cluster at {address}: {error}") from error
        there = self._ray.cluster_resources()
        possible = {"cores": there.get("CPU", 0)} | ({"GPUs": there.get("GPU", 0) / gpus} if gpus else {})
        if lacking := [name for name, most in possible.items() if most < 1]:
            self._ray.shutdown()
            raise ConfigError(f"the Ray cluster at {address} has too few {' and '.join(lacking)} to work on")
        self.size = size or int(min(possible.values()))
        # Whoever runs the grid decides what is tried again, on whatever pool.
        self._remote = self._ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_at_work)
        self._work = work
        self._gpus = gpus
        self._busy: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """Give a job to whichever worker has a core for it."""
        self._busy[self._remote.remote(self._work, str(Path.cwd()), self._gpus, job)] = job

    def wait(self) -> tuple[Job, Answer | None]:
        """Wait until a job ends; the answer is `None` where its worker or machine died."""
        (ended, *_), _ = self._ray.wait(list(self._busy), num_returns=1)
        job = self._busy.pop(ended)
        try:
            return job, self._ray.get(ended)
        except self._ray.exceptions.RayTaskError as error:  # such as a machine without untrojan
            return job, Answer(None, str(error))
        except self._ray.exceptions.RayError:
            return job, None

    def close(self) -> None:
        """Stop what is at work, and leave the cluster."""
        for each in self._busy:
            self._ray.cancel(each, force=True)
        self._busy.clear()
        self._ray.shutdown()


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError("--ray needs Ray, which is not installed; run `pip install 'untrojan[cluster]'`") from error
    return ray


def _at_work(work: Callable[[Job], Answer], folder: str, gpus: float, job: Job) -> Answer:
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray itself may leave all of the machine in sight
    import torch

    os.chdir(folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    return work(job)
