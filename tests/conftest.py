"""Fixtures that several test files share; those that examples in docstrings need too are one folder up."""

import random

import numpy as np
import pytest
from tiny import NETS, build, make_clean


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
