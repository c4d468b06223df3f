"""Fixtures that several test files share; those that examples in docstrings need too are one folder up."""

import random

import numpy as np
import pytest
from tiny import NETS, build, make_clean

from untrojan.defenses.defense import Defense


@pytest.fixture(autouse=True)
def _seed():
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)


@pytest.fixture
def no_checks(monkeypatch, short_searches):
    """What is checked before and after is the same for all methods, and takes as long as these do."""
    monkeypatch.setattr("untrojan.defenses.defense._trusted", lambda model, clean, diagnosis, seed: clean)
    monkeypatch.setattr(Defense, "_checks", lambda *_: [])


@pytest.fixture(params=NETS)
def net(request):
    return build(request.param)


@pytest.fixture
def clean():
    return make_clean()
