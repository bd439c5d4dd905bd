"""The imports of a process that trains, made all at once and without garbage collection."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


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


def import_libraries() -> None:
    """Import what training needs; a broken installation is reported where it is used."""
    # Transformers imports SciPy, in 0.2 s, for an assignment algorithm of object detection.
    with without_collection(), without_module("scipy"), suppress(ImportError):
        import peft
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        from trainer import loop

        del peft, InstructBlipForConditionalGeneration, InstructBlipProcessor, loop
