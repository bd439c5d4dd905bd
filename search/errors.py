"""Errors of the search that come from the user's input or the surroundings.

trainer.common.errors.UserError
├── StudyError        a study file, study name or search space that is wrong
├── DefinitionChanged a study that exists under this name with another definition
└── StorageError      a database or tracking server that cannot be opened or reached
    ├── Unavailable   a store that does not answer now, or that another process holds
    └── DatabaseAway  Optuna's database, which has not answered for as long as a search waits
        └── StudyGone the study, its database or its folder, deleted or replaced while a search ran
"""

from typing import ClassVar

from trainer.common.errors import UserError


class StudyError(UserError):
    """A study file, study name or search space is wrong."""


class DefinitionChanged(UserError):
    """The study exists with another definition; its trials could not be compared with new ones."""


class StorageError(UserError):
    """A database or tracking server cannot be opened or reached."""


class Unavailable(StorageError):
    """The store does not answer now, or another process holds it; the same call may succeed later."""


class DatabaseAway(StorageError):
    """Optuna's database has not answered for too long; the same command continues once it does."""

    exit_code: ClassVar[int] = 75  # EX_TEMPFAIL of sysexits.h: try again later


class StudyGone(DatabaseAway):
    """The study, its database or its folder was deleted or replaced while the search ran."""

    exit_code: ClassVar[int] = 2
