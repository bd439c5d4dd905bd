"""Several searches share one study, as if on several hosts; one of them is lost as a whole."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search import records
from tests.faults.harness import Place, check_records, write_study
from tests.search.storage.databases import new_database, postgres
from tests.support.search_process import PATIENCE_S, ROOT, Search

__all__ = ["postgres"]

Start = Callable[[list[str]], Search]
EPOCHS = 60


def on_host(name: str, command: list[str]) -> list[str]:
    """The command as on a host of this name."""
    return ["unshare", "--uts", "sh", "-c", f'hostname {name} && exec "$@"', "sh", *command]


IN_A_CONTAINER = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""Before a command: with process ids of its own, and the host's name, as a container on the host's network."""


@pytest.fixture
def containers() -> None:
    if subprocess.run([*IN_A_CONTAINER, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to give processes process ids of their own")


@pytest.fixture
def hosts() -> None:
    if subprocess.run(["unshare", "--uts", "hostname", "x"], capture_output=True).returncode:
        pytest.skip("needs the right to give processes a host name of their own")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An MLflow server's URI."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *store],
            stdout=log,
            stderr=log,
            cwd=ROOT,
            start_new_session=True,
        )
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=2):
                break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.5)
    yield uri
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("hosts")
def test_the_others_take_over_a_lost_hosts_trials_once(
    request: pytest.FixtureRequest,
    tiny_checkpoint: Path,
    tmp_path: Path,
    start: Start,
    bench: Any,
    server: str,
) -> None:
    """Three hosts begin at once on empty databases; all processes of one are killed; nobody is restarted."""
    place = Place(tmp_path / "runs", new_database(request.getfixturevalue("postgres")), server)
    file = write_study(tmp_path, tiny_checkpoint, trials=6, num_epochs=EPOCHS)
    command = place.command(file, "--lost-after", "15s")
    searches = {name: start(on_host(name, command)) for name in ("one", "two", "three")}
    searches["two"].wait_for("epoch 3:")
    os.killpg(searches["two"].process.pid, signal.SIGKILL)
    for name in ("one", "three"):
        assert searches[name].end() == 0, searches[name].output()
    trials = place.trials
    lost = [t for t in trials if t.state == "FAIL"]
    assert lost and {t.attrs[records.WORKER]["host"] for t in lost} == {"two"}
    taken = [t for t in trials if records.RESUMES in t.attrs]
    assert sorted(t.attrs[records.RESUMES] for t in taken) == [t.number for t in lost], "not once each"
    assert {t.attrs[records.WORKER]["host"] for t in trials if t.state == "COMPLETE"} == {"one", "three"}
    said = "\n".join(search.output() for search in searches.values())
    assert Counter(line for line in said.splitlines() if "was lost: process" in line).most_common(1)[0][1] == 1
    check_records(place, bench, num_trials=6, num_epochs=EPOCHS)


@pytest.mark.slow
def test_two_searches_on_one_machine(tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any) -> None:
    """The same command twice, on SQLite: they share the trials, and neither takes the other's for lost."""
    place = Place(tmp_path / "runs")
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=4, num_epochs=30))
    searches = [start(command), start(command)]
    for search in searches:
        assert search.end() == 0, search.output()
    trials = place.trials
    assert [t.state for t in trials] == ["COMPLETE"] * 4
    assert len({t.attrs[records.WORKER]["pid"] for t in trials}) == 2
    check_records(place, bench, num_trials=4, num_epochs=30)


@pytest.mark.slow
@pytest.mark.usefixtures("containers")
def test_two_containers_of_one_host_name_leave_each_others_trials_alone(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any
) -> None:
    """Neither sees the other's processes, whose host is called as its own: heartbeats decide."""
    place = Place(tmp_path / "runs")
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=4, num_epochs=40))
    first = start([*IN_A_CONTAINER, *command])
    first.wait_for("trial 0: epoch 1:")
    second = start([*IN_A_CONTAINER, *command])
    for search in (first, second):
        assert search.end() == 0, search.output()
        assert "was lost" not in search.output()
    trials = place.trials
    assert [t.state for t in trials] == ["COMPLETE"] * 4
    workers = [t.attrs[records.WORKER] for t in trials]
    assert len({w["host"] for w in workers}) == 1 and len({w["pid_namespace"] for w in workers}) == 2
    check_records(place, bench, num_trials=4, num_epochs=40)


@pytest.mark.slow
def test_a_search_waits_for_another_and_takes_its_trial_over(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any
) -> None:
    """One trial, two searches: the idle one waits, and goes on with the trial when the other is killed."""
    place = Place(tmp_path / "runs")
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=120))
    first = start(command)
    first.wait_for("trial 0: epoch 1:")
    second = start(command)
    second.wait_for("No trials left to start; waiting for 1 running elsewhere")
    os.killpg(first.process.pid, signal.SIGKILL)
    assert second.end() == 0, second.output()
    assert "after epoch" in second.wait_for("trial 1: learning_rate")
    check_records(place, bench, num_trials=1, num_epochs=120)
