"""The imports of a process that trains, made at once."""

from __future__ import annotations

from contextlib import suppress

from trainer.common.imports import without_collection, without_module


def import_libraries() -> None:
    """Import what training needs; a broken installation is reported where it is used."""
    # Transformers takes an assignment algorithm for object detection from SciPy: 0.2 s.
    with without_collection(), without_module("scipy"), suppress(ImportError):
        import peft
        from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor

        from trainer import loop

        del peft, InstructBlipForConditionalGeneration, InstructBlipProcessor, loop
