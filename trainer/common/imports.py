"""The imports of a process that trains, made at once and without looking for garbage among them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def without_collection() -> Iterator[None]:
    """No garbage collection within, nor afterwards of what was made within.

    Imports make a million objects, all of which stay; going through them time and again is a sixth of what importing
    PyTorch, Transformers, PEFT and MLflow takes (6.9 s of CPU, 5.8 s without), and half a second each time after.
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

    For libraries that can do without one, and whose use of it is of no use here.
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
    # Transformers takes an assignment algorithm for object detection from SciPy: 0.2 s.
    with without_collection(), without_module("scipy"), suppress(ImportError):
        import peft
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        from trainer import loop

        del peft, InstructBlipForConditionalGeneration, InstructBlipProcessor, loop
