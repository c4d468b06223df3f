"""Every test and every example in a docstring starts from the same random state, on one thread.

The networks in them are so small that more threads mostly wait, above all beside other work.
"""

import os

import pytest
import torch

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
