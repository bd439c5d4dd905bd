"""A real study against a real MLflow server that is stopped, started, slow, wrong or silent while the study runs."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow.entities import ViewType
from mlflow.tracking import MlflowClient

from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.storage.studies import find_study
from search.tracking.outbox import Outbox, is_local
from tests.faults.servers import MlflowServer, Proxy
from tests.support.search_process import ROOT, Search, command

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETTINGS = ("max_samples=24", "warmup_steps=0")
TRIALS = 4


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server")
    yield server
    server.stop()


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
    started: list[Search] = []

    def start(runs: Path, uri: str, *more: str, num_epochs: int = 4) -> Search:
        options = ("--trials", str(TRIALS), "--slots", "1", "--tracking-uri", uri, *more)
        started.append(Search(command(runs, *options, settings=(*SETTINGS, f"num_epochs={num_epochs}"))))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def deliver(runs: Path, uri: str) -> subprocess.CompletedProcess[str]:
    where = ["--runs-dir", str(runs), "--tracking-uri", uri]
    return subprocess.run(
        [sys.executable, "-m", "search.deliver", "--study", "rsicap_mini", *where],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def check(runs: Path, uri: str, trials: int = TRIALS) -> None:
    """Every trial that Optuna has ended has one run, ended as it did, with each epoch and each step once, in order."""
    storage = open_storage(f"sqlite:///{runs / 'optuna.db'}")
    study = find_study(storage, "rsicap_mini")
    told = {t.number: t for t in lifecycle.read_trials(study)}
    reported = {t.number: dict(t.intermediate_values) for t in study.get_trials(deepcopy=False)}
    close_storage(storage)
    ended = {n for n, t in told.items() if t.state in ("COMPLETE", "PRUNED")}
    assert len(ended) == trials
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("rsicap_mini")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ACTIVE_ONLY, max_results=1_000)
    (parent,) = [r for r in found if r.data.tags["kind"] == "study"]
    assert parent.info.status == "FINISHED"
    runs_of: dict[int, list[Any]] = {}
    for run in found:
        if run.data.tags["kind"] == "trial":
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id
            runs_of.setdefault(int(run.data.tags["trial"]), []).append(run)
    for number in ended:
        (run,) = runs_of[number]
        assert run.info.status == "FINISHED" and run.info.end_time is not None
        assert run.data.tags["state"] == told[number].state and run.data.tags["reason"] == told[number].reason
        assert set(told[number].config) <= set(run.data.params)
        losses = client.get_metric_history(run.info.run_id, "val_loss")
        expected = [(e, v) for e, v in sorted(reported[number].items()) if math.isfinite(v)]
        resumed = [n for n, t in told.items() if t.attrs.get("resumes") is not None and n == number]
        if not resumed:
            assert [(m.step, m.value) for m in losses] == expected
        steps = [m.step for m in client.get_metric_history(run.info.run_id, "step/loss")]
        assert steps == sorted(set(steps)) and steps
        if not resumed:
            assert steps == list(range(1, steps[-1] + 1))
        kept = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
        assert {"adapted_modules.txt", "facts.json"} <= set(kept)  # and captions, of those that completed
    assert not list((runs / "rsicap_mini" / "spool").glob("*.rejected"))


def test_down_at_the_start_back_in_the_middle_down_at_the_end(
    server: MlflowServer, search: Any, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    # A server takes from 3 to 30 s to start: trials that surely run by then, and still do when it has gone again.
    running = search(runs, server.uri, "--pruner", "none", num_epochs=150)
    assert "no MLflow server answers" in running.wait_for("does not take records now")
    running.wait_for("trial 0: COMPLETE")
    server.start()
    running.wait_for("MLflow answers again after")
    server.stop()
    assert running.end() == 0
    output = running.output()
    assert output.count("does not take records now") <= 2 and "MLflow did not take everything" in output
    log = (runs / "rsicap_mini" / "tuning-log.md").read_text()
    assert "**Missing**: MLflow did not answer" in log and f"**Trials**: {TRIALS}" in log
    outbox = Outbox(runs / "rsicap_mini" / "spool")
    assert outbox.runs()
    away = deliver(runs, server.uri)
    assert away.returncode == 2 and "no MLflow server answers" in away.stderr and outbox.runs()
    server.start()
    done = deliver(runs, server.uri)
    assert done.returncode == 0 and "delivered" in done.stdout, done.stdout + done.stderr
    assert outbox.runs() == []
    check(runs, server.uri)
    assert deliver(runs, server.uri).stdout == "Nothing to deliver.\n"


def test_down_from_start_to_end_and_the_same_command_delivers(
    server: MlflowServer, search: Any, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    running = search(runs, server.uri)
    assert running.end() == 0
    assert "**Missing**" in (runs / "rsicap_mini" / "tuning-log.md").read_text()
    assert all(is_local(run) or run == "study" for run in Outbox(runs / "rsicap_mini" / "spool").runs())
    server.start()
    again = search(runs, server.uri)
    assert again.end() == 0 and "MLflow did not take everything" not in again.output()
    check(runs, server.uri)
    log = (runs / "rsicap_mini" / "tuning-log.md").read_text()
    assert "**Missing**" not in log, "the log is written again"


@pytest.mark.parametrize("seed", range(2))
def test_500_lost_answers_slow_and_silent(seed: int, server: MlflowServer, search: Any, tmp_path: Path) -> None:
    server.start()
    proxy = Proxy(server.port)
    proxy.delay_s = 1.0
    chance = random.Random(seed)
    modes = ("pass", "pass", "pass", "pass", "error", "lose", "slow", "hang")

    def judge(number: int) -> str:
        return chance.choice(modes) if number > 3 else "pass"

    proxy.judge = judge
    try:
        runs = tmp_path / "runs"
        running = search(runs, proxy.uri)
        assert running.end() == 0
        proxy.judge = None
        while Outbox(runs / "rsicap_mini" / "spool").runs():
            done = deliver(runs, proxy.uri)
            assert done.returncode == 0, done.stdout + done.stderr
        assert proxy.requests > 20
        check(runs, server.uri)
    finally:
        proxy.close()


def test_killed_while_the_server_is_away(server: MlflowServer, search: Any, tmp_path: Path) -> None:
    """All processes are killed in the middle of a trial: the same command loses nothing, and doubles nothing."""
    runs = tmp_path / "runs"
    running = search(runs, server.uri)
    running.wait_for("trial 1: epoch 2")
    parent = psutil.Process(running.process.pid)
    for process in [parent, *parent.children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)
    running.end()
    server.start()
    again = search(runs, server.uri)
    assert again.end() == 0
    assert "MLflow did not take everything" not in again.output()
    check(runs, server.uri)
