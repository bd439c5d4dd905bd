"""A forward pass in which one run's images are not finite."""

from __future__ import annotations

from typing import Any

from trainer.loop import ForwardPass
from trainer.model.base import Forward, forward
from trainer.model.batch import Batch


def spoiling(rows: slice, size: int | None = None) -> ForwardPass:
    """The product's pass with NaN for the vision outputs of these samples, in passes of so many samples or in all."""

    def spoil(model: Any, batch: Batch) -> Forward:
        assert batch.image_embeds is not None
        if size in (None, len(batch)):
            batch.image_embeds = batch.image_embeds.clone()
            batch.image_embeds[rows] = float("nan")
        return forward(model, batch)

    return spoil
