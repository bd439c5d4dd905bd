"""What a study of 1,000 runs costs to read: `python -m tests.benchmarks.mlflow_scale [--runs 1000] [--steps 500]`.

One run is recorded as a trial records it; its rows are copied in the database, and Optuna gets a trial for each. Then
the report, the leaderboard and MLflow's UI are asked as a user asks them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy as sa
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from search import leaderboard, records
from search import study_file as studies
from search.reading import read_study
from search.report.write import refresh
from search.storage.database import close_storage, open_storage
from search.storage.lifecycle import read_trials
from search.storage.studies import open_study
from search.tracking.client import Tracking, open_tracking
from search.tracking.pages import runs_page
from tests.benchmarks.tracking_cost import _copy
from tests.faults.servers import MlflowServer
from tests.search.tracking.recorded import whole_run

EPOCHS = 15
NAME = "rsicap_mini"


def timed(what: str, do: Callable[[], Any], limit_s: float | None = None) -> Any:
    """Do it, and print how long it took."""
    began, cpu = time.perf_counter(), time.process_time()
    result = do()
    wall = time.perf_counter() - began
    print(f"{what:<58} {wall:8.2f} s  {time.process_time() - cpu:7.2f} s CPU", flush=True)
    assert limit_s is None or wall < limit_s, f"{what} took {wall:.1f} s"
    return result


def fill(folder: Path, runs: int, steps: int) -> tuple[Tracking, str]:
    """MLflow's database and Optuna's, both with `runs` trials."""
    tracking = open_tracking(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts")
    definition = studies.load(NAME)
    config = definition.base_config()
    experiment, parent = tracking.experiment(NAME), tracking.parent_run(NAME, {})
    first = tracking.start_run(experiment, parent, name="trial", config=config.model_dump(), tags={"trial": "0"})
    recorder = tracking.recorder(first)
    for event in whole_run(EPOCHS, steps // EPOCHS):
        recorder(event)
    recorder.finish("FINISHED", state="COMPLETE", reason="finished")
    _copy(folder / "mlflow.db", first, runs - 1)
    engine = sa.create_engine(tracking.uri)
    with engine.connect() as connection:
        every = f"SELECT run_uuid FROM tags WHERE key = 'kind' AND value = 'trial' LIMIT {runs}"
        ids = [row[0] for row in connection.execute(sa.text(every))]
    engine.dispose()
    storage = open_storage(f"sqlite:///{folder / 'optuna.db'}")
    study = open_study(storage, definition)
    distribution = FloatDistribution(1e-6, 1e-3, log=True)
    now = datetime.now()
    for number, run_id in enumerate(ids):
        rate = 1e-6 * 10 ** (3 * number / max(1, len(ids) - 1))
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE,
                value=1.5,
                params={"learning_rate": rate},
                distributions={"learning_rate": distribution},
                intermediate_values=dict.fromkeys(range(1, EPOCHS + 1), 1.5),
                user_attrs={
                    records.CONFIG: {**config.model_dump(mode="json"), "learning_rate": rate},
                    records.RUN_ID: run_id,
                    records.REASON: records.FINISHED,
                    records.BEST_EPOCH: 1,
                    records.TRAIN_LOSSES: [2.0 / e for e in range(1, EPOCHS + 1)],
                },
            )
        )
    assert study.trials[-1].datetime_start is None or study.trials[-1].datetime_start < now + timedelta(days=1)
    close_storage(storage)
    return tracking, experiment


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """A request as MLflow's pages make it."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())


def pages(folder: Path, experiment: str) -> None:
    """What the runs page of the study asks: the first hundred runs, and the curves of twenty of them."""
    server = MlflowServer(folder / "server")
    server.database = f"sqlite:///{folder / 'mlflow.db'}"
    timed("mlflow server, until it answers", server.start)
    try:
        api = f"{server.uri}/ajax-api/2.0/mlflow"
        search = {
            "experiment_ids": [experiment],
            "filter": "tags.kind = 'trial'",
            "order_by": ["metrics.`val_loss` ASC"],
            "max_results": 100,
        }
        found = timed("UI: a page of 100 runs by val_loss", lambda: ask(f"{api}/runs/search", search), 30)
        ids = [run["info"]["run_id"] for run in found["runs"]]
        assert len(ids) == 100
        timed("UI: one run's page", lambda: ask(f"{api}/runs/get?run_id={ids[0]}"), 30)
        chosen = "&".join(f"run_ids={run_id}" for run_id in ids[:20])
        for key in ("val_loss", "step/loss"):
            query = f"{api}/metrics/get-history-bulk-interval?{chosen}&metric_key={key}&max_results=320"
            curves = timed(f"UI: chart of {key}, 20 runs", lambda query=query: ask(query), 30)  # type: ignore[misc]
            assert len(curves["metrics"]) >= 20 * EPOCHS
        print(f"page: {runs_page(server.uri, experiment)}")
    finally:
        server.stop()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1_000)
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tracking, experiment = timed(
            f"fill both databases with {arguments.runs} trials", lambda: fill(folder, arguments.runs, arguments.steps)
        )
        print(f"mlflow.db: {os.path.getsize(folder / 'mlflow.db') / 2**20:.0f} MiB")
        storage = open_storage(f"sqlite:///{folder / 'optuna.db'}")
        study = optuna.load_study(study_name=NAME, storage=storage)
        trials = timed("leaderboard: Optuna's trials", lambda: read_trials(study), 30)
        timed("leaderboard: its text", lambda: leaderboard.as_text(trials), 30)
        record = timed("read_study: all curves of all runs", lambda: read_study(study, tracking), 120)
        steps = sum(len(t.steps) for t in record.trials)
        assert len(record.trials) == arguments.runs and steps >= arguments.runs * (arguments.steps // EPOCHS) * EPOCHS
        timed("tuning log, two languages, with plots", lambda: refresh(record, folder / "log"), 120)
        command = [sys.executable, "-m", "search.report", "--study", NAME, "--runs-dir", str(folder)]
        timed("python -m search.report", lambda: subprocess.run(command, check=True, capture_output=True), 180)
        pages(folder, experiment)
        close_storage(storage)


if __name__ == "__main__":
    main()
