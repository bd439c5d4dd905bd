"""Vision outputs that do not fit on the GPU, fetched for the next step while this one is computed.

A thread gathers the rows into pinned memory and copies them on a stream of its own; whoever takes them makes the GPU,
not the host, wait for that copy. Without it the training thread gathers them itself: 46 MB for 8 runs of 4 at the real
size, in float32.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainer.model.batch import Batch

log = logging.getLogger("trainer.data.read_ahead")

Rows = Sequence[torch.Tensor]
"""(P, D) each, on the host."""


def gathered(rows: Rows, device: torch.device) -> torch.Tensor:
    """(B, P, D) on the device, copied on the current stream."""
    if device.type != "cuda":
        return torch.stack(list(rows))
    # A fresh pinned buffer each time: PyTorch's host allocator hands it out again only after the copy has ended.
    pinned = torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype, pin_memory=True)
    return torch.stack(list(rows), out=pinned).to(device, non_blocking=True)


class Ahead:
    """Rows on their way to the device."""

    def __init__(self, future: Future[tuple[torch.Tensor, torch.cuda.Event | None]]) -> None:
        self._future = future

    def take(self) -> torch.Tensor | None:
        """(B, P, D) for the current stream, which waits for the copy; None if it failed: memory may have run out."""
        try:
            found, copied = self._future.result()
        except (RuntimeError, MemoryError) as error:
            log.warning("vision outputs could not be read ahead: %s", error)
            return None
        if copied is not None:
            stream = torch.cuda.current_stream(found.device)
            stream.wait_event(copied)
            found.record_stream(stream)  # the memory is of the other stream, which must not reuse it before this one
        return found


class Reader:
    """The thread that reads ahead for one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "read-ahead")

    def begin(self, rows: Rows) -> Ahead:
        """Begin to fetch rows."""
        return Ahead(self._thread.submit(self._fetch, rows))

    def _fetch(self, rows: Rows) -> tuple[torch.Tensor, torch.cuda.Event | None]:
        if self._stream is None:
            return gathered(rows, self._device), None
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            found = gathered(rows, self._device)
            return found, self._stream.record_event()


def begun_ahead(batches: Iterable[Batch], number: int, begin: Callable[[torch.Tensor], Ahead]) -> Iterator[Batch]:
    """The batches, each begun `number` batches before it is wanted.

    Args:
        batches: with rows of a store, in order.
        number: batches that are held besides the one that is given out.
        begin: begins to fetch (B,) rows.
    """
    waiting: deque[Batch] = deque()
    for batch in batches:
        assert batch.image_rows is not None
        batch.ahead = begin(batch.image_rows)
        waiting.append(batch)
        if len(waiting) > number:
            yield waiting.popleft()
    yield from waiting
