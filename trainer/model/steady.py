"""Batches in few shapes, so that a pass can be recorded once and played again (`trainer.model.graphs`).

Of RSICap's batches the label tokens alone differ, in number and in the longest caption. Both are filled up: captions
get tokens behind their end, which no other token sees, since language models look back only; their losses count for
nothing. What the host needs to know of a batch is then the same for all of a shape, and what differs is in tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from trainer.model.batch import IGNORE, Batch, layout_of
from trainer.model.ragged import Layout
from trainer.model.rounding import filled_longest, filled_up


@dataclass(frozen=True)
class Steady:
    """A pass's layout, and whose each label token is."""

    layout: Layout
    owners: torch.Tensor
    """(k, N): 1 where a label token is the run's, else 0; tokens that fill up are nobody's."""
    tokens: torch.Tensor
    """(k,): label tokens of each run."""


def steady(config: Any, batch: Batch, sizes: list[int]) -> Steady:
    """The layout of a batch on the host, filled up.

    Args:
        config: of the InstructBLIP.
        batch: of all runs of a pass, on the host.
        sizes: samples of each run.
    """
    labels = batch.labels.numpy()
    given = labels != IGNORE
    lengths = given.sum(1)
    longest = filled_longest(int(lengths.max()))
    wanted = filled_up(int(lengths.sum()))
    while longest * len(lengths) < wanted:
        longest = filled_longest(longest + 1)
    extra = _shared_out(wanted - int(lengths.sum()), longest - lengths)
    decoder_only = bool(config.use_decoder_only_language_model)
    # A caption ends where its sample does.
    ends = (batch.text_mask.numpy() != 0).sum(1) if decoder_only else lengths
    starts = ends - lengths
    width = int((ends + extra).max())
    columns = np.arange(width)
    fills = (columns >= ends[:, None]) & (columns < (ends + extra)[:, None])
    wider = {"labels": _widened(labels, width, fills, IGNORE)}
    if decoder_only:
        wider["text_ids"] = _widened(batch.text_ids.numpy(), width, fills, 0)
        wider["text_mask"] = _widened(batch.text_mask.numpy(), width, fills, 0, fill=1)
    tensors: dict[str, Any] = {name: torch.from_numpy(each) for name, each in wider.items()}
    filled = replace(batch, **tensors, layout=None)
    layout = layout_of(config, filled, ((int(starts.max()) + longest) if decoder_only else 0, longest))
    # Whose each token is.
    runs = np.repeat(np.arange(len(sizes)), sizes)
    of_rows = np.where(fills, -1, runs[:, None])[wider["labels"] != IGNORE]
    owners = of_rows == np.arange(len(sizes))[:, None]
    tokens = owners.sum(1)
    return Steady(layout, torch.from_numpy(owners.astype(np.int64)), torch.from_numpy(tokens.astype(np.int64)))


def _shared_out(number: int, room: np.ndarray) -> np.ndarray:
    """As many tokens behind the captions that have room for them, the last first."""
    backward = np.minimum(np.cumsum(room[::-1]), number)
    return np.ascontiguousarray(np.diff(backward, prepend=0)[::-1])


def _widened(values: np.ndarray, width: int, fills: np.ndarray, empty: int, fill: int = 0) -> np.ndarray:
    """The values with more columns, or fewer that are empty, and `fill` at some places."""
    out = np.full((len(values), width), empty, dtype=np.int64)
    kept = min(width, values.shape[1])
    out[:, :kept] = values[:, :kept]
    out[fills] = fill
    return out
