"""Captions by an adapter on a base that other runs are training on at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from trainer.captions.generate import Captioner, Decoding
from trainer.config import TrainConfig
from trainer.model.base import Base
from trainer.model.lora import Adapter, Hooks, Segment


@dataclass
class _Hooked(Captioner):
    """A captioner that tells the hooks how many images a batch has."""

    hooks: Hooks
    adapter: Adapter

    def __call__(self, images: Sequence[Image], instruction: str) -> list[str]:
        self.hooks.segments = [Segment(self.adapter, 0, len(images), 0, 0)]
        try:
            return super().__call__(images, instruction)
        finally:
            self.hooks.segments = ()


@contextmanager
def hooked_captioner(base: Base, config: TrainConfig, adapter: Path | None, decoding: Decoding) -> Iterator[Captioner]:
    """A captioner, within the block. Afterwards the base is as it was.

    Args:
        base: the frozen base; the hooks of a pack may be in it.
        config: of the run that the adapter is from.
        adapter: its folder; None for the base alone.
        decoding: greedy, since beams would multiply the samples that the adapter is applied to.
    """
    assert decoding.num_beams == 1
    if adapter is None:
        yield Captioner(base.model, base.processor, base.device, base.dtype, decoding)
        return
    weights = Adapter(base.model, config)
    weights.load(adapter)
    hooks = Hooks(base.model)
    hooks.cover(weights.modules)
    try:
        yield _Hooked(base.model, base.processor, base.device, base.dtype, decoding, hooks, weights)
    finally:
        hooks.remove()
