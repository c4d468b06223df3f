"""Every test and every example in a docstring starts from the same random state, on one thread.

The networks in them are so small that more threads mostly wait, above all beside other work.
"""

import os
from functools import partial

import pytest
import torch

from untrojan.scanners.inversion import bounded
from untrojan.scanners.patches import search
from untrojan.scanners.triggers import TriggerScanner

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    # `torch.manual_seed` formats the whole stack three times where there is no GPU, a millisecond or two for each test.
    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:
        torch.default_generator.manual_seed(0)


@pytest.fixture
def short_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What searches for triggers find is tested elsewhere; in the tests of a defense they only have to run."""
    monkeypatch.setattr("untrojan.scanners.inversion.ROUNDS", 1)
    monkeypatch.setattr("untrojan.scanners.inversion.EPOCHS", 1)
    monkeypatch.setattr("untrojan.scanners.patches.CLIMBS", 1)
    monkeypatch.setattr("untrojan.scanners.changes.STEPS", 2)
    monkeypatch.setattr("untrojan.scanners.changes.OTHERS", 1)
    monkeypatch.setattr("untrojan.scanners.changes.JUDGED", 8)
    monkeypatch.setattr("untrojan.scanners.changes.AT_ONCE", 2)
    monkeypatch.setattr("untrojan.defenses.auto.AT_ONCE", 2)
    monkeypatch.setattr("untrojan.defenses.checks.VIEWS", 128)
    monkeypatch.setattr("untrojan.speed._fused", lambda network: network)
    monkeypatch.setattr("untrojan.defenses.auto.STEPS", 2)
    monkeypatch.setattr("untrojan.scanners.triggers.FAINT_STEPS", (2, 2))
    monkeypatch.setattr("untrojan.defenses.checks.search", partial(search, steps=2))
    monkeypatch.setattr("untrojan.defenses.auto.bounded", partial(bounded, steps=2))
    scanner = partial(TriggerScanner, runs=2, search_steps=2, refine_steps=2)
    for user in ("defenses.defense", "scanners.samples"):
        monkeypatch.setattr(f"untrojan.{user}.TriggerScanner", scanner)


@pytest.fixture(autouse=True)
def _short_examples(request: pytest.FixtureRequest) -> None:
    if isinstance(request.node, pytest.DoctestItem):
        request.getfixturevalue("short_searches")
