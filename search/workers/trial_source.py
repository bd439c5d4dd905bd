"""Where a worker gets its trials: counted, asked for, sampled and at last repeated, by one worker at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum, auto
from typing import Any

import optuna
from optuna.trial import TrialState

from search import records
from search.sampling.params import refusal, suggest
from search.storage import lifecycle
from search.storage.database import exclusive
from search.storage.optuna_private import latest
from search.storage.queue import LongestFirst
from search.storage.retry import RetryingStorage
from search.storage.studies import check_definition
from search.workers.protocol import Job
from search.workers.repeats import Repeats
from trainer.common.errors import ConfigError

log = logging.getLogger("search.workers.trial_source")


class Supply(Enum):
    """What is known of the trials that the study still has for this worker."""

    UNKNOWN = auto()
    """It is worth asking."""
    DRY = auto()
    """There was none when last asked, or what waits is for another worker: not to be asked for at every step."""


class TrialSource:
    """The trials of a study, until as many as the job's total count.

    Args:
        study: Optuna's study.
        storage: What it lies in.
        job: The worker's.
        identity: `records.WORKER` of the trials.
        say: Tells the user of a trial that cannot be run.
        check: Raises StudyGone if the study is not there any more.
    """

    def __init__(
        self,
        study: LongestFirst,
        storage: RetryingStorage,
        job: Job,
        identity: Mapping[str, Any],
        say: Callable[[str], None] = log.warning,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.supply = Supply.UNKNOWN
        self._study = study
        self._storage = storage
        self._job = job
        self._identity = dict(identity)
        study.first_attrs = {records.WORKER: self._identity}
        self._say = say
        self._check = check
        self._repeats = None
        if job.confirm is not None:
            self._repeats = Repeats(study, job.study, job.confirm, job.budget, job.examined)
        self._definition_is_kept = False
        """Whether a trial was asked for: from then on the study keeps its definition, which need not be checked."""

    def next(self) -> optuna.Trial | None:
        """The next trial, or None if the supply is dry, as it is from then on."""
        trial = None if self.supply is Supply.DRY else self.ask()
        if trial is None:
            self.supply = Supply.DRY
        return trial

    def ask(self) -> optuna.Trial | None:
        """The next trial that can be run, or None if the total is reached.

        One that another program queued with what the study cannot run fails alone, with the reason.

        Raises:
            DefinitionChanged: another search has changed the study before its first trial.
            DatabaseAway: the database does not answer.
        """
        while True:
            self._check()
            trial, why = self._ask()
            if trial is None or why is None:
                return trial
            self._say(f"trial {trial.number} failed: {why}")

    def _ask(self) -> tuple[optuna.Trial | None, str | None]:
        """The next trial, and why it has failed already if it has."""
        began, tries = datetime.now(), 0

        def locked() -> tuple[optuna.Trial | None, str | None]:
            nonlocal tries
            tries += 1
            with exclusive(self._storage):
                if tries > 1:  # the database went away meanwhile, and may have handed out a trial before it did
                    lifecycle.put_back(self._study, self._identity, began)
                if not self._study.has_next(self._job.budget) and not (self._repeats and self._repeats.enqueue()):
                    return None, None
                if not self._definition_is_kept:
                    check_definition(self._study, self._job.study)
                    self._definition_is_kept = True
                trial = self._study.ask()
                lifecycle.heartbeat(self._study, trial)  # a trial that was parked has an old one
                if self._study.given_up is not None:
                    trial.set_user_attr(records.GIVEN_UP, self._study.given_up)
                why = self._complete(trial)
                if why is not None:
                    trial.set_user_attr(records.REASON, records.ERROR)
                    trial.set_user_attr(records.DETAIL, why)
                    self._study.tell(trial, state=TrialState.FAIL)
            return trial, why

        return self._storage.retrying(locked)

    def _complete(self, trial: optuna.Trial) -> str | None:
        """Sample the params that the trial lacks; why it cannot be run, if it cannot."""
        waited = latest(trial)
        if waited.params or waited.system_attrs.get("fixed_params") or waited.user_attrs.keys() - {records.WORKER}:
            why = refusal(waited, self._job.study, self._study.get_trials(deepcopy=False))
            if why is not None:
                return why
        suggest(trial, self._job.study)
        try:
            self._job.study.config(trial.params, trial.user_attrs.get(records.OVERRIDES))
        except ConfigError as error:
            return str(error)
        return None
