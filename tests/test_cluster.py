"""Grids on Ray: a real cluster of two nodes on this machine, where a worker is killed in the middle of its cell."""

import os
import signal
import sys

import pytest
from grids import SPOILS, Here, make_grid
from test_grid import results_in

from untrojan.cli import run as command
from untrojan.errors import ConfigError
from untrojan.lab.cluster import Cluster
from untrojan.lab.grid import Grid
from untrojan.lab.runner import run
from untrojan.lab.work import Answer, work


def test_without_ray_its_option_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'untrojan\[cluster\]'"):
        Cluster("auto")


@pytest.fixture(scope="module")
def address():
    """Where a cluster of two nodes with one core each is, of which one says that it has a GPU."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster as Nodes  # pyright: ignore[reportMissingImports]

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    nodes = Nodes(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes.add_node(num_cpus=1, num_gpus=1)
    nodes.wait_for_nodes()
    yield nodes.address
    nodes.shutdown()


class DiesOnce:
    """Works, but the process that gets a cell first is killed in the middle of it."""

    def __init__(self, marker):
        self.marker = marker

    def __call__(self, job):
        if job.scan is not None and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return work(job)


def fails(job):
    raise ArithmeticError("on purpose")


def answer_with_gpus(job):
    return Answer(os.environ.get("CUDA_VISIBLE_DEVICES"))


def answer_with_folder(job):
    return Answer(f"{job} in {os.getcwd()}")  # noqa: PTH109


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_grid_on_a_cluster_gives_the_same_table_though_a_worker_is_killed(address, tmp_path):
    cells = Grid.load(make_grid(tmp_path, models=("one", "two"), defenses=SPOILS[:2], seeds=(0, 1))).cells()
    run(cells, tmp_path / "calm", Here())
    pool = Cluster(address, work=DiesOnce(tmp_path / "died"))
    assert pool.size == 2
    assert run(cells, tmp_path / "cluster", pool) == (8, [])
    assert (tmp_path / "died").exists()
    assert results_in(tmp_path / "cluster") == results_in(tmp_path / "calm")


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_job_runs_where_the_grid_was_started_and_may_fail(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for job, what, said in (("a", answer_with_folder, f"a in {tmp_path}"), ("b", fails, "on purpose")):
        pool = Cluster(address, size=1, work=what)
        pool.start(job)
        told, answer = pool.wait()
        pool.close()
        assert told == job
        assert said in (answer.text or answer.error)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("gpus", "size", "seen"), [(0.5, 2, "0"), (1, 1, "0"), (0, 2, "")])
def test_a_job_sees_the_gpu_it_is_given(address, gpus, size, seen):
    pool = Cluster(address, gpus=gpus, work=answer_with_gpus)
    assert pool.size == size
    pool.start("a")
    _, answer = pool.wait()
    pool.close()
    assert (answer.text or "") == seen


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_more_gpus_than_there_are_are_told(address):
    with pytest.raises(ConfigError, match="too few GPUs"):
        Cluster(address, gpus=2)


def test_without_ray_there_is_no_cluster(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command(["bench", "run", str(make_grid(tmp_path)), "--out", str(tmp_path / "out"), "--ray", "auto"]) == 4
    assert "--ray needs Ray" in capsys.readouterr().err


def test_gpus_are_of_ray(tmp_path, capsys):
    assert command(["bench", "run", str(make_grid(tmp_path)), "--out", str(tmp_path / "out"), "--gpus", "0.5"]) == 4
    assert "--gpus is what Ray gives" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_the_command_runs_on_a_cluster(address, tmp_path, capsys):
    file = make_grid(tmp_path, defenses=SPOILS[:1])
    assert command(["bench", "run", str(file), "--out", str(tmp_path / "out"), "--ray", address, "-q"]) == 0
    assert "1 cell: 1 done now" in capsys.readouterr().out


@pytest.mark.filterwarnings("default")
def test_a_cluster_that_is_not_there_is_told_so():
    pytest.importorskip("ray")
    with pytest.raises(ConfigError, match="cannot reach a Ray cluster at nonsense"):
        Cluster("nonsense")
