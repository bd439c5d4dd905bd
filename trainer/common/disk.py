"""Recognising a full disk, whichever library reports it."""

from __future__ import annotations

import errno

from trainer.common.errors import UserError

_NUMBERS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SIGNS = ("No space left on device", "Disk quota exceeded", "database or disk is full", "File too large")
"""safetensors (which raises no OSError) and SQLite report it in words only."""


class NoRoom(UserError):
    """A disk is full: nothing can be saved until there is room."""


def out_of_room(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, reports a full disk."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, NoRoom) or (isinstance(error, OSError) and error.errno in _NUMBERS):
            return True
        if any(sign in str(error) for sign in _SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def no_room(error: BaseException, where: object) -> NoRoom:
    """The message for a full disk."""
    if isinstance(error, NoRoom):
        return error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return NoRoom(
        f"the disk is full ({reason}); make room for {where} and run the same command again: it goes on from the last "
        "checkpoint"
    )
