"""Passes that are recorded as CUDA graphs and played again: one launch in place of some thousands.

A step of 4 samples launches 9,000 kernels, and on an H200 it took 440 ms in float32 and 760 in bfloat16, of which
the GPU worked 87 and 28 (docs/gpu.md): the host could not launch any faster. A recording holds the kernels of a
forward and backward pass with the addresses that they read and write; new inputs are copied to where it reads them. It
computes the same bits as the pass that it was recorded from.
CUDA graphs: https://docs.pytorch.org/docs/stable/notes/cuda.html

Only passes of a shape (`trainer.model.steady`) are recorded, and only from its third use on: to record takes longer
than to carry it out, some 0.4 s on an H200, and the shapes of an epoch's last batches come rarely.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

MOST = 32
"""Recordings that are kept, those used last; each has the parameters of some thousands of kernels."""

USES = 2
"""That a pass of a shape is carried out before it is recorded."""

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(whole numbers, vision outputs), both on the device, -> results. All else that it reads stays where it is."""
Played = tuple[torch.Tensor, Callable[[], None]]
Recorder = Callable[[Callable[[], torch.Tensor], Sequence[torch.Generator], "Where"], Played]
"""(computation, generators that it draws from, where it is) -> (its results, what plays it again)."""

log = logging.getLogger("trainer.graphs")


class NotRecorded(Exception):
    """A pass could not be recorded, and was not carried out; its generators may be of no use any more."""


class Where:
    """Where the recordings of one device are made: their common memory and stream.

    PyTorch's own stream for it is of the device that was the current one at the first recording of the process; on
    another device's, a recording is empty, which is only warned of, and its results never change.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None


def record_cuda(compute: Callable[[], torch.Tensor], generators: Sequence[torch.Generator], where: Where) -> Played:
    """Record a computation, which is not carried out meanwhile, as a CUDA graph.

    Raises:
        RuntimeError: it does what a graph cannot hold, or memory ran out.
    """
    with torch.cuda.device(where.device):
        return _record(compute, generators, where)


def _record(compute: Callable[[], torch.Tensor], generators: Sequence[torch.Generator], where: Where) -> Played:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    before = torch.cuda.current_stream()
    try:
        # Other threads (vision outputs read ahead, pinned memory) may call what a recording thread may not.
        with torch.cuda.graph(graph, pool=where.pool, stream=where.stream, capture_error_mode="thread_local"):
            results = compute()
    finally:
        torch.cuda.set_stream(before)  # where ending the recording failed, it stays on the recording's stream
    return results, graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": record_cuda}
"""By kind of device; on others passes are not recorded."""


class _Recording:
    def __init__(self, whole: torch.Tensor, images: torch.Tensor, holds: Any) -> None:
        self.whole, self.images = whole, images
        self.holds = holds
        """What the recording reads and nobody else might keep."""
        self.results = torch.empty(())
        self.play: Callable[[], None] = lambda: None


class Graphs:
    """The recordings of a pack's passes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorder = RECORDERS.get(device.type)
        self._kept: OrderedDict[Hashable, _Recording | int] = OrderedDict()
        """What has been recorded, and how often other shapes came."""
        self._where: Where | None = None
        self._images: WeakValueDictionary[Any, torch.Tensor] = WeakValueDictionary()
        """Where recordings read vision outputs, by shape and dtype, for as long as one does: only one is played at a
        time, and 32 of 8 runs of 4 would have 1.5 GB of them in float32."""

    @property
    def on(self) -> bool:
        """Whether passes are recorded."""
        return self._recorder is not None

    def run(
        self,
        key: Hashable,
        whole: torch.Tensor,
        images: torch.Tensor,
        compute: Compute,
        generators: Sequence[torch.Generator] = (),
        holds: Callable[[], Any] = lambda: None,
    ) -> torch.Tensor:
        """The results of a pass, which the next pass of this key overwrites.

        Args:
            key: what its kernels depend on, but for the inputs' values.
            whole: whole numbers on the host, in pinned memory where the device is a GPU.
            images: vision outputs on the device.
            compute: the pass.
            generators: that it draws from, seeded before.
            holds: tensors to keep for as long as the recording.

        Raises:
            NotRecorded: it was to be recorded and cannot be; from now on none is.
        """
        recorder = self._recorder
        kept = self._kept.get(key, 0)
        if recorder is None or (isinstance(kept, int) and kept < USES):
            self._kept[key] = kept + 1 if isinstance(kept, int) else 0
            self._kept.move_to_end(key)
            self._drop_oldest()
            return compute(whole.to(self._device, non_blocking=True), images)
        if isinstance(kept, int):
            kept = _Recording(whole.to(self._device, copy=True), self._shared(images), holds())
            self._where = self._where or Where(self._device)
            try:
                kept.results, kept.play = recorder(lambda: compute(kept.whole, kept.images), generators, self._where)
            except RuntimeError as error:
                self.stop((str(error).strip().splitlines() or [type(error).__name__])[0])
                raise NotRecorded from error
            self._kept[key] = kept
            self._kept.move_to_end(key)
            self._drop_oldest()
        else:
            kept.whole.copy_(whole, non_blocking=True)
            kept.images.copy_(images)
            self._kept.move_to_end(key)
        kept.play()
        return kept.results

    def _shared(self, images: torch.Tensor) -> torch.Tensor:
        """The images in the memory that all recordings of their shape read."""
        key = images.shape, images.dtype
        there = self._images.get(key)
        if there is None:
            there = self._images[key] = images.clone()
        else:
            there.copy_(images)
        return there

    def stop(self, reason: str) -> None:
        """Record nothing from now on, and free what recordings hold."""
        log.warning("steps are not recorded as CUDA graphs from now on: %s", reason)
        self._recorder = None
        self.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def clear(self) -> None:
        """Forget all recordings."""
        self._kept.clear()
        self._where = None

    def __len__(self) -> int:
        return sum(isinstance(each, _Recording) for each in self._kept.values())

    def _drop_oldest(self) -> None:
        # Those that were used once are small, and many where hardly any batch has the shape of another.
        while len(self) > MOST or len(self._kept) > 32 * MOST:
            drop = _Recording if len(self) > MOST else (_Recording, int)
            oldest = next(key for key, each in self._kept.items() if isinstance(each, drop))
            del self._kept[oldest]
