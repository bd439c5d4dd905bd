"""What all processes of a test session share: made by the first that needs it, while the others wait."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def folder(factory: pytest.TempPathFactory) -> Path:
    """The session's folder. Under xdist each process has one of its own below it."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def make(factory: pytest.TempPathFactory, name: str, fill: Callable[[Path], None]) -> Path:
    """The folder of this name below the session's, filled by one process; where that fails, the next one tries."""
    made = folder(factory) / name
    with FileLock(made.with_suffix(".lock")):
        whole = made.with_suffix(".made")
        if not whole.exists():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            fill(made)
            whole.touch()
    return made
