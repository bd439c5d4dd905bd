"""Optuna's storage with retries: calls are repeated while the database is away, then given up."""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import sqlalchemy.exc
from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.engine import URL

from search import records
from search.errors import DatabaseAway, StorageError
from search.storage import by_hand, out_of_sight
from search.storage.optuna_private import CALLED_BY_THE_CACHE, CreationHooks, SharedStorage
from search.urls import shown, without_secrets

log = logging.getLogger("search.storage.retry")

WAIT_VARIABLE = "LORA_SEARCH_DATABASE_WAIT_S"


def _wait_s(text: str) -> float:
    """Seconds of the environment variable.

    Raises:
        StorageError: it is not a number of seconds.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise StorageError(f"{WAIT_VARIABLE} must be a number of seconds such as 120, but got {text!r}")
    return seconds


RETRY_S = _wait_s(os.environ.get(WAIT_VARIABLE, "120"))
"""Longest wait for the database to come back. A server's restart takes seconds, a failover a minute."""
MAX_PAUSE_S = 5.0
"""Longest pause between two tries; it doubles from 0.1 s."""
SAY_AFTER_S = 3.0
"""Shorter absences are logged and not shown."""

_LASTING = (
    *("no such", "does not exist", "readonly", "read-only", "malformed", "not a database", "lock timeout"),
    "database or disk is full",  # reported at once, as for a checkpoint that finds no room
)
"""Signs of errors that drivers call operational but a retry does not cure."""

T = TypeVar("T")


class CreationUnanswered(Exception):
    """It is unknown whether a trial was created."""


def is_away(error: BaseException) -> bool:
    """Whether an error of Optuna's or SQLAlchemy's means that the database did not answer, or was locked."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    # PendingRollbackError: a connection broke within a transaction, which Optuna has rolled back by now.
    if isinstance(cause, CreationUnanswered | sqlalchemy.exc.PendingRollbackError):
        return True
    if isinstance(cause, sqlalchemy.exc.DBAPIError):
        kinds = (sqlalchemy.exc.OperationalError, sqlalchemy.exc.InterfaceError)
        return cause.connection_invalidated or (
            isinstance(cause, kinds) and not any(sign in str(cause.orig) for sign in _LASTING)
        )
    return isinstance(cause, sqlalchemy.exc.TimeoutError)  # of the pool: all its connections hang


def retrying(url: URL, do: Callable[[], T], say: Callable[[str], None]) -> T:
    """Call `do`, again and again while the database is away, and return its result.

    Args:
        url: The database, named in messages.
        do: May be called several times, the earlier ones done or not.
        say: Tells the user that the database is away for longer than `SAY_AFTER_S`, and that it is back.

    Raises:
        DatabaseAway: it has been away for `RETRY_S` seconds.
    """
    began, pause, announced = time.monotonic(), 0.1, False
    while True:
        try:
            result = do()
        except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError, CreationUnanswered) as error:
            if not is_away(error):
                raise
            waited_s = time.monotonic() - began
            message = _driver_message(url, error)
            log.warning("the database has been away for %.1f s: %s", waited_s, message)
            if waited_s + pause > RETRY_S:
                raise DatabaseAway(
                    f"{shown(url)}: the database has not answered for {waited_s:.0f} s: {message}; nothing that was "
                    "reported is lost: once it answers, the same command goes on from the last checkpoints"
                ) from error
            if not announced and waited_s >= SAY_AFTER_S:
                announced = True
                say(f"the database does not answer ({message}); waiting for it, up to {RETRY_S:.0f} s")
            time.sleep(pause * random.uniform(0.7, 1.0))
            pause = min(MAX_PAUSE_S, 2 * pause)
        else:
            if announced:
                say(f"the database answers again after {time.monotonic() - began:.0f} s")
            return result


class RetryingStorage(CreationHooks, SharedStorage):
    """RDBStorage that retries each call while the database is away, for `RETRY_S` seconds.

    A call that was not answered may have been done, so only calls that may be done twice are retried; setting a
    trial's state twice is made harmless here. `create_new_trial` is not retried by itself: whoever asks for a trial
    retries the whole step with `retrying`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.say: Callable[[str], None] = log.warning
        """Tells the user that the database is away, and that it is back; the log by default."""
        self._inside = threading.local()
        self.fits: Callable[[str, Any], bool] = lambda name, value: True
        """Whether a param has a value of the study's space, by Optuna's name of it; whoever samples sets it."""
        self.shows_all = True
        """Whether readers see the attributes that are out of sight; not so for optuna-dashboard's pages."""
        self._told_foreign: set[tuple[int, str]] = set()

    def read(self, trial: FrozenTrial) -> None:
        """Show the attributes that are out of sight, and leave out what another program has written in another form
        than ours, on which all readers rely.

        That is attributes of our names, a value that no epoch measured, and of trials that have ended params outside
        of the space: a sampler that learns from them would end by an error, at every trial from then on.
        """
        if self.shows_all:
            out_of_sight.shown(trial)
        if trial.state.is_finished() and not all(self.fits(*param) for param in trial.params.items()):
            kept = {name for name, value in trial.params.items() if self.fits(name, value)}
            trial.params = {name: value for name, value in trial.params.items() if name in kept}
            trial.distributions = {name: d for name, d in trial.distributions.items() if name in kept}
        for key in records.foreign(trial.user_attrs, trial.number):
            value = trial.user_attrs.pop(key)
            if (trial.number, key) not in self._told_foreign:
                self._told_foreign.add((trial.number, key))
                log.warning("trial %d: its attribute %r is not ours and is left out: %.100r", trial.number, key, value)
        by_hand.undo(trial)

    def retrying(self, do: Callable[[], T]) -> T:
        """Retry several calls as one step: see the function `retrying`. Calls within are not retried by themselves.

        Raises:
            DatabaseAway: the database has been away for `RETRY_S` seconds.
        """
        if getattr(self._inside, "yes", False):
            return do()
        self._inside.yes = True
        try:
            return retrying(self.engine.url, do, lambda text: self.say(text))
        finally:
            self._inside.yes = False

    def before_creation(self) -> None:
        """Begin to count Optuna's own tries."""
        self._inside.creations = 0

    def before_creation_try(self) -> None:
        """Refuse a second try by Optuna within a step that is retried as a whole: the first may have succeeded.

        Raises:
            CreationUnanswered: `retrying` treats it as an absent database.
        """
        self._inside.creations += 1
        if self._inside.creations > 1 and getattr(self._inside, "yes", False):
            raise CreationUnanswered("the creation of a trial was not answered")

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Store an attribute of a trial, a long one out of sight."""
        if out_of_sight.is_long(key):
            RDBStorage.set_trial_system_attr(self, trial_id, out_of_sight.PREFIX + key, value)
        else:
            RDBStorage.set_trial_user_attr(self, trial_id, key, value)

    def to_store(self, trial: FrozenTrial) -> FrozenTrial:
        """A copy of the trial with its long attributes out of sight."""
        return out_of_sight.hidden(trial)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Store a state as Optuna does; that an unanswered earlier call has already stored it is not an error."""
        tries = 0

        def do() -> bool:
            nonlocal tries
            tries += 1
            try:
                return RDBStorage.set_trial_state_values(self, trial_id, state, values)
            except UpdateFinishedTrialError:
                if tries > 1 and self.get_trial(trial_id).state == state:
                    return True
                raise

        return self.retrying(do)


def _retried(name: str) -> Callable[..., Any]:
    original = getattr(RetryingStorage, name)  # with the hooks

    def method(self: RetryingStorage, *args: Any, **kwargs: Any) -> Any:
        return self.retrying(lambda: original(self, *args, **kwargs))

    method.__name__, method.__doc__ = name, original.__doc__
    return method


for _name in (
    *("get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_all_studies"),
    *("get_study_user_attrs", "get_study_system_attrs", "set_study_user_attr", "set_study_system_attr"),
    *("get_trial", "get_all_trials", "get_trial_id_from_study_id_trial_number", *CALLED_BY_THE_CACHE),
    *("set_trial_param", "get_trial_param", "set_trial_intermediate_value"),
    *("get_trial_user_attrs", "get_trial_system_attrs", "set_trial_user_attr", "set_trial_system_attr"),
    "record_heartbeat",
):
    setattr(RetryingStorage, _name, _retried(_name))


def _driver_message(url: URL, error: BaseException) -> str:
    """The driver's own message, its first line, passwords masked."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    text = str(getattr(cause, "orig", None) or cause).strip()
    line = text.splitlines()[0] if text else type(cause).__name__
    return without_secrets(line, url)
