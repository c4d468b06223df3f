"""Named stages of a run: how long each took, and how far it is.

Every piece of work that may take more than a second opens a :func:`stage`. What the stage reports to is
chosen by the outermost caller: nothing (the default in Python), a bar, or plain lines on stderr.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Protocol

Advance = Callable[[], None]


class Reporter(Protocol):
    """Shows stages to a person; :func:`reporting` puts one in place."""

    def stage(self, name: str, total: int) -> contextlib.AbstractContextManager[Advance]:
        """Open a stage of `total` steps; calling the yielded function marks one step as done."""
        ...


class Silent:
    """Shows nothing."""

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Do nothing, at every step."""
        yield lambda: None


class Lines:
    """Writes a plain line to stderr when a stage begins, every few seconds, and when it ends."""

    def __init__(self, every: float = 5.0) -> None:
        self.every = every

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Write `name` with steps done, rate and time left; quick stages get one line only."""
        start = said = time.monotonic()
        done = 0

        def advance() -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if now - said >= self.every and done < total:
                said = now
                rate = done / (now - start)
                self._say(f"{name}: {done}/{total}, {rate:.1f}/s, {(total - done) / rate:.0f} s left")

        yield advance
        self._say(f"{name}: done in {time.monotonic() - start:.1f} s")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


class Bars:
    """Draws one bar per stage on a terminal, with rate and time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:<28}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[rate]:>9}"),
            TimeRemainingColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self._open = 0

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Draw a bar of `total` steps under `name`; nested stages stand below each other."""
        if self._open == 0:
            self._progress.start()
        self._open += 1
        task = self._progress.add_task(name, total=total, rate="")

        def advance() -> None:
            speed = self._progress.tasks[task].speed
            self._progress.update(task, advance=1, rate=f"{speed:.1f}/s" if speed else "")

        try:
            yield advance
            self._progress.update(task, completed=total)
        finally:
            self._open -= 1
            if self._open == 0:
                self._progress.stop()


_reporter: ContextVar[Reporter] = ContextVar("reporter", default=Silent())  # noqa: B039
_seconds: ContextVar[dict[str, float] | None] = ContextVar("seconds", default=None)


@contextlib.contextmanager
def reporting(reporter: Reporter) -> Iterator[None]:
    """Send every stage opened inside the block to `reporter`."""
    token = _reporter.set(reporter)
    try:
        yield
    finally:
        _reporter.reset(token)


@contextlib.contextmanager
def timing() -> Iterator[dict[str, float]]:
    """Collect the seconds of every stage opened inside the block, summed by name."""
    seconds: dict[str, float] = {}
    token = _seconds.set(seconds)
    try:
        yield seconds
    finally:
        _seconds.reset(token)


@contextlib.contextmanager
def stage(name: str, total: int, detail: str = "") -> Iterator[Advance]:
    """Time a piece of work under `name` and show how far it is.

    Args:
        name: What is being done, in one or two words; stages of one name are summed in the record.
        total: How many steps it has, at least an upper bound.
        detail: Which of several rounds this is, shown behind the name.

    Yields:
        A function to call after each step.

    Example:
        >>> with timing() as seconds, stage("count", total=2) as advance:
        ...     advance()
        >>> list(seconds)
        ['count']
    """
    start = time.perf_counter()
    try:
        with _reporter.get().stage(f"{name} {detail}".rstrip(), total) as advance:
            yield advance
    finally:
        seconds = _seconds.get()
        if seconds is not None:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
