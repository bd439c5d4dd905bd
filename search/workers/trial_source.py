"""Where a worker gets its trials: counted, asked for, sampled and at last repeated, by one worker at a time."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import Enum, auto
from typing import Any

import optuna

from search import records
from search.sampling.params import suggest
from search.storage import lifecycle
from search.storage.database import exclusive
from search.storage.queue import LongestFirst
from search.storage.retry import RetryingStorage
from search.storage.studies import check_definition
from search.workers.protocol import Job
from search.workers.repeats import Repeats


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
    """

    def __init__(self, study: LongestFirst, storage: RetryingStorage, job: Job, identity: Mapping[str, Any]) -> None:
        self.supply = Supply.UNKNOWN
        self._study = study
        self._storage = storage
        self._job = job
        self._identity = dict(identity)
        self._repeats = None
        if job.confirm is not None:
            self._repeats = Repeats(study, job.study, job.confirm, job.n_trials, job.examined)
        self._definition_is_kept = False
        """Whether a trial was asked for: from then on the study keeps its definition, which need not be checked."""

    def next(self) -> optuna.Trial | None:
        """The next trial, or None if the supply is dry, as it is from then on."""
        trial = None if self.supply is Supply.DRY else self.ask()
        if trial is None:
            self.supply = Supply.DRY
        return trial

    def ask(self) -> optuna.Trial | None:
        """The next trial, or None if the total is reached.

        Raises:
            DefinitionChanged: another search has changed the study before its first trial.
            DatabaseAway: the database does not answer.
        """
        began, tries = datetime.now(), 0

        def locked() -> optuna.Trial | None:
            nonlocal tries
            tries += 1
            with exclusive(self._storage):
                if tries > 1:  # the database went away meanwhile, and may have handed out a trial before it did
                    lifecycle.put_back(self._study, self._identity, began)
                if not self._study.has_next(self._job.n_trials) and not (self._repeats and self._repeats.enqueue()):
                    return None
                if not self._definition_is_kept:
                    check_definition(self._study, self._job.study)
                    self._definition_is_kept = True
                trial = self._study.ask()
                trial.set_user_attr(records.WORKER, self._identity)
                lifecycle.heartbeat(self._study, trial)  # a trial that was parked has an old one
                if self._study.given_up is not None:
                    trial.set_user_attr(records.GIVEN_UP, self._study.given_up)
                suggest(trial, self._job.study)
            return trial

        return self._storage.retrying(locked)
