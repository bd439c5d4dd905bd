"""The lives of trials in Optuna's storage: heartbeats, interruptions, losses, and reading them back.

    WAITING -> RUNNING -> COMPLETE / PRUNED / FAIL
        park           RUNNING -> WAITING, so that the same trial goes on later (Ctrl-C)
        requeue_lost   RUNNING -> FAIL (lost), and a new WAITING trial that takes up its work

Optuna's `ask` takes waiting trials first and leaves the params they have as they are; search.storage.queue
says in which order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from search import processes, records
from search.planning.plan import is_repeat, number_counted
from search.records import TrialRecord
from search.storage import optuna_private
from search.storage.database import exclusive
from search.storage.optuna_private import running_heartbeats, set_state, set_user_attr, trial_id
from search.storage.retry import RetryingStorage
from trainer.config import without_retired

_CARRIED_OVER = (
    *(records.LABEL, records.NOTE, records.OVERRIDES, records.STAGE, records.TRAIN_LOSSES),
    *(records.PAUSED_AT, records.GIVEN_UP, records.REPEAT_OF, records.BLOCK, records.TRAINS_TO, records.FOLDER),
)
"""Attributes that a trial hands to the one that takes up its work."""
LOST_AFTER = "lost_after_s"
"""Key of `records.WORKER`: seconds without a heartbeat after which the worker's trials are to be taken over."""


@dataclass(frozen=True)
class Unfinished:
    """Numbers of trials that are not in a final state."""

    waiting: int
    running: int


@dataclass(frozen=True)
class Lost:
    """A trial whose process is gone."""

    number: int
    detail: str
    successor: int | None
    """Number of the waiting trial that takes up its work; None once its attempts are used up."""
    run_id: str | None = None
    """Its MLflow run."""


def heartbeat(study: optuna.Study, trial: optuna.Trial | FrozenTrial) -> bool:
    """Record, by the database's clock, that the trial's worker is alive; False if the trial is finished."""
    backend = _backend(study)
    backend.record_heartbeat(trial_id(trial))
    return not backend.get_trial(trial_id(trial)).state.is_finished()


def unfinished(study: optuna.Study, *, repeats: bool = True) -> Unfinished:
    """Count the trials that wait and run, on all hosts; without `repeats`, none that is one and waits."""
    states = (TrialState.WAITING, TrialState.RUNNING)
    trials = study.get_trials(deepcopy=False, states=states)
    found = [t.state for t in trials if repeats or t.state == TrialState.RUNNING or not is_repeat(t)]
    return Unfinished(found.count(TrialState.WAITING), found.count(TrialState.RUNNING))


def park(study: optuna.Study, trial: optuna.Trial | FrozenTrial, reason: str = records.INTERRUPTED) -> None:
    """Set a RUNNING trial back to WAITING, its params, reports and attributes kept.

    Args:
        study: The study.
        trial: The trial.
        reason: `records.INTERRUPTED`: the next `ask` goes on with it. `records.PAUSED`: the plan says when.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: the trial is finished.
    """
    set_user_attr(study, trial, records.REASON, reason)
    # It stays this process's until another takes it: without a worker, RUNNING, nobody would know that it is lost.
    set_state(study, trial, TrialState.WAITING)


def put_back(study: optuna.Study, worker: Mapping[str, Any], since: datetime) -> None:
    """Set back to WAITING the trials that this worker asked for without getting an answer.

    Args:
        study: The study; its lock is held.
        worker: The worker's `records.WORKER`, which its trials have from the first, see `OrderedStudy.first_attrs`.
        since: When it began to ask.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        mine = trial.user_attrs.get(records.WORKER) == worker
        if mine and trial.datetime_start is not None and trial.datetime_start >= since:
            park(study, trial)


def requeue_lost(
    study: optuna.Study,
    *,
    is_alive: Callable[[Any], bool | None] = processes.alive,
    blamed: Collection[int] = (),
    max_retries: int = records.MAX_RETRIES,
) -> tuple[Lost, ...]:
    """Fail the RUNNING trials whose worker is gone, and queue a successor that takes up the work of each.

    A worker is gone if `is_alive` says so. Where that is unknown (another host, or a trial that another program asked
    for), the trial is lost once neither its last heartbeat nor its start lies within the worker's own limit, or
    the storage's grace period. A live process never counts as lost, however late its heartbeats: a laptop may have
    slept.

    The successor has the params, reports, label, overrides and stage of the lost trial. Its `records.RESUMES` names
    the lost one, its `records.ATTEMPT` counts the deaths since the last epoch that was completed for which the trial
    may be to blame. Only the supervisor that saw its worker die, and lived on, can know of one: a trial that dies with
    its supervisor, its process group or its host has not used an attempt. If this process dies between the two steps,
    the next call queues the missing successor.

    Args:
        study: The study.
        is_alive: Says of a trial's `records.WORKER` whether it lives; None if nothing is known.
        blamed: Numbers of the trials that their own worker's death may be due to, see `search.workers.supervisor`.
        max_retries: A trial with more such deaths is given up.

    Returns:
        The trials found by this call, by number.
    """
    return _backend(study).retrying(lambda: _requeue_lost(study, is_alive, blamed, max_retries))


def _requeue_lost(
    study: optuna.Study, is_alive: Callable[[Any], bool | None], blamed: Collection[int], max_retries: int
) -> tuple[Lost, ...]:
    trials = study.get_trials(deepcopy=False)  # once: the database is asked for all that run and wait, 10 ms each time
    if not (_gone(study, trials, is_alive) or _without_successor(trials, max_retries)):
        return ()
    with exclusive(_backend(study)):
        trials = study.get_trials(deepcopy=False)
        gone = _gone(study, trials, is_alive)
        for trial, detail in gone:
            _fail_as_lost(study, trials, trial, detail, trial.number in blamed)
        trials = study.get_trials(deepcopy=False)
        requeued = _without_successor(trials, max_retries)
        for trial in requeued:
            successor = _successor(trial, _attempt(trials, trial, _was_blamed(trial)))
            assert successor is not None  # or it would not be among them
            study.add_trial(successor)
    details = {trial.number: detail for trial, detail in gone}
    details |= {t.number: t.user_attrs.get(records.DETAIL, "") for t in requeued if t.number not in details}
    successors = {t.user_attrs.get(records.RESUMES): t.number for t in study.get_trials(deepcopy=False)}
    runs = {trial.number: trial.user_attrs.get(records.RUN_ID) for trial in (*(t for t, _ in gone), *requeued)}
    return tuple(Lost(number, details[number], successors.get(number), runs[number]) for number in sorted(details))


def untaken(study: optuna.Study) -> list[int]:
    """Numbers of lost trials whose successor is still to be queued: a process died in between."""
    return [trial.number for trial in _without_successor(study.get_trials(deepcopy=False), records.MAX_RETRIES)]


def counted(study: optuna.Study) -> int:
    """Count the trials towards the study's total, see `plan.number_counted`."""
    return number_counted(study.get_trials(deepcopy=False))


def lineage(study: optuna.Study, number: int) -> tuple[int, ...]:
    """The trial's number and those of the trials whose work it continues, latest first."""
    resumes = {t.number: t.user_attrs.get(records.RESUMES) for t in study.get_trials(deepcopy=False)}
    found = [number]
    while (before := resumes.get(found[-1])) is not None:
        found.append(before)
    return tuple(found)


def read_trials(study: optuna.Study) -> tuple[TrialRecord, ...]:
    """All trials by number, with what Optuna's storage knows of them."""
    return records_of(study.get_trials(deepcopy=False))


def records_of(trials: Sequence[FrozenTrial]) -> tuple[TrialRecord, ...]:
    """These trials as records."""
    return tuple(_record(trial) for trial in trials)


def _backend(study: optuna.Study) -> RetryingStorage:
    """The study's storage without the cache in which Optuna wraps it."""
    backend = optuna_private.backend(study)
    assert isinstance(backend, RetryingStorage)
    return backend


def _gone(
    study: optuna.Study, trials: Sequence[FrozenTrial], is_alive: Callable[[Any], bool | None]
) -> list[tuple[FrozenTrial, str]]:
    """RUNNING trials among these whose worker is gone, each with the evidence."""
    found = []
    silent_s: dict[int, float] | None = None
    for trial in trials:
        if trial.state != TrialState.RUNNING:
            continue
        worker = trial.user_attrs.get(records.WORKER)
        alive = is_alive(worker) if worker else None
        if alive:
            continue
        where = f"process {worker['pid']} on {worker['host']}" if worker else "its process"
        if alive is False:
            found.append((trial, f"{where} is gone"))
            continue
        if silent_s is None:
            silent_s = _silences(study, trials)
        silence = silent_s.get(trial.number, 0.0)
        grace = (worker or {}).get(LOST_AFTER) or _backend(study).grace_period
        if grace is not None and silence > grace:
            found.append((trial, f"{where} has been silent for {silence:.0f} s, more than {grace:.0f} s"))
    return found


def _silences(study: optuna.Study, trials: Sequence[FrozenTrial]) -> dict[int, float]:
    """Seconds since each RUNNING one of these trials was last heard of: its heartbeat or, if later, its start.

    The start counts because a trial that was parked and taken up again has an old heartbeat for a moment. It is by its
    worker's clock: a start in the future only says that the clocks differ.
    """
    beats = running_heartbeats(study, _backend(study).engine)
    starts = {t.number: t.datetime_start for t in trials}
    silences = {}
    for number, beat, now in beats:
        start = starts.get(number)
        since_start = (datetime.now() - start).total_seconds() if start else -1.0
        times = [since_start] if since_start >= 0 else []
        if beat is not None:
            # PostgreSQL's now() has a time zone, Optuna's column stores it without.
            times.append((now.replace(tzinfo=None) - beat).total_seconds())
        silences[number] = min(times, default=0.0)
    return silences


def _fail_as_lost(
    study: optuna.Study, trials: Sequence[FrozenTrial], trial: FrozenTrial, detail: str, blamed: bool
) -> None:
    """Tell a trial as FAIL, lost. The attributes come first: a finished trial takes none."""
    try:
        set_user_attr(study, trial, records.REASON, records.LOST)
        set_user_attr(study, trial, records.BLAMED, blamed)
        if blamed:
            detail += f" (attempt {_attempt(trials, trial, blamed)})"
        set_user_attr(study, trial, records.DETAIL, detail)
        set_state(study, trial, TrialState.FAIL)
    except optuna.exceptions.UpdateFinishedTrialError:
        return  # its worker finished it after all


def _without_successor(trials: Sequence[FrozenTrial], max_retries: int) -> list[FrozenTrial]:
    """Lost trials with attempts left whose work no other trial has taken up."""
    resumed = {t.user_attrs.get(records.RESUMES) for t in trials}
    return [
        t
        for t in trials
        if t.state == TrialState.FAIL
        and t.user_attrs.get(records.REASON) == records.LOST
        and t.number not in resumed
        and _attempt(trials, t, _was_blamed(t)) <= max_retries
        and _successor(t, 0) is not None
    ]


def _was_blamed(lost: FrozenTrial) -> bool:
    """`records.BLAMED`; earlier versions, which lack it, counted every loss."""
    return lost.user_attrs.get(records.BLAMED) is not False


def _attempt(trials: Sequence[FrozenTrial], lost: FrozenTrial, blamed: bool) -> int:
    """`records.ATTEMPT` of the successor of a lost trial."""
    before = lost.user_attrs.get(records.RESUMES)
    known = next((t.intermediate_values for t in trials if t.number == before), {})
    further = len(lost.intermediate_values) > len(known)
    return (0 if further else lost.user_attrs.get(records.ATTEMPT, 0)) + blamed


def _successor(lost: FrozenTrial, attempt: int) -> FrozenTrial | None:
    """A waiting trial that takes up the work of a lost one; None if Optuna refuses its params, as another program's.

    System attributes are kept (queued params, grid point, rungs), as in Optuna's RetryHeartbeatStaleTrialCallback, all
    but the constraints, which Optuna allows to be set only once.
    """
    attrs = {key: lost.user_attrs[key] for key in _CARRIED_OVER if key in lost.user_attrs}
    distributions: dict[str, BaseDistribution] = lost.distributions
    try:
        return create_trial(
            state=TrialState.WAITING,
            params=lost.params,
            distributions=distributions,
            user_attrs={**attrs, records.RESUMES: lost.number, records.ATTEMPT: attempt},
            system_attrs={key: value for key, value in lost.system_attrs.items() if not key.startswith("constraints")},
            intermediate_values=lost.intermediate_values,
        )
    except ValueError:
        return None


def _record(trial: FrozenTrial) -> TrialRecord:
    attrs = trial.user_attrs
    value = trial.value if trial.state == TrialState.COMPLETE else None
    if trial.state == TrialState.PRUNED or records.CIDER in attrs:
        value = min((v for v in trial.intermediate_values.values() if math.isfinite(v)), default=None)
    if records.REPEAT_OF in attrs:  # not its lowest, which would be too low by chance
        value = trial.intermediate_values.get(attrs[records.TRAINS_TO])
    return TrialRecord(
        number=trial.number,
        state=trial.state.name,
        value=value,
        params=dict(trial.params),
        config=without_retired(attrs.get(records.CONFIG, {})),
        reason=attrs.get(records.REASON),
        detail=attrs.get(records.DETAIL),
        best_epoch=attrs.get(records.BEST_EPOCH),
        stopped_early=bool(attrs.get(records.STOPPED_EARLY, False)),
        attrs=dict(attrs),
        # Without "0", the copy that search.dashboards.notes makes for optuna-dashboard.
        violated=tuple(name for name, amount in trial.constraints.items() if amount > 0 and name != "0"),
        start_s=trial.datetime_start.timestamp() if trial.datetime_start else None,
        end_s=trial.datetime_complete.timestamp() if trial.datetime_complete else None,
        run_id=attrs.get(records.RUN_ID),
    )
