import itertools
import time
from contextlib import contextmanager

import pytest

from untrojan.progress import AtMost, Bars, Lines, overall, reporting, stage, timing, whole


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for `tick`."""

    class Clock:
        now = 100.0

        def tick(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def work(clock, name, steps, each=1.0, **options):
    with stage(name, total=steps, **options) as advance:
        for _ in range(steps):
            clock.tick(each)
            advance()


def test_stages_of_one_name_are_summed(clock):
    with timing() as seconds:
        work(clock, "unlearn", 2)
        clock.tick(10)
        work(clock, "unlearn", 3, detail="2/2")
        work(clock, "sweep", 1)
    work(clock, "sweep", 5)
    assert seconds == {"unlearn": 5, "sweep": 1}


def test_nested_stages_count_in_both(clock):
    with timing() as seconds, stage("outer", total=1) as advance:
        work(clock, "inner", 2)
        clock.tick(1)
        advance()
    assert seconds == {"inner": 2, "outer": 3}


def test_a_whole_hides_what_is_inside(clock, capsys):
    with reporting(Lines(every=0, quick=0)), timing() as seconds, whole("outer", total=2) as advance:
        work(clock, "inner", 2)
        advance()
        with timing() as within:
            work(clock, "inner", 3)
    assert within == {"inner": 3}
    assert seconds == {"outer": 5}
    told = capsys.readouterr().err
    assert "outer" in told
    assert "inner" not in told


def test_an_overall_shows_how_far_it_is_and_leaves_timing_to_its_parts(clock, capsys):
    with reporting(Lines(every=0, quick=0)), timing() as seconds, overall("outer", total=3) as advance:
        for _ in range(3):
            work(clock, "inner", 2, each=5)
            advance()
    assert seconds == {"inner": 30}
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("outer")]
    assert told == [
        "outer: 1 of 3, 10 s each, about 20 s left",
        "outer: 2 of 3, 10 s each, about 10 s left",
        "outer: done in 30 s",
    ]


def test_nested_timing_counts_in_both(clock):
    with timing() as outer:
        work(clock, "a", 1)
        with timing() as inner:
            work(clock, "a", 2)
            work(clock, "b", 3)
    assert inner == {"a": 2, "b": 3}
    assert outer == {"a": 3, "b": 3}


def broken(clock, total=9, each=4, later=0, name="unlearn"):
    with stage(name, total=total) as advance:
        clock.tick(each)
        advance()
        clock.tick(later)
        raise KeyError("midway")


@pytest.mark.parametrize("reporter", [None, Lines, Bars])
def test_a_stage_that_raises_is_timed_and_closed(clock, reporter):
    made = reporter() if reporter else None
    with timing() as seconds:
        for _ in range(2):
            with pytest.raises(KeyError, match="midway"), reporting(made) if made else timing():
                broken(clock)
    assert seconds == {"unlearn": 8}


def test_silent_unless_asked(clock, capfd):
    work(clock, "unlearn", 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("terminal", [False, True])
def test_lines(clock, capsys, monkeypatch, terminal):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with reporting(Lines(every=5, quick=2)):
        work(clock, "unlearn", 4, each=3, detail="1/2")
        work(clock, "short", 2)
        work(clock, "quick", 1)
    work(clock, "outside", 1)
    out, err = capsys.readouterr()
    assert out == ""
    assert [line.partition(", ")[0] for line in err.splitlines()] == [
        "unlearn 1/2: 2 of 4",
        "unlearn 1/2: done in 12 s",
        "short: done in 2.0 s",
    ]
    assert "3.0 s each, about 6.0 s left" in err


def test_lines_become_rarer(clock, capsys):
    with reporting(Lines(every=5)):
        work(clock, "train", 600)
    said = [int(line.split()[1]) for line in capsys.readouterr().err.splitlines()[:-1]]
    gaps = [after - before for before, after in itertools.pairwise([0, *said])]
    assert gaps[:3] == [5, 10, 20]
    assert gaps == sorted(gaps)
    assert max(gaps) == 60


def test_lines_of_a_stage_that_raises_say_nothing_of_done(clock, capsys):
    with reporting(Lines()), pytest.raises(KeyError):
        broken(clock)
    assert capsys.readouterr() == ("", "")


def test_lines_with_a_clock_that_stands(clock, capsys):
    with reporting(Lines(every=0)):
        work(clock, "quick", 3, each=0)
    assert capsys.readouterr().err.startswith("quick: 1 of 3, ")


def test_bars_show_what_a_step_came_to(capsys, clock):
    with reporting(Bars(quick=0)), stage("train", total=1) as advance:
        advance("ACC 91.0%, [red]")
    assert "ACC 91.0%, [red]" in capsys.readouterr().err


def test_bars_leave_the_outermost_on_stderr(capsys, clock):
    with reporting(Bars(quick=0)):
        for _ in range(2):
            with stage("outer", total=2) as advance:
                work(clock, "inner", 3)
                advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("outer") == err.count("1/1") == 2
    assert "inner" not in err


def test_bars_count_down_what_is_left_also_where_a_step_takes_minutes(capsys, clock):
    with pytest.raises(KeyError), reporting(Bars()):
        broken(clock, total=3, each=97, later=7)
    assert "1/3 1 min 37 s each 3 min 07 s left" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("reporter", "told"), [(Lines(every=0), "1 of 3, 4.0 s each, at most 8.0 s left"), (Bars(), "≤ 8.0 s left")]
)
def test_time_left_is_an_upper_bound_where_a_stage_may_end_early(capsys, clock, reporter, told):
    with pytest.raises(KeyError), reporting(reporter):
        broken(clock, total=AtMost(3))
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("columns", [40, 60, 79])
def test_a_narrow_terminal_cuts_the_name_and_neither_steps_nor_time_left(capsys, clock, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(KeyError), reporting(Bars()):
        broken(clock, total=AtMost(120), each=97, name="search changes " * 6)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("search ")
    assert line.endswith(" 1/120 ≤ 3 h 12 min left")
    assert len(line) <= columns


def test_bars_tell_in_the_end_how_long_it_took(capsys, clock):
    with reporting(Bars()):
        work(clock, "train", 3, each=50)
    assert "50 s each 2 min 30 s" in " ".join(capsys.readouterr().err.split())


def test_reporting_nests_and_ends(clock):
    seen = []

    class Spy:
        def __init__(self, name):
            self.name = name

        @contextmanager
        def stage(self, name, total):
            count = itertools.count(1)
            yield lambda: seen.append((self.name, name, total, next(count)))

    with reporting(Spy("outer")):
        with reporting(Spy("inner")):
            work(clock, "a", 2)
        work(clock, "b", 1, detail="1/1")
    work(clock, "c", 1)
    assert seen == [("inner", "a", 2, 1), ("inner", "a", 2, 2), ("outer", "b 1/1", 1, 1)]
