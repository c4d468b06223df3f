"""Run the cells of a benchmark side by side, in processes of their own."""

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

import untrojan
from untrojan.lab.processes import end_with_parent


def side_by_side(run: Callable[[Any], None], cells: Sequence[Any], jobs: int, threads: int = 1) -> int:
    """Run all cells, so many at a time, each on so many threads; tell those that fail, and give how many these are."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with multiprocessing.get_context("spawn").Pool(jobs, _begin, [threads]) as pool:
        return sum(pool.map(partial(_fails, run), cells, chunksize=1))


def _begin(threads: int) -> None:
    end_with_parent()
    torch.set_flush_denormal(True)  # as the command line does
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", untrojan.UntrojanWarning)


def _fails(run: Callable[[Any], None], cell: Any) -> bool:
    try:
        run(cell)
    except Exception:
        print(cell, traceback.format_exc()[-600:], flush=True)
        return True
    return False
