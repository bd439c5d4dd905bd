"""`objective="cider"`: CIDEr-D of the captions that a trial's best checkpoint gives all validation images.

It is done once for a trial that is complete, not after every epoch: a caption of T tokens takes T passes through the
language model, the loss of all its tokens takes one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from search.evaluation.metrics import score
from trainer.captions.generate import Decoding, in_batches
from trainer.captions.hooked import hooked_captioner
from trainer.data.images import open_image

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.workbench import Workbench


def cider_of(
    config: TrainConfig, adapter: Path, bench: Workbench, go_on: Callable[[], bool] = lambda: True
) -> tuple[float, int] | None:
    """(CIDEr-D of all validation images with greedy captions, number of images).

    The captions are those of `search.evaluate --rows validation`, but for the rounding of sums in other batches.

    Args:
        config: the trial's; its validation rows, and its `eval_batch_size` images at once.
        adapter: folder of its best adapter.
        bench: the worker's.
        go_on: asked after each batch; once it says no, the captions are given up.

    Returns:
        None if they were given up.

    Raises:
        DataError: an image that cannot be read.
    """
    _, val = bench.datasets(config)
    base = bench.base(config)
    decoding = Decoding(max_new_tokens=config.max_target_length)
    items = [(partial(open_image, row.image), row.prompt) for row in val.rows]
    found: dict[int, str] = {}
    with hooked_captioner(base, config, adapter, decoding) as captioner:
        for number, text in in_batches(captioner, items, config.eval_batch_size):
            if isinstance(text, Exception):
                raise text
            found[number] = text
            if not go_on():
                return None
    values = score([found[n] for n in range(len(items))], [row.captions for row in val.rows]).values()
    return values["cider_d"], len(items)
