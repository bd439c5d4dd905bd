"""Imports without what they need not do: garbage collection, and libraries that are not used."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection within, and none later of the objects made within.

    Imports make a million objects, all of which stay. Collecting garbage among them takes a sixth of the time of
    importing PyTorch, Transformers, PEFT and MLflow (6.9 s of CPU, 5.8 s without), and half a second at each later
    collection.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.freeze()
            gc.enable()


@contextmanager
def without_module(name: str) -> Iterator[None]:
    """Within, importing this module fails as if it were not installed, unless it has been imported before.

    For optional imports of libraries that nothing here needs.
    """
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.modules.pop(name, None)


def own_path() -> dict[str, str]:
    """The environment in which a new Python process imports the modules that this one would.

    A process that is started with `-c` or `-m` looks into the current folder first, and so do `multiprocessing`'s fork
    server and its children: a `trainer.py` of the user's there would be taken for ours (PYTHONSAFEPATH: Python 3.11).
    """
    found = {"PYTHONSAFEPATH": "1"}
    parent = Path(__file__).resolve().parents[2]
    installed = {"site-packages", "dist-packages"} & set(parent.parts)
    if not installed:  # a checkout
        before = os.environ.get("PYTHONPATH")
        found["PYTHONPATH"] = str(parent) if before is None else os.pathsep.join((str(parent), before))
    return found
