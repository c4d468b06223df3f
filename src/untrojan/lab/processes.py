"""Worker processes on this machine, one thread each, that live as long as the grid does."""

import contextlib
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.forkserver import ensure_running

from untrojan.lab.work import Answer, Job, work

_SHARED = ["untrojan.lab.work", "torch._dynamo"]  # the second is imported by the first optimizer, for a second and more


def begin() -> None:
    """Start the process that workers are forked from, and go on while it imports what all of them need."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(_SHARED)
    ensure_running()


class Processes:
    """A pool of worker processes; see :class:`untrojan.lab.runner.Pool`.

    A worker ends with the process that started it, however that one ends, and one that dies is replaced. A script that
    uses the pool must do so under `if __name__ == "__main__":`, for workers import the script.

    Args:
        size: How many.
        work: What to do with a job; a function that worker processes can import.
    """

    def __init__(self, size: int, work: Callable[[Job], Answer] = work) -> None:
        begin()
        self.size = size
        self._work = work
        self._idle: list[_Worker] = []
        self._busy: dict[Connection, tuple[_Worker, Job]] = {}

    def start(self, job: Job) -> None:
        """Give a job to an idle worker, or to a new one."""
        worker = self._idle.pop() if self._idle else _Worker(self._work)
        self._busy[worker.connection] = worker, job
        worker.give(job)

    def wait(self) -> tuple[Job, Answer | None]:
        """Wait until a job ends; the answer is `None` where its worker died."""
        connection = wait(list(self._busy))[0]
        assert isinstance(connection, Connection)
        worker, job = self._busy.pop(connection)
        answer = worker.take()
        if answer is not None:
            self._idle.append(worker)
        return job, answer

    def close(self) -> None:
        """End all workers, whatever they do."""
        for worker in [*self._idle, *(worker for worker, _ in self._busy.values())]:
            worker.end()
        self._idle.clear()
        self._busy.clear()


class _Worker:
    def __init__(self, work: Callable[[Job], Answer]) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()

    def give(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # a dead worker, which `take` will tell
            self.connection.send(job)

    def take(self) -> Answer | None:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.end()
            return None

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


def _serve(connection: Connection, work: Callable[[Job], Answer]) -> None:
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches every process; the parent ends this one
    end_with_parent()
    os.dup2(2, 1)  # results of the command go to stdout, and nothing that a network prints
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            connection.send(work(connection.recv()))


def end_with_parent() -> None:
    """From now on, end this process as soon as the one that started it has ended, however that ends."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
