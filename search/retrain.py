"""`trainer.run --from-study`: the configuration of a study's trial trained again, on all rows if so wished.

It is recorded in MLflow under the study, with a kind of its own: no leaderboard compares it with the study's trials,
and after `--full-data` its validation loss is of rows that it has learnt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from search.options import find_study
from search.places import Places
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from search.records import TrialRecord
    from search.tracking.outbox import Status
    from search.tracking.recorder import RunRecorder
    from search.tracking.runs import StudyRuns
    from trainer.events import Event

__all__ = ["Places", "configuration", "run"]

KIND = "retrained"
"""MLflow's tag `kind` of such a run; of trials it is `trial`."""
RUN_FILE = "mlflow-run"
"""File in the run's folder with the id of its MLflow run, which is resumed."""


def run(
    study: str,
    number: int | None,
    *,
    full_data: bool,
    settings: Sequence[str],
    out: Path | None,
    show: bool,
    places: Places,
) -> bool:
    """Train it, and record it; whether it ended early.

    Raises:
        UserError: there is no such study or trial; model or data cannot be used.
    """
    import optuna

    from search.errors import StudyError
    from search.records import STUDY_ID
    from search.storage import lifecycle
    from search.storage.database import open_storage
    from search.storage.identity import check_folder
    from search.tracking.runs import StudyRuns
    from search.verdict.leaders import verdict_of, winner
    from trainer import preload
    from trainer.run import check, follow

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    places.check_recorded()
    opened = find_study(open_storage(places.storage_url), study)
    check_folder(places.study(opened.study_name), opened)
    listed = lifecycle.read_trials(opened)
    trials = {trial.number: trial for trial in listed}
    trial = trials.get(number) if number is not None else winner(listed, verdict_of(listed, opened.user_attrs))
    if trial is None and number is not None:
        has = f"it has {min(trials)} to {max(trials)}" if trials else "it has none yet"
        raise StudyError(f"the study {study!r} has no trial {number}; {has}")
    if trial is None:
        raise StudyError(f"no trial of the study {study!r} has completed yet; name one with --trial")
    config = configuration(trial, settings, full_data=full_data)
    if show:
        print(json.dumps(config.model_dump(mode="json"), indent=1))
        return False
    examined, _ = check(config)
    name = f"trial-{trial.number:04d}{'-full' if full_data else ''}"
    folder = out or places.study(opened.study_name) / "retrained" / name
    preload.import_libraries()
    runs = StudyRuns(places, opened.study_name, opened.user_attrs.get(STUDY_ID))
    recorder = _Recorder(lambda: _recorder(runs, trial, config, folder))
    ended_early = True
    try:
        ended_early = follow(config, folder, examined, recorder)
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        recorder.finish("KILLED" if stopped else "FAILED", state="FAIL", reason="interrupted" if stopped else "error")
        raise
    recorder.finish("FAILED" if ended_early else "FINISHED", state="FAIL" if ended_early else "COMPLETE")
    return ended_early


class _Recorder:
    """Records from the moment in which training begins: wrong input leaves no run, and an earlier one as it is.

    Args:
        begin: Begins the run, or resumes the folder's.
    """

    def __init__(self, begin: Callable[[], RunRecorder]) -> None:
        self._begin = begin
        self._recorder: RunRecorder | None = None
        self._before: list[Event] = []
        """The epochs of a checkpoint that the training goes on from."""

    def __call__(self, event: Event) -> None:
        """Record an event."""
        from trainer.events import RunStarted

        if self._recorder is None and not isinstance(event, RunStarted):
            self._before.append(event)
            return
        if self._recorder is None:
            self._recorder = self._begin()
            for earlier in self._before:
                self._recorder(earlier)
        self._recorder(event)

    def finish(self, status: Status, *, state: str, reason: str | None = None) -> None:
        """End the run, if one was begun."""
        if self._recorder is not None:
            self._recorder.finish(status, state=state, reason=reason)


def configuration(trial: TrialRecord, settings: Sequence[str], *, full_data: bool) -> TrainConfig:
    """The trial's configuration; on all rows for as many epochs as its best has, if `full_data`.

    Raises:
        StudyError: the trial has none: it has not begun, or another program added it.
        ConfigError: everything that is wrong with the settings.
    """
    from search.errors import StudyError

    if not trial.config:
        raise StudyError(f"trial {trial.number} is {trial.state} and has no configuration; name another with --trial")
    base = dict(trial.config)
    if full_data:
        base |= {"full_data": True, "max_samples": None, "num_epochs": trial.best_epoch or base["num_epochs"]}
    return TrainConfig.parse_settings(settings, base)


def _recorder(runs: StudyRuns, trial: TrialRecord, config: TrainConfig, folder: Path) -> RunRecorder:
    file = folder / RUN_FILE
    if file.is_file():
        return runs.resume(file.read_text(encoding="utf-8").strip())
    what = "on all rows" if config.full_data else "again"
    tags = {"study": runs.study, "kind": KIND, "from_trial": str(trial.number)}
    tags["full_data"] = str(config.full_data).lower()
    recorder = runs.begin(f"trial {trial.number:03d} {what}", config.model_dump(), tags)
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(recorder.run_id, encoding="utf-8")
    return recorder
