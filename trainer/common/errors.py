"""Errors that the user's input causes, and how values and names appear in their messages.

    UserError (ValueError)      one clear message, exit code 2
    ├── ConfigError             a configuration that names unknown fields or impossible values
    ├── DataError               a data folder that is missing, broken or unsafe
    ├── ModelError              a checkpoint that is missing, is not an InstructBLIP, or lacks the target modules
    ├── CheckpointError         a training checkpoint that is damaged or belongs to another configuration
    └── NoRoom (trainer.common.disk)   a disk that is full

Everything else is a bug of this program and shows its traceback.
"""

import difflib
from collections.abc import Iterable
from typing import ClassVar

MOST_SHOWN = 100
"""Most characters of a value that a message repeats."""


def shown(value: object, most: int = MOST_SHOWN) -> str:
    """The value as a message shows it: its repr, the middle of a long one left out."""
    try:
        text = repr(value)
    except Exception:  # noqa: BLE001 - whatever a class's own __repr__ raises, or Python for a number of 5,000 digits
        return f"<{type(value).__name__}>"
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the nearest valid name, or an empty text."""
    close = difflib.get_close_matches(name, list(valid), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class UserError(ValueError):
    """An error that the user can correct: the message says what is wrong, where, and what to do."""

    exit_code: ClassVar[int] = 2
    """Exit code of a command that ends with this error."""


class ConfigError(UserError):
    """A configuration names unknown fields or impossible values."""


class DataError(UserError):
    """A data folder is missing, broken or unsafe."""


class ModelError(UserError):
    """A model checkpoint is missing, is not an InstructBLIP, or lacks the target modules."""


class CheckpointError(UserError):
    """A training checkpoint is damaged or belongs to another configuration."""
