"""What can go wrong on the search's side because of the user's input or surroundings.

trainer.errors.UserError
├── StudyError        a study file or search space that cannot be meant
├── DefinitionChanged a study that exists under this name with another definition
└── StorageError      a database or tracking server that cannot be opened or reached
"""

from trainer.errors import UserError


class StudyError(UserError):
    """A study file, study name or search space is wrong."""


class DefinitionChanged(UserError):
    """The study exists with another definition; its trials could not be compared with new ones."""


class StorageError(UserError):
    """A database or tracking server cannot be opened or reached."""
