"""How a search ends: what is left is delivered, the log written, the winner kept, the study's own run ended."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from search import leaderboard, records
from search.errors import DatabaseAway, StorageError
from search.result import INTERRUPTED, Result
from search.session.left import nobody_writes
from search.storage import lifecycle
from search.terminal import summary
from search.tracking.outbox import Model
from search.verdict.leaders import verdict_of, winner
from search.verdict.tested import TestLosses

if TYPE_CHECKING:
    from pathlib import Path

    import optuna

    from search.records import TrialRecord
    from search.report.keeper import LogKeeper
    from search.storage.identity import Watch
    from search.tracking.delivery import DeliveryThread
    from search.tracking.outbox import Status
    from search.tracking.runs import StudyRuns

log = logging.getLogger("search.session.closing")

ENDS: dict[int, Status] = {0: "FINISHED", **dict.fromkeys(INTERRUPTED, "KILLED")}
"""MLflow's status of the study's own run by exit code; FAILED for all others."""

BEST = "best"
"""Alias of the version of the registered model that the winner made: `models:/STUDY@best`. Where another study of this
name has that model, `models:/STUDY-<id>@best`."""


def close(
    code: int,
    study: optuna.Study,
    folder: Path,
    watch: Watch,
    runs: StudyRuns,
    courier: DeliveryThread,
    keeper: LogKeeper,
) -> Result:
    """Deliver, write the log, end the study's run in MLflow.

    Args:
        code: The supervisor's exit code, or 0 where it had nothing to do.
        study: The study.
        folder: The study's files.
        watch: Knows whether folder and database are still the study's.
        runs: Its runs in MLflow.
        courier: Delivers them.
        keeper: Writes the log.
    """
    gone = watch.problem()
    if code == DatabaseAway.exit_code or gone is not None:  # neither trials nor log can be read now
        runs.end_study("KILLED" if gone is None else "FAILED", {})
        courier.close()
        code = code if gone is None else gone.exit_code
        return Result(code=code, study_name=study.study_name, trials=(), logs=(), folder=folder)
    courier.close()  # first, so that the log has what MLflow has
    logs = keeper.close() if keeper.is_alive() else []
    trials = lifecycle.read_trials(study)
    if code == 0 and leaderboard.all_failed(trials):
        code = 1  # 0 says that what was asked for was done
    judged = {trial.number: trial.attrs.get(records.FINDINGS) for trial in keeper.trials}
    trials = tuple(  # the terminal says of a trial what the log says
        replace(trial, attrs={**trial.attrs, records.FINDINGS: judged[trial.number]})
        if judged.get(trial.number)
        else trial
        for trial in trials
    )
    verdict, refused = verdict_of(trials, study.user_attrs), None
    if (model := winners_model(winner(trials, verdict), folder, study.study_name)) is not None:
        try:
            runs.keep_model(*model)
        except StorageError as error:  # whatever MLflow has against it, the study has its result
            log.exception("the winner's adapter is not among MLflow's models")
            refused = str(error)
    runs.end_study(ENDS.get(code, "FAILED"), summary.study_tags(trials, verdict))
    undelivered = courier.close(0)
    runs.close_dangling(nobody_writes(lambda: trials))
    runs.settle(trials)
    return Result(
        code=code,
        study_name=study.study_name,
        trials=trials,
        logs=tuple(logs),
        folder=folder,
        verdict=verdict,
        tested=TestLosses.of(study.user_attrs, verdict),
        undelivered=undelivered,
        refused=refused,
    )


def winners_model(trial: TrialRecord | None, folder: Path, name: str) -> tuple[str, Model] | None:
    """The winner's run in MLflow, and its adapter as that run's model, to be registered under the study's name.

    None where nobody has won yet, or its adapter is gone.
    """
    if trial is None or trial.run_id is None or trial.value is None or trial.best_epoch is None:
        return None
    adapter, score = leaderboard.adapter(folder, trial), records.score_of(trial.attrs)
    if not adapter.is_dir():
        return None
    return trial.run_id, Model(
        path=str(adapter.absolute()),
        name=name,
        alias=BEST,
        step=trial.best_epoch,
        metrics={"val_loss": trial.value, **({} if score is None else {records.VAL_CIDER: score})},
        params={key: str(value) for key, value in trial.params.items()},
    )
