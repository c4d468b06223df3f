"""Fixtures that several test files share; torch is seeded one folder up."""

import random
from functools import partial

import numpy as np
import pytest
from tiny import NETS, build, make_clean

from untrojan.scanners.inversion import bounded
from untrojan.scanners.patches import search
from untrojan.scanners.triggers import TriggerScanner


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)


@pytest.fixture(params=NETS)
def net(request):
    return build(request.param)


@pytest.fixture
def clean():
    return make_clean()


@pytest.fixture
def short_searches(monkeypatch):
    """What searches for triggers find is tested elsewhere; in the tests of a defense they only have to run."""
    monkeypatch.setattr("untrojan.scanners.inversion.ROUNDS", 1)
    monkeypatch.setattr("untrojan.scanners.inversion.EPOCHS", 1)
    monkeypatch.setattr("untrojan.scanners.patches.CLIMBS", 1)
    monkeypatch.setattr("untrojan.scanners.changes.STEPS", 2)
    monkeypatch.setattr("untrojan.scanners.changes.OTHERS", 1)
    monkeypatch.setattr("untrojan.scanners.changes.JUDGED", 8)
    monkeypatch.setattr("untrojan.defenses.auto.STEPS", 2)
    monkeypatch.setattr("untrojan.scanners.triggers.FAINT_STEPS", (2, 2))
    monkeypatch.setattr("untrojan.defenses.checks.search", partial(search, steps=2))
    monkeypatch.setattr("untrojan.defenses.auto.bounded", partial(bounded, steps=2))
    scanner = partial(TriggerScanner, runs=2, search_steps=2, refine_steps=2)
    monkeypatch.setattr("untrojan.defenses.defense.TriggerScanner", scanner)
