import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from untrojan.errors import UnreliableWarning
from untrojan.run import collected, environment, peak_memory


def test_surroundings():
    assert set(environment()) == {"untrojan", "python", "torch", "platform", "threads", "device"}
    assert all(environment().values())
    assert peak_memory() > 10**7


@pytest.mark.parametrize("ends", [True, False])
def test_warnings_are_collected_and_given_on_whether_the_run_ends_or_raises(ends):
    with pytest.warns(UnreliableWarning, match="little"):  # noqa: PT031
        try:
            with collected() as warned:
                warnings.warn(UnreliableWarning("this stands on little"), stacklevel=1)
                1 / ends
        except ZeroDivisionError:
            assert not ends
        else:
            assert warned == ["this stands on little"]


def test_peak_memory_is_that_of_the_process_itself_however_large_the_one_that_started_it():
    held = torch.zeros(100_000_000)
    script = "from untrojan.run import peak_memory; print(peak_memory())"
    child = int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True).stdout)
    assert child < held.nbytes < peak_memory()


@pytest.mark.skipif(sys.platform != "linux", reason="falls back to the resource usage elsewhere")
def test_peak_memory_without_the_kernels_account(monkeypatch: pytest.MonkeyPatch):
    real = peak_memory()
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "VmPeak: 1 kB\n")
    assert peak_memory() >= real
