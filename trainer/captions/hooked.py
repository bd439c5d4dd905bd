"""Captions by an adapter on a base that other runs are training on at the same time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.captions.generate import Captioner, Decoding
from trainer.config import TrainConfig
from trainer.model.base import Base
from trainer.model.lora import Adapter, Hooks, Segment


@contextmanager
def hooked_captioner(
    base: Base, config: TrainConfig, adapter: Path | None, decoding: Decoding, size: int
) -> Iterator[Captioner]:
    """A captioner for batches of exactly `size` images, within the block. Afterwards the base is as it was.

    Args:
        base: the frozen base; the hooks of a pack may be in it.
        config: of the run that the adapter is from.
        adapter: its folder; None for the base alone.
        decoding: greedy, since beams would multiply the samples that the adapter is applied to.
        size: images in each batch.
    """
    assert decoding.num_beams == 1
    captioner = Captioner(base.model, base.processor, base.device, base.dtype, decoding)
    if adapter is None:
        yield captioner
        return
    weights = Adapter(base.model, config)
    weights.load(adapter)
    hooks = Hooks(base.model)
    hooks.cover(weights.modules)
    hooks.segments = [Segment(weights, 0, size, 0, 0)]
    try:
        yield captioner
    finally:
        hooks.segments = ()
        hooks.remove()
