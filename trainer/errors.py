"""What can go wrong because of the user's input.

    UserError (ValueError)      one clear message, exit code 2
    ├── ConfigError             a configuration that names unknown fields or impossible values
    ├── DataError               a data folder that is missing, broken or unsafe
    ├── ModelError              a checkpoint that is missing, is no InstructBLIP, or lacks the target modules
    ├── CheckpointError         a training checkpoint that is damaged or belongs to another configuration
    └── NoRoom (trainer.disk)   a disk that is full

Everything else is a bug of ours and shows its traceback.
"""

from typing import ClassVar


class UserError(ValueError):
    """Something the user can mend: the message says what is wrong, where, and what to do."""

    exit_code: ClassVar[int] = 2
    """Of the command that ends with it."""


class ConfigError(UserError):
    """A configuration names unknown fields or impossible values."""


class DataError(UserError):
    """A data folder is missing, broken or unsafe."""


class ModelError(UserError):
    """A model checkpoint is missing, is no InstructBLIP, or lacks the target modules."""


class CheckpointError(UserError):
    """A training checkpoint is damaged or belongs to another configuration."""
