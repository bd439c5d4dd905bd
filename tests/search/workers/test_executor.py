"""Where workers run: the GPUs of each, and the layout of a Ray cluster. Nothing here starts Ray."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from search.errors import StorageError, StudyError
from search.workers import pool
from search.workers.executor import Executor
from search.workers.pool import WorkerPool, device_groups
from search.workers.ray_layout import Layout, Node, check_shared, lay_out, node_of
from search.workers.ray_pool import RayPool, _reason
from studies.rsicap_mini import STUDY as MINI
from tests.bad_input import harness

SPREAD = replace(MINI, base={**MINI.base, "device_map": "auto"})
FILES = {"--storage": "sqlite:///runs/optuna.db", "--tracking-uri": "sqlite:///runs/mlflow.db"}
SERVERS = {"--storage": "postgresql+psycopg://u:p@db/o", "--tracking-uri": "http://mlflow:5000"}


@pytest.mark.parametrize(
    ("devices", "size", "groups"),
    [
        ([], 1, []),
        (["0", "1"], 1, ["0", "1"]),
        (["0", "1", "2", "3", "4"], 2, ["0,1", "2,3"]),
        (["7", "3"], 2, ["7,3"]),
    ],
)
def test_gpus_of_each_worker(devices: list[str], size: int, groups: list[str]) -> None:
    assert device_groups(devices, size) == groups


def test_a_machine_without_enough_gpus_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "gpus", lambda: ["0"])
    with pytest.raises(StudyError, match="--gpus-per-worker 2: this machine has 1 GPU that"):
        WorkerPool(1, 1, 2)


def test_one_worker_for_each_group_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    assert Executor().pool(FILES).size == 4
    assert Executor(gpus_per_worker=2).pool(FILES).size == 2
    assert Executor(gpus_per_worker=2, workers=1).pool(FILES).size == 1


def test_options_that_do_not_go_together() -> None:
    Executor(gpus_per_worker=2).check(SPREAD)
    with pytest.raises(StudyError, match="leaves the others idle; spread it with --set device_map=auto"):
        Executor(gpus_per_worker=2).check(MINI)
    with pytest.raises(StudyError, match="--ray-address h:1 needs --executor ray"):
        Executor(ray_address="h:1").check(MINI)


def test_the_command_line_says_so(tmp_path: Any) -> None:
    with harness.no_workers():
        outcome = harness.search(["--study", "rsicap_mini", "--runs-dir", str(tmp_path), "--gpus-per-worker", "2"])
    outcome.check_refused("--set device_map=auto")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("nodes", "workers", "gpus", "expected"),
    [
        ([(4, 0)], None, 1, Layout(1, 4, 0)),
        ([(4, 0), (2, 0)], None, 1, Layout(2, 2, 0)),
        ([(1, 0), (1, 0), (1, 0)], 2, 1, Layout(2, 1, 0)),
        ([(8, 0), (8, 0)], 4, 1, Layout(4, 4, 0)),
        ([(2, 0)], 16, 1, Layout(16, 1, 0)),
        # One worker a GPU, and no node in which they would ask for more CPUs than it has.
        ([(4, 0), (16, 4), (8, 4)], None, 1, Layout(8, 2, 1)),
        ([(16, 4), (8, 1)], None, 2, Layout(2, 8, 2)),
        ([(0, 0), (4, 0)], None, 1, Layout(1, 4, 0)),  # a head that takes no work
    ],
)
def test_workers_of_a_cluster(nodes: list[tuple[int, int]], workers: int | None, gpus: int, expected: Layout) -> None:
    assert lay_out([Node(*node) for node in nodes], workers, gpus) == expected


def test_a_cluster_without_a_node_for_a_worker_is_refused() -> None:
    with pytest.raises(StudyError, match=r"needs 4 GPUs and 1 CPU, and the largest of 2 nodes has 2 GPUs; lower"):
        lay_out([Node(8, 2), Node(8, 1)], None, 4)
    assert node_of({"CPU": 8.0, "GPU": 2.0, "memory": 1e9}) == Node(8, 2)
    assert node_of({"memory": 1e9}) == Node(0, 0)


def test_files_are_refused_on_several_nodes() -> None:
    check_shared(FILES, 1)
    check_shared(SERVERS, 9)
    with pytest.raises(StorageError) as error:
        check_shared(FILES, 2)
    assert "--storage sqlite:///runs/optuna.db, --tracking-uri sqlite:///runs/mlflow.db" in str(error.value)
    with pytest.raises(StorageError, match=r"cannot share a SQLite file \(--tracking-uri sqlite"):
        check_shared({**SERVERS, "--tracking-uri": "sqlite:///x"}, 2)


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=r"pip install 'lora-search\[ray\]'"), RayPool(None, 1, None, FILES):
        pass


def test_what_ray_said_about_a_worker_counts_on_other_hosts_only() -> None:
    on_ray = RayPool(1, 1, None, FILES)
    there = {"host": "elsewhere", "pid": 7, "started_s": 100.0}
    assert on_ray.alive(there) is None
    on_ray.lost(there)
    assert on_ray.alive({**there, "started_s": 100.4}) is False
    assert on_ray.alive({**there, "started_s": 900.0}) is None  # another process has its number
    assert on_ray.alive({**there, "pid": 8}) is None


def test_rays_reasons_are_one_line() -> None:
    reason = "The actor died because its node has died"
    text = f"The actor died unexpectedly before finishing this task.\n\tpid: 9\n{reason}. Node Id: 1b0e\n\t"
    assert _reason(RuntimeError(text)) == reason
    assert _reason(RuntimeError("")) == "RuntimeError"


def test_where_no_socket_can_be_made_workers_import_themselves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A socket's address has some hundred characters at most, and lies below TMPDIR."""
    pool.end_fork_server()  # another test's: it would need no socket
    monkeypatch.setattr(pool, "gpus", list)
    monkeypatch.setattr("multiprocessing.util.get_temp_dir", lambda: str(tmp_path / ("x" * 100)))
    asked: list[str] = []
    context = pool.multiprocessing.get_context
    monkeypatch.setattr(
        pool.multiprocessing, "get_context", lambda m: context(m) if m == "forkserver" else Pretended(asked, m)
    )
    workers = WorkerPool(1, 1)
    with workers.importing():
        workers.take(0)[1].close()
    assert asked == ["spawn"]


def test_ctrl_c_does_not_reach_a_worker_that_still_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent to all processes of a terminal; a new one would print where its imports were interrupted."""
    monkeypatch.setattr(pool, "gpus", lambda: ["0"])
    blocked: set[int] = set()

    class Starting(Pretended):
        def start(self) -> None:
            blocked.update(signal.pthread_sigmask(signal.SIG_BLOCK, ()))

    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda method: Starting([], method))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    WorkerPool(1, 1).take(0)[1].close()
    assert {signal.SIGINT, signal.SIGHUP} <= blocked
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before


def test_workers_with_gpus_start_before_model_and_data_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import meanwhile; those that are given no job are ended, also if the look finds a fault."""
    monkeypatch.setattr(pool, "gpus", lambda: ["0", "1"])
    asked: list[str] = []
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda method: Pretended(asked, method))
    workers = WorkerPool(2, 1)
    with pytest.raises(StudyError, match="no data"), workers.importing():
        assert asked == ["spawn", "spawn"]
        with workers:
            process, link = workers.take(0)
            link.close()
            assert asked == ["spawn", "spawn"] and process.exitcode is None
            raise StudyError("no data")
    assert process.exitcode is None and asked == ["spawn", "spawn", "killed"]


class Pretended:
    """A context of `multiprocessing` that starts nothing; `asked` takes the methods that it is asked for."""

    def __init__(self, asked: list[str], method: str, fault: type[Exception] | None = None) -> None:
        asked.append(method)
        self._asked = asked
        self.exitcode: int | None = None
        self.fault = fault if method == "forkserver" else None

    def Pipe(self) -> tuple[Any, Any]:
        return open("/dev/null"), open("/dev/null")

    def Process(self, **_: Any) -> Any:
        return self

    def start(self) -> None:
        if self.fault is not None:
            raise self.fault

    def kill(self) -> None:
        self._asked.append("killed")

    def join(self) -> None: ...


@pytest.mark.parametrize("fault", [EOFError, ConnectionRefusedError])
def test_a_fork_that_fails_is_a_spawn_instead(monkeypatch: pytest.MonkeyPatch, fault: type[Exception]) -> None:
    """The process that workers are forked from may be killed at this very moment."""
    asked: list[str] = []
    monkeypatch.setattr(pool, "gpus", list)
    monkeypatch.setattr(pool.multiprocessing, "get_context", lambda method: Pretended(asked, method, fault))
    workers = WorkerPool(1, 1)
    for _ in range(2):
        _, link = workers.take(0)
        link.close()
    assert asked == ["forkserver", "spawn", "spawn"]
