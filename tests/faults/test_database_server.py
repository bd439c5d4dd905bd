"""A real study on PostgreSQL that is restarted or stays away, and on SQLite that another process locks."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from search.storage.database import close_storage, open_storage
from search.storage.studies import find_study
from tests.faults.postgres import Postgres
from tests.support.search_process import Search, command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ("max_samples=24", "num_epochs=4", "warmup_steps=0", "batch_size=2")


@pytest.fixture
def postgres(open_folder: Callable[[], Path]) -> Iterator[Postgres]:
    server = Postgres(open_folder())
    yield server
    server.close()


@pytest.fixture
def search() -> Iterator[Any]:
    started: list[Search] = []

    def start(runs: Path, url: str) -> Search:
        options = ("--trials", "4", "--slots", "1", "--storage", url)
        started.append(Search(command(runs, *options, settings=SETTINGS)))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def curves(url: str) -> dict[int, tuple[str, dict[int, float]]]:
    """(state, reported losses by epoch) of each trial; a lost one and the one that took its work up are one."""
    storage = open_storage(url)
    try:
        trials = find_study(storage, "rsicap_mini").get_trials()
    finally:
        close_storage(storage)
    first = {t.number: t.user_attrs.get("resumes", t.number) for t in trials}
    found = {}
    for trial in trials:
        origin = trial.number
        while first[origin] != origin:
            origin = first[origin]
        found[origin] = (trial.state.name, dict(trial.intermediate_values))
    return found


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[str, dict[int, float]]]:
    """The same study, undisturbed."""
    runs = tmp_path_factory.mktemp("calm")
    url = f"sqlite:///{runs / 'optuna.db'}"
    running = Search(command(runs, "--trials", "4", "--slots", "1", settings=SETTINGS))
    code = running.end()
    running.kill()  # closes its pipe
    assert code == 0
    return curves(url)


def check_resumed(found: Any, calm: Any) -> None:
    """Four trials, and those begun before the stop as if there had been none. A later one has another number than in
    the undisturbed study, since the successor of trial 1 took one, and is sampled by its number."""
    assert len(found) == 4 and {state for state, _ in found.values()} <= {"COMPLETE", "PRUNED"}
    assert found[0] == calm[0] and found[1] == calm[1]


def test_postgresql_restarted(postgres: Postgres, search: Any, calm: Any, tmp_path: Path) -> None:
    url = postgres.new_database()
    running = search(tmp_path, url)
    running.wait_for("trial 0: epoch 2")
    postgres.stop()
    time.sleep(9)
    postgres.start()
    running.wait_for("trial 2: epoch 1")
    postgres.cut()
    assert running.end() == 0
    assert "answers again" in running.output() and "FAIL" not in running.output()
    assert curves(url) == calm


def test_postgresql_away_for_long(
    postgres: Postgres, search: Any, calm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SEARCH_DATABASE_WAIT_S", "5")
    url = postgres.new_database()
    running = search(tmp_path, url)
    running.wait_for("trial 1: epoch 1")
    postgres.stop()
    assert running.end() == 75
    assert "same command" in running.output() and "Traceback" not in running.output()
    postgres.start()
    again = search(tmp_path, url)
    assert again.end() == 0
    check_resumed(curves(url), calm)


def test_sqlite_locked_by_another_process(
    search: Any, calm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SEARCH_DATABASE_WAIT_S", "5")
    url = f"sqlite:///{tmp_path / 'optuna.db'}"
    running = search(tmp_path, url)
    running.wait_for("trial 1: epoch 1")
    other = sqlite3.connect(tmp_path / "optuna.db", isolation_level=None, timeout=30)
    other.execute("BEGIN IMMEDIATE")
    assert running.end() == 75
    assert "locked" in running.output() and "Traceback" not in running.output()
    other.execute("ROLLBACK")
    other.close()
    again = search(tmp_path, url)
    assert again.end() == 0
    check_resumed(curves(url), calm)
