"""Every name of Optuna's with an underscore that this program uses, each behind a name of our own.

Optuna may change such names in any release, so none stands anywhere else below `search/`.
tests/search/storage/test_optuna_private.py says which one is missing, and finds uses outside of this module.

    trial_id, backend, study_system_attrs    what a trial and a study keep to themselves
    latest                         a running trial, without asking the database
    set_user_attr, set_system_attr, set_state    writing to a trial that is not `optuna.Trial`
    running_heartbeats             the heartbeats of all running trials, in one query
    OrderedStudy, FilteredStudy, CreationHooks, SharedStorage, GridPoints    where Optuna's steps are replaced, watched
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType, SimpleNamespace
from typing import Any

import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import GridSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState, create_trial

AnyTrial = optuna.Trial | FrozenTrial

CALLED_BY_THE_CACHE = ("_get_trials", "_get_best_trial_id", "_set_trial_param")
"""Methods of RDBStorage that the cache around it calls in place of the public ones: retried as those are."""


def trial_id(trial: AnyTrial) -> int:
    """The storage's key of a trial. `trial.number`, which is public, counts within its study only."""
    found: int = trial._trial_id
    return found


def study_system_attrs(study: optuna.Study) -> dict[str, Any]:
    """What other programs keep with the study; `Study.system_attrs` is deprecated, and copies them."""
    found: dict[str, Any] = study._storage.get_study_system_attrs(study._study_id)
    return found


def noted(study: optuna.Study, trial: AnyTrial, attrs: Mapping[str, Any]) -> Any:
    """A trial, ended or not, as optuna-dashboard's `get_note` and `save_note` take it.

    Args:
        study: The trial's study.
        trial: The trial.
        attrs: Those of the study's system attributes that are of this trial, as they were read: the functions would
            read all trials' for each.
    """
    storage = SimpleNamespace(
        get_study_system_attrs=lambda _: attrs, set_study_system_attr=study._storage.set_study_system_attr
    )
    return SimpleNamespace(storage=storage, study=study, _trial_id=trial._trial_id)


def backend(study: optuna.Study) -> BaseStorage:
    """The storage under the cache in which Optuna wraps an RDBStorage."""
    found: BaseStorage = getattr(study._storage, "_backend", study._storage)
    return found


def latest(trial: optuna.Trial) -> FrozenTrial:
    """The running trial with all that this process wrote to it.

    Optuna keeps it in memory; the public way, `study.get_trials`, reads every running trial from the database.
    """
    return trial._get_latest_trial()


def set_user_attr(study: optuna.Study, trial: AnyTrial, key: str, value: Any) -> None:
    """Store a user attribute. Samplers are given a FrozenTrial, whose own `set_user_attr` changes a copy only."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def set_system_attr(study: optuna.Study, trial: AnyTrial, key: str, value: Any) -> None:
    """Store a system attribute; `Trial.set_system_attr` is deprecated, and Optuna's own samplers do it this way."""
    study._storage.set_trial_system_attr(trial._trial_id, key, value)


def set_state(study: optuna.Study, trial: AnyTrial, state: TrialState) -> None:
    """Store a state. `Study.tell` takes final ones only.

    Raises:
        optuna.exceptions.UpdateFinishedTrialError: the trial is finished.
    """
    study._storage.set_trial_state_values(trial._trial_id, state)


def running_heartbeats(study: optuna.Study, engine: sqlalchemy.Engine) -> list[tuple[int, datetime | None, datetime]]:
    """(number, last heartbeat, the database's time now) of each RUNNING trial, by the database's clock.

    Optuna compares heartbeats with the time in its own query, which returns ids alone and knows one grace period.
    """
    query = (
        sqlalchemy.select(
            models.TrialModel.number, models.TrialHeartbeatModel.heartbeat, sqlalchemy.func.now().label("now")
        )
        .join(models.TrialHeartbeatModel, isouter=True)
        .where(models.TrialModel.study_id == study._study_id, models.TrialModel.state == TrialState.RUNNING)
    )
    with engine.connect() as connection:
        return [(number, beat, now) for number, beat, now in connection.execute(query)]


class OrderedStudy(optuna.Study):
    """A study whose `ask` takes waiting trials in an order of our choice; Optuna's is that of their numbers.

    Attributes:
        first_attrs: User attributes that a trial has before anyone can see it RUNNING. `ask` followed by
            `set_user_attr` leaves a moment, and a process that is killed in it leaves a trial that nobody owns.
    """

    first_attrs: Mapping[str, Any] = MappingProxyType({})

    def in_order(self, waiting: Sequence[FrozenTrial]) -> Sequence[FrozenTrial]:
        """The trials that wait, the one to be taken first in front."""
        return waiting

    def _pop_waiting_trial_id(self) -> int | None:
        """As Optuna's but for the order and the attributes: `ask` calls it, and creates a trial if it returns None."""
        waiting = self._storage.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.WAITING,))
        for trial in self.in_order(waiting):
            try:
                for key, value in self.first_attrs.items():
                    self._storage.set_trial_user_attr(trial._trial_id, key, value)
                if self._storage.set_trial_state_values(trial._trial_id, state=TrialState.RUNNING):
                    return trial_id(trial)
            except UpdateFinishedTrialError:
                continue  # another process has taken and ended it
        if not self.first_attrs:
            return None
        template = create_trial(state=TrialState.RUNNING, user_attrs=dict(self.first_attrs))
        created: int = self._storage.create_new_trial(self._study_id, template)  # one transaction
        return created


class FilteredStudy(optuna.Study):
    """A study as samplers and pruners are to see it, some of its trials left out, as Optuna's Hyperband does it.

    Its storage leaves them out too: Hyperband's own view of a bracket asks the storage of the study that it is given.

    Args:
        study: The whole study.
        keep: Whether a trial is to be seen.
    """

    def __init__(self, study: optuna.Study, keep: Callable[[FrozenTrial], bool]) -> None:
        storage: Any = _FilteredStorage(study._storage, keep)
        super().__init__(study.study_name, storage, sampler=study.sampler, pruner=study.pruner)
        self.whole = study
        self.keep = keep

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        # The whole study's cache is the one that `ask` renews.
        return [t for t in self.whole._get_trials(deepcopy, states, use_cache) if self.keep(t)]


class _FilteredStorage:
    """A storage that leaves trials out where all of a study are read; the rest is the storage itself."""

    def __init__(self, storage: BaseStorage, keep: Callable[[FrozenTrial], bool]) -> None:
        self.whole = storage
        self.keep = keep

    def __getattr__(self, name: str) -> Any:
        return getattr(self.whole, name)

    def get_all_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        return [trial for trial in self.whole.get_all_trials(*args, **kwargs) if self.keep(trial)]


class CreationHooks(RDBStorage):
    """RDBStorage that announces the steps in which it creates a trial: it repeats a failed one up to five times."""

    def before_creation(self) -> None:
        """A trial is to be created."""

    def before_creation_try(self) -> None:
        """The trial is to be created now, for the first time or once more. What this raises ends the tries."""

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        self.before_creation()
        return super()._create_new_trial(study_id, template_trial)

    def _get_prepared_new_trial(self, *args: Any, **kwargs: Any) -> Any:
        self.before_creation_try()
        return super()._get_prepared_new_trial(*args, **kwargs)


class SharedStorage(RDBStorage):
    """RDBStorage for studies that other programs write into as well.

    It shows each trial that it reads, which comes down to two methods, one of them for the cache, and each that it
    creates. It stores a param whatever distribution another trial has it with: Optuna refuses that, so that one
    trial of another space would end the study for good. It gives no trial the number of one that is there: Optuna
    counts those before it, which is a number twice once a row has been deleted, and its cache then shows one of both.
    And it leaves out what of a trial cannot be read, where Optuna would not read the study at all.
    """

    def read(self, trial: FrozenTrial) -> None:
        """A trial has been read; it may be changed before anyone sees it."""

    def to_store(self, trial: FrozenTrial) -> FrozenTrial:
        """The trial as it is stored, of one that is to be created with params or attributes."""
        return trial

    def _create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> FrozenTrial:
        template = None if template_trial is None else self.to_store(template_trial)
        created: FrozenTrial = super()._create_new_trial(study_id, template)
        self.read(created)
        return created

    def _get_prepared_new_trial(self, study_id: int, template_trial: FrozenTrial | None, session: Any) -> Any:
        trial: Any = super()._get_prepared_new_trial(study_id, template_trial, session)
        others = session.query(sqlalchemy.func.max(models.TrialModel.number)).filter(
            models.TrialModel.study_id == study_id, models.TrialModel.trial_id != trial.trial_id
        )
        last = others.scalar()
        if last is not None and trial.number <= last:
            trial.number = last + 1
        return trial

    def _build_frozen_trial_from_trial_model(self, trial: Any) -> FrozenTrial:
        build = super()._build_frozen_trial_from_trial_model
        try:
            built: FrozenTrial = build(trial)
        except _UNREADABLE:
            built = build(readable(trial, build))
        return built

    def get_trial(self, trial_id: int) -> FrozenTrial:
        trial = super().get_trial(trial_id)
        self.read(trial)
        return trial

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = super()._get_trials(*args, **kwargs)
        for trial in trials:
            self.read(trial)
        return trials

    def _set_trial_param_without_commit(
        self, session: Any, trial_id: int, name: str, value: float, distribution: Any, _previous: Any = None
    ) -> None:
        super()._set_trial_param_without_commit(session, trial_id, name, value, distribution, distribution)


_UNREADABLE = (LookupError, TypeError, ValueError, AssertionError)
"""What Optuna raises where a row has what no program of its own writes."""
_PARTS = ("values", "params", "user_attributes", "system_attributes", "intermediate_values")


def readable(trial: Any, build: Callable[[Any], Any]) -> Any:
    """What of a trial's rows `build` can read, each tried by itself."""
    names = ("number", "state", "datetime_start", "datetime_complete", "trial_id")
    bare = {name: getattr(trial, name) for name in names} | {part: [] for part in _PARTS}

    def reads(part: str, row: Any) -> bool:
        try:
            build(SimpleNamespace(**bare | {part: [row]}))
        except _UNREADABLE:
            return False
        return True

    kept = {part: [row for row in getattr(trial, part) if reads(part, row)] for part in _PARTS}
    return SimpleNamespace(**bare | kept)


class GridPoints(GridSampler):
    """Optuna's grid sampler, its points given out from outside; its own rule goes by trial number and by chance."""

    @property
    def n_points(self) -> int:
        """How many points the grid has."""
        return len(self._all_grids)

    def give(self, study: optuna.Study, trial: FrozenTrial, point: int) -> None:
        """Give a trial a point: these two attributes are what `sample_independent` reads."""
        set_system_attr(study, trial, "search_space", self._search_space)
        set_system_attr(study, trial, "grid_id", point)
