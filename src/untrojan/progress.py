"""Named stages of a run: how long each took, and how far it is.

Every piece of work that may take more than a second opens a :func:`stage`. What the stage reports to is
chosen by the outermost caller: nothing (the default in Python), a bar, or plain lines on stderr.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class Advance(Protocol):
    """Belongs to an open stage."""

    def __call__(self, note: str = "") -> None:
        """Mark one step as done; `note`, what came of it, is shown beside."""
        ...


QUICK = 1.0
LEAST_OFTEN = 60.0
NARROW = 80


class AtMost(int):
    """A number of steps, of which a stage may need fewer: the time left is then an upper bound, and shown as one."""


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
        yield lambda note="": None


class Lines:
    """Writes plain lines to stderr: how far a stage is, ever less often up to once a minute, and when it ended.

    Args:
        every: Seconds until the first line about a stage that is still going on.
        quick: Stages that take less than these seconds are not worth a line.
    """

    def __init__(self, every: float = 5.0, quick: float = QUICK) -> None:
        self.every = every
        self.quick = quick

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Write `name` with steps done, pace and time left."""
        start = said = time.monotonic()
        wait = self.every
        done = 0

        def advance(note: str = "") -> None:
            nonlocal done, said, wait
            done += 1
            now = time.monotonic()
            if now - said >= wait and done < total:
                said, wait = now, min(2 * wait, max(wait, LEAST_OFTEN))
                left = (total - done) * (now - start) / done
                about = "at most" if isinstance(total, AtMost) else "about"
                so_far = ", ".join(filter(None, (f"{done} of {total}", note, _pace(done, now - start))))
                self._say(f"{name}: {so_far}, {about} {span(left)} left")

        yield advance
        spent = time.monotonic() - start
        if spent >= self.quick or said != start:
            self._say(f"{name}: done in {span(spent)}")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)  # noqa: T201


class Bars:
    """Draws one bar per stage on a terminal, with pace and time left; where it is narrow, steps and time left alone.

    Args:
        quick: Stages that take less than these seconds leave nothing behind, nor do those that are parts of another.
    """

    def __init__(self, quick: float = QUICK) -> None:
        self.quick = quick
        self._live: Progress | None = None

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Draw a bar of `total` steps under `name`; nested stages stand below each other."""
        outermost = self._live is None
        live = self._live = self._live or _bars()
        start = time.monotonic()
        done = 0
        bar = live.add_task(name, total=total, pace="", note="", ends=None, took=None)

        def advance(note: str = "") -> None:
            nonlocal done
            done += 1
            spent = time.monotonic() - start
            live.update(bar, completed=done, pace=_pace(done, spent), note=note, ends=start + spent * total / done)

        try:
            if outermost:
                live.start()
            yield advance
            live.update(bar, total=done or total, completed=done or total, took=time.monotonic() - start)
        finally:
            if outermost:
                self._live = None
                live.live.transient = time.monotonic() - start < self.quick
                live.stop()
            else:
                live.remove_task(bar)


def _bars() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
    from rich.table import Column
    from rich.text import Text

    class Left(ProgressColumn):
        """Time left by the pace of all steps so far, counted down until the next; in the end, the time that it took.

        Rich's own looks back half a minute, and tells nothing of steps that take longer.
        """

        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            took, ends = task.fields["took"], task.fields["ends"]
            if took is not None:
                return Text(span(took), style="progress.elapsed")
            most = "≤ " if isinstance(task.total, AtMost) else ""
            left = "" if ends is None else f"{most}{span(max(0.0, ends - time.monotonic()))} left"
            return Text(left, style="progress.remaining")

    class Name(TextColumn):
        """What is done, on one line: where the terminal is narrow, it alone is cut."""

        def render(self, task: Task) -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "crop"
            return text

    console = Console(stderr=True)
    wide = console.width >= NARROW
    name = Name("{task.description:<27}", markup=False, table_column=Column(no_wrap=wide))
    steps = TextColumn("{task.completed:.0f}/{task.total:.0f}")
    left = Left(table_column=Column(no_wrap=True))
    if not wide:
        return Progress(name, steps, left, console=console)
    pace = TextColumn("{task.fields[pace]:>10}")
    note = TextColumn("{task.fields[note]}", markup=False)
    return Progress(name, BarColumn(bar_width=None), steps, pace, note, left, console=console)


def _pace(steps: int, seconds: float) -> str:
    """Steps per second or seconds per step, whichever is above 1."""
    if steps >= seconds:
        return f"{steps / max(seconds, 1e-9):.1f}/s"
    return f"{span(seconds / steps)} each"


def span(seconds: float) -> str:
    """Write a time for people.

    Example:
        >>> span(3.14159), span(75), span(7230)
        ('3.1 s', '1 min 15 s', '2 h 00 min')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


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
        for name, spent in seconds.items():
            _add(name, spent)


@contextlib.contextmanager
def stage(name: str, total: int, detail: str = "") -> Iterator[Advance]:
    """Time a piece of work under `name` and show how far it is.

    Args:
        name: What is being done, in one or two words; stages of one name are summed in the record.
        total: How many steps it has; :class:`AtMost` so many where it may end early.
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
        with overall(f"{name} {detail}".rstrip(), total) as advance:
            yield advance
    finally:
        _add(name, time.perf_counter() - start)


@contextlib.contextmanager
def overall(name: str, total: int) -> Iterator[Advance]:
    """Show how far a piece of work is whose parts are stages of their own; these alone are timed.

    Example:
        >>> with timing() as seconds, overall("count", total=1) as advance:
        ...     with stage("count to ten", total=10):
        ...         advance()
        >>> list(seconds)
        ['count to ten']
    """
    with _reporter.get().stage(name, total) as advance:
        yield advance


@contextlib.contextmanager
def whole(name: str, total: int) -> Iterator[Advance]:
    """Open a stage as :func:`stage` does, inside of which no other is shown or timed.

    Example:
        >>> with timing() as seconds, whole("count", total=1) as advance:
        ...     with stage("count to ten", total=10):
        ...         advance()
        >>> list(seconds)
        ['count']
    """
    with stage(name, total) as advance:
        token = _seconds.set(None)
        try:
            with reporting(Silent()):
                yield advance
        finally:
            _seconds.reset(token)


def _add(name: str, spent: float) -> None:
    seconds = _seconds.get()
    if seconds is not None:
        seconds[name] = seconds.get(name, 0.0) + spent
