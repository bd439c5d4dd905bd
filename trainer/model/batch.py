"""`Batch`, the padded inputs of a forward pass: merging several to one, finding the layout of its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np
import torch

from trainer.model.ragged import Layout

IGNORE = -100
"""Label of positions that take no part in the loss, as in Transformers."""


class Ahead(Protocol):
    """Vision outputs on their way to the device: `trainer.data.read_ahead`."""

    def take(self) -> torch.Tensor | None: ...


@dataclass
class Batch:
    """A padded batch. B samples, Q query tokens, lengths padded to the longest in the batch.

    It has its images in one of three forms: pixels, rows of a feature store, or the vision outputs themselves.
    """

    pixel_values: torch.Tensor | None
    """(B, 3, height, width), float."""
    qformer_ids: torch.Tensor
    """(B, instruction length)."""
    qformer_mask: torch.Tensor
    text_ids: torch.Tensor
    """(B, text length): the prompt (T5), or prompt and caption (decoder-only). The Q image tokens go before it."""
    text_mask: torch.Tensor
    labels: torch.Tensor
    """(B, caption length) for T5; (B, text length), masked up to the caption, for decoder-only. `IGNORE` elsewhere."""
    image_rows: torch.Tensor | None = None
    """(B,), the images' rows in a feature store."""
    image_embeds: torch.Tensor | None = None
    """(B, patches + 1, vision hidden size)."""
    layout: Layout | None = None
    """The layout of its rows, if it has been found already."""
    ahead: Ahead | None = None
    """The images of `image_rows`, if they are on their way."""

    def __len__(self) -> int:
        return self.labels.shape[0]

    def num_tokens(self) -> int:
        """Number of label tokens."""
        return int((self.labels != IGNORE).sum())

    def to(self, device: torch.device) -> Batch:
        """The batch on the device."""
        moved = self._each(lambda tensor: tensor.to(device, non_blocking=True))
        layout = None if self.layout is None else self.layout.to(device)
        return replace(moved, layout=layout, image_rows=self.image_rows)  # the store looks rows up on the host

    def micro(self, size: int) -> Iterator[Batch]:
        """Slices of at most `size` samples, padded as the whole batch is; the batch itself if it is no larger."""
        if len(self) <= size:
            yield self
            return
        for start in range(0, len(self), size):
            yield self._each(lambda tensor, start=start: tensor[start : start + size])  # type: ignore[misc]

    def pin_memory(self) -> Batch:
        """The batch in pinned memory; the DataLoader calls this where the device is a GPU."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        values: dict[str, Any] = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("layout", "ahead")
        }
        changed = {name: change(value) for name, value in values.items() if value is not None}
        return replace(self, **changed, layout=None, ahead=None)


def merge(batches: Sequence[Batch]) -> Batch:
    """Several batches, on the host and for the same model, as one, padded to the longest of all."""
    if len(batches) == 1:
        return batches[0]

    def joined(name: str, value: int) -> torch.Tensor:
        parts = [getattr(batch, name).numpy() for batch in batches]
        whole = np.full((sum(len(part) for part in parts), max(part.shape[1] for part in parts)), value, np.int64)
        at = 0
        for part in parts:
            whole[at : at + len(part), : part.shape[1]] = part
            at += len(part)
        return torch.from_numpy(whole)

    def images(name: str) -> torch.Tensor | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts)

    return Batch(
        pixel_values=images("pixel_values"),
        image_rows=images("image_rows"),
        image_embeds=images("image_embeds"),
        # Padded positions are masked: any id of the vocabulary will do.
        qformer_ids=joined("qformer_ids", 0),
        qformer_mask=joined("qformer_mask", 0),
        text_ids=joined("text_ids", 0),
        text_mask=joined("text_mask", 0),
        labels=joined("labels", IGNORE),
    )


def layout_of(config: Any, batch: Batch, longest: tuple[int, int] | None = None) -> Layout:
    """The layout of the batch's rows, for an InstructBLIP of this config; `longest` as in `Layout.of`.

    Found on the host, which would otherwise wait for a GPU at each length; by NumPy, since PyTorch takes five times as
    long for each operation on arrays this small.
    """
    device = batch.labels.device
    padded = (batch.qformer_ids, batch.qformer_mask, batch.text_ids, batch.text_mask, batch.labels)
    qformer_ids, qformer_mask, text_ids, text_mask, labels = (each.cpu().numpy() for each in padded)
    return Layout.of(
        instructions=(qformer_ids, qformer_mask != 0),
        text=(text_ids, text_mask != 0),
        labels=(labels, labels != IGNORE),
        queries=int(config.num_query_tokens),
        decoder_only=bool(config.use_decoder_only_language_model),
        device=device,
        longest=longest,
    )
