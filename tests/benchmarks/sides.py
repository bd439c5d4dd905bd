"""The two sides of a comparison: starting them as a user would, timing them, reading what they recorded."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from search import study_file as studies
from search.study import Study, fixed_trial
from tests.benchmarks import configs, peer_study

ROOT = Path(__file__).resolve().parents[2]
FIRST_STEPS = 8
"""So many training losses of each trial are compared one by one, before rounding can have grown."""


@dataclass(frozen=True, kw_only=True)
class TrialLosses:
    """What a side recorded of one trial."""

    val: tuple[float, ...]
    """By epoch."""
    first: tuple[float, ...]
    """Training loss of the first steps, `FIRST_STEPS` at most."""
    state: str
    began_at: float = field(default=math.nan, compare=False)
    """When, as `time.time` has it."""
    ended_at: float = field(default=math.nan, compare=False)

    @property
    def best(self) -> float:
        """Lowest validation loss, inf if none was finite."""
        return min(filter(math.isfinite, self.val), default=math.inf)


@dataclass(frozen=True, kw_only=True)
class Ran:
    """One timed run of a side."""

    wall_s: float
    load: float
    """The machine's load average of the minute before: what else ran."""
    trials: Mapping[str, TrialLosses] = field(default_factory=dict)
    """By label."""
    began_at: float = math.nan
    """When, as `time.time` has it."""
    cut: bool = False
    """It was ended at its limit; `trials` are those that had ended by then."""

    @property
    def first_s(self) -> float:
        """Seconds from its start to that of its first trial."""
        return min(trial.began_at for trial in self.trials.values()) - self.began_at

    @property
    def last_s(self) -> float:
        """Seconds from its start to the end of the last of `trials`."""
        return max(trial.ended_at for trial in self.trials.values()) - self.began_at

    @property
    def epochs(self) -> int:
        """Epochs trained, by all trials together."""
        return sum(len(trial.val) for trial in self.trials.values())

    @property
    def best(self) -> float:
        """The study's lowest validation loss."""
        return min((trial.best for trial in self.trials.values()), default=math.inf)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """One study to be measured: its file, its rows, and a folder for everything that is written."""

    folder: Path
    trials: int
    ours: tuple[str, ...]
    """Further options of `search.run`."""
    peer: tuple[str, ...]
    """Further options of `tests.benchmarks.peer_study`."""
    limit_s: float | None = None
    """Seconds after which a side is ended, with all that it has started, and cut; None for no limit."""

    @property
    def study_file(self) -> Path:
        return self.folder / "bench.py"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.json"

    def definition(self) -> Study:
        """The study as its file defines it."""
        return studies.load(str(self.study_file))

    def run_ours(self, name: str, pruner: str, *options: str) -> Ran:
        """The search, with an empty cache: features are computed within the time."""
        runs = self.folder / name
        command = ["-m", "search.run", "--study", self.study_file, "--trials", self.trials, "--runs-dir", runs]
        # What the peer does not do: repeats, captions, configurations of our own.
        command += ["--strategy", "joint", "--no-confirm", "--captions", "0"]
        ran = self._timed(name, [*command, "--pruner", pruner, *self.ours, *options])
        if ran.cut:
            return replace(ran, trials=read_ended(runs, configs.NAME))
        trials = read(runs, configs.NAME, lambda number, run: run == str(number), "trial", "step/loss")
        return replace(ran, trials=trials)

    def run_peer(self, name: str, pruner: str, *options: str) -> Ran:
        """The peer's search."""
        runs = self.folder / name
        command = ["-m", "tests.benchmarks.peer_study", "--study", self.study_file, "--rows", self.rows]
        command += ["--trials", self.trials, "--runs-dir", runs, "--pruner", pruner]
        ran = self._timed(name, [*command, *self.peer, *options])
        return replace(ran, trials=read_ended(runs, peer_study.NAME) if ran.cut else self._read_peer(runs))

    def nudge_peer(self, name: str, labels: Sequence[str], nudge: float) -> Mapping[str, TrialLosses]:
        """The losses of some of the peer's trials with their start moved by as much as rounding. Not timed."""
        runs = self.folder / name
        chosen = [fixed for fixed in self.definition().enqueue if fixed.label in labels]
        text = self.study_file.read_text(encoding="utf-8")
        file = self.folder / f"{name}.py"
        # The same file; the trials left out are dropped after it is loaded.
        file.write_text(
            f"{text}\nfrom dataclasses import replace\n"
            f"STUDY = replace(STUDY, enqueue=tuple(f for f in STUDY.enqueue if f.label in {list(labels)!r}))\n",
            encoding="utf-8",
        )
        command = ["-m", "tests.benchmarks.peer_study", "--study", file, "--rows", self.rows, "--trials", len(chosen)]
        self._timed(name, [*command, "--runs-dir", runs, f"--nudge={nudge}", *self.peer])
        return self._read_peer(runs)

    def run_each(self, name: str, jobs: int, *settings: str) -> Ran:
        """Our trainer in a process of its own for each trial, `jobs` at a time: no search, no tracking, no packing."""
        definition = self.definition().with_settings(settings)
        threads = max(1, len(os.sched_getaffinity(0)) // jobs)

        def one(number: int) -> None:
            params, overrides = fixed_trial(definition, definition.enqueue[number])
            command: list[Any] = ["-m", "trainer.run", "--out", self.folder / name / f"{number:03d}"]
            for key, value in definition.config(params, overrides).model_dump().items():
                text = ",".join(value) if isinstance(value, tuple) else "none" if value is None else value
                command += ["--set", f"{key}={text}"]
            self._start(f"{name}-{number:03d}", command, cache=name, threads=threads)

        began, load = time.perf_counter(), os.getloadavg()[0]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, range(self.trials)))
        return Ran(wall_s=time.perf_counter() - began, load=load)

    def _read_peer(self, runs: Path) -> Mapping[str, TrialLosses]:
        return read(runs, peer_study.NAME, lambda number, run: run == f"trial {number:03d}", "mlflow.runName", "loss")

    def _timed(self, name: str, command: Sequence[Any]) -> Ran:
        load, began, began_at = os.getloadavg()[0], time.perf_counter(), time.time()
        cut = False
        try:
            self._start(name, command)
        except subprocess.TimeoutExpired:
            cut = True
        return Ran(wall_s=time.perf_counter() - began, load=load, began_at=began_at, cut=cut)

    def _start(self, name: str, command: Sequence[Any], cache: str | None = None, threads: int | None = None) -> None:
        """Run to the end, with a cache of its own that begins empty.

        Raises:
            SystemExit: it failed; with the end of its output.
            TimeoutExpired: it was ended at the limit.
        """
        output = self.folder / f"{name}.txt"
        cached = self.folder / f"{cache or name}-cache"
        cached.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "LORA_SEARCH_CACHE": str(cached)}
        environment |= {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
        environment.pop("OMP_NUM_THREADS", None)  # both sides say themselves how many each of their processes takes
        if threads is not None:
            environment["OMP_NUM_THREADS"] = str(threads)
        with output.open("w") as stream:
            arguments = [sys.executable, *map(str, command)]
            side = subprocess.Popen(
                arguments,
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=self.limit_s is not None,
            )
            try:
                code = side.wait(self.limit_s)
            except BaseException:
                if self.limit_s is None:
                    side.kill()
                else:
                    os.killpg(side.pid, signal.SIGKILL)
                side.wait()
                raise
        if code:
            tail = "\n".join(output.read_text(encoding="utf-8").splitlines()[-15:])
            raise SystemExit(f"{name} ended with exit code {code}:\n{tail}\nall of it in {output}")


def read(
    runs: Path, study_name: str, is_run: Callable[[int, str], bool], tag: str, key: str
) -> dict[str, TrialLosses]:
    """A side's trials by label, from its two databases.

    Args:
        is_run: Whether a run whose `tag` has this value is that of the trial with this number.
        key: The metric that holds the training loss of each step.
    """
    import optuna
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{runs / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(study_name)
    assert experiment is not None, study_name
    tagged = {run.data.tags.get(tag, ""): run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    study = optuna.load_study(study_name=study_name, storage=f"sqlite:///{runs / 'optuna.db'}")
    found = {}
    for trial in study.get_trials(deepcopy=False):
        if "label" not in trial.user_attrs:
            continue  # a repeat, for the verdict
        run_id = next(run_id for value, run_id in tagged.items() if is_run(trial.number, value))
        steps = sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))
        found[trial.user_attrs["label"]] = _losses(trial, tuple(value for _, value in steps[:FIRST_STEPS]))
    return found


def read_ended(runs: Path, study_name: str) -> dict[str, TrialLosses]:
    """The trials that had ended when a side was cut, by label: by Optuna's database alone, since MLflow's may lag."""
    import optuna

    url = f"sqlite:///{runs / 'optuna.db'}"
    if not (runs / "optuna.db").exists() or study_name not in optuna.get_all_study_names(url):
        return {}
    ended = optuna.load_study(study_name=study_name, storage=url).get_trials(deepcopy=False)
    return {
        trial.user_attrs["label"]: _losses(trial, ())
        for trial in ended
        if trial.state.name in ("COMPLETE", "PRUNED") and "label" in trial.user_attrs
    }


def _losses(trial: Any, first: tuple[float, ...]) -> TrialLosses:
    """What Optuna has of a trial, with the training losses of its first steps."""
    began, ended = trial.datetime_start, trial.datetime_complete
    return TrialLosses(
        val=tuple(value for _, value in sorted(trial.intermediate_values.items())),
        first=first,
        state=trial.state.name,
        began_at=began.timestamp() if began else math.nan,
        ended_at=ended.timestamp() if ended else math.nan,
    )


def machine() -> dict[str, Any]:
    """What was measured on: for the record beside the figures."""
    import torch
    import transformers

    with Path("/proc/cpuinfo").open() as stream:
        model = next((line.partition(":")[2].strip() for line in stream if line.startswith("model name")), "unknown")
    revision = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "cores": len(os.sched_getaffinity(0)),
        "processor": model,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": revision.stdout.strip(),
        "load": os.getloadavg()[0],
    }


def save(path: Path, figures: Mapping[str, Any]) -> None:
    """Keep figures as JSON, with the machine and the command that gave them."""
    command = " ".join(["python", "-m", "tests.benchmarks." + Path(sys.argv[0]).stem, *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "machine": machine(), **figures}, indent=1), encoding="utf-8")
