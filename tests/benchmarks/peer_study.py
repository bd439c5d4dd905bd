"""The peer's search: Optuna asks, each trial is a process of its own, `--jobs` at a time.

    python -m tests.benchmarks.peer_study --study FILE --rows rows.json --trials 32 --runs-dir DIR --jobs 2

As one would write it: `study.optimize` over an objective that runs `tests.benchmarks.peer` and reads its result.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from search import pruning
from search import study_file as studies
from search.sampling.make import make_sampler
from search.sampling.params import suggest
from search.study import Study, fixed_trial
from tests.benchmarks.configs import RESULT

NAME = "peer"


@dataclass(frozen=True, kw_only=True)
class PeerSearch:
    """What every trial's process is given."""

    definition: Study
    rows: Path
    runs_dir: Path
    pruner: str
    threads: int
    logging_steps: int
    nudge: float = 0.0

    @property
    def storage_url(self) -> str:
        return f"sqlite:///{self.runs_dir / 'optuna.db'}"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.runs_dir / 'mlflow.db'}"

    def objective(self, trial: optuna.Trial) -> float:
        """The trial's lowest validation loss.

        Raises:
            optuna.TrialPruned: its process ended it early, and its best does not count.
            RuntimeError: its process failed; names its output.
        """
        params = suggest(trial, self.definition)
        out = self.runs_dir / f"trial-{trial.number:03d}"
        out.mkdir()
        config = self.definition.config(params)
        (out / "config.json").write_text(config.model_dump_json(), encoding="utf-8")
        command = self._command(trial.number, out)
        with (out / "output.txt").open("w") as output:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=self._environment(), check=False
            )
        if code.returncode:
            raise RuntimeError(f"trial {trial.number} ended with exit code {code.returncode}, see {out}/output.txt")
        result = json.loads((out / RESULT).read_text(encoding="utf-8"))
        if self.pruner == "none":  # otherwise its process reported them
            for epoch, loss in enumerate(result["val_losses"], 1):
                trial.report(loss, epoch)
        best = min(filter(math.isfinite, result["val_losses"]), default=math.nan)
        if result["state"] == "PRUNED" or math.isnan(best):
            raise optuna.TrialPruned
        return best

    def _command(self, number: int, out: Path) -> list[str]:
        command: list[Any] = [sys.executable, "-m", "tests.benchmarks.peer", "--config", out / "config.json"]
        command += ["--rows", self.rows, "--trial", number, "--out", out, "--logging-steps", self.logging_steps]
        command += ["--tracking-uri", self.tracking_uri, "--experiment", NAME, f"--nudge={self.nudge}"]
        if self.pruner != "none":
            command += ["--storage", self.storage_url, "--study", NAME, "--pruner", self.pruner]
        return [str(part) for part in command]

    def _environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }


def run(search: PeerSearch, trials: int, jobs: int) -> optuna.Study:
    """All trials; both databases are there before the first process starts, which would race to create them."""
    import mlflow

    search.runs_dir.mkdir(parents=True)
    mlflow.set_tracking_uri(search.tracking_uri)
    mlflow.set_experiment(NAME)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=NAME,
        storage=search.storage_url,
        sampler=make_sampler(search.definition, "joint"),
        pruner=pruning.pruner_for(search.pruner, search.definition),
    )
    for fixed in search.definition.enqueue[:trials]:
        params, _ = fixed_trial(search.definition, fixed)
        study.enqueue_trial(params, user_attrs={"label": fixed.label})
    # On SQLite two of Optuna's threads can be given the same waiting trial.
    lock, ask = threading.Lock(), study.ask

    def one_at_a_time() -> optuna.Trial:
        with lock:
            return ask()

    setattr(study, "ask", one_at_a_time)  # noqa: B010 - a method is not assigned to
    study.optimize(search.objective, n_trials=trials, n_jobs=jobs)
    return study


def main() -> None:
    """Run the study of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", required=True, help="study file")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--trials", type=int, required=True)
    parser.add_argument("--runs-dir", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--threads", type=int, default=1, help="BLAS threads of each")
    parser.add_argument("--workers", type=int, default=0, help="DataLoader processes of each")
    parser.add_argument("--pruner", default="none")
    parser.add_argument("--logging-steps", type=int, default=1)
    parser.add_argument("--nudge", type=float, default=0.0, help="see tests.benchmarks.peer")
    options = parser.parse_args()
    search = PeerSearch(
        definition=studies.load(options.study).with_settings([f"num_workers={options.workers}"]),
        rows=options.rows,
        runs_dir=options.runs_dir,
        pruner=options.pruner,
        threads=options.threads,
        logging_steps=options.logging_steps,
        nudge=options.nudge,
    )
    run(search, options.trials, options.jobs)


if __name__ == "__main__":
    main()
