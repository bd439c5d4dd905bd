"""The loss of an adapter on rows that its run did not train on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from trainer import runtime
from trainer.config import TrainConfig
from trainer.data.batches import CaptionDataset, Pixels, batches, eval_loader
from trainer.model.base import forward
from trainer.model.batch import IGNORE, Batch, layout_of
from trainer.model.lora import Adapter, Hooks, Segment

if TYPE_CHECKING:
    from trainer.data.dataset import Row
    from trainer.workbench import Workbench


def loss_sums(
    bench: Workbench,
    config: TrainConfig,
    adapter: Path,
    rows: Sequence[Row],
    alive: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """What the rows add to the loss, which is the mean over all label tokens, as in validation.

    Args:
        bench: has the base, whose hooks of other runs are not in use.
        config: of the run that the adapter is from.
        adapter: its folder.
        rows: to be seen; of a row with several captions each counts.
        alive: called before each batch; what it raises ends this.

    Returns:
        (rows, 2), float64: sum of the losses of a row's label tokens, their number.

    Raises:
        UserError: a model, adapter or image that cannot be used.
    """
    runtime.prepare(config)
    base, tokenizer = bench.base(config), bench.tokenizer(config)
    weights = Adapter(base.model, config)
    weights.load(adapter)
    dataset = CaptionDataset(rows, tokenizer, Pixels(base.processor.image_processor))
    hooks = Hooks(base.model)
    hooks.cover(weights.modules)

    def sums(batch: Batch) -> list[tuple[float, int]]:
        """(loss sum, tokens) of each sample, in halves while memory runs out."""
        alive()
        batch.layout = layout_of(base.model.config, batch)
        tokens = (batch.labels != IGNORE).sum(1).tolist()
        hooks.segments, hooks.training = [Segment(weights, 0, len(batch), 0, sum(tokens))], False
        try:
            losses = forward(base.model, batch.to(base.device)).token_losses.double().split(tokens)
            return list(zip(torch.stack([each.sum() for each in losses]).tolist(), tokens, strict=True))
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error) or len(batch) == 1:
                raise
        runtime.release_memory(base.device)
        return [each for half in batch.micro((len(batch) + 1) // 2) for each in sums(half)]

    found = np.zeros((len(rows), 2))
    try:
        with torch.no_grad():
            each = (
                pair for batch in batches(eval_loader(dataset, tokenizer, config, pin=False)) for pair in sums(batch)
            )
            for row, pair in zip(dataset.row_of, each, strict=True):
                found[row] += pair
    finally:
        hooks.remove()
    return found
