"""Passes of a pack's runs that are recorded once and played again: which ones can be, and what they compute.

A recording is of a shape, not of runs: the adapters lie in a room of memory that is loaded before each pass, and what
belongs to a run (weights, scaling, rate of dropout, whose a token is) reaches the kernels through tensors. So a trial
that takes the place of another goes on with the other's recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer.member import Member
from trainer.model.base import Forward, at_least_float32, runs_on_rows
from trainer.model.batch import Batch, merge
from trainer.model.forward import position_biases
from trainer.model.graphs import Graphs, NotRecorded
from trainer.model.lora import Adapter, Hooks, Segment
from trainer.model.ragged import flat, shape_of, views
from trainer.model.rounding import filled_rank
from trainer.model.stacked import Room, Stack, alike
from trainer.model.steady import Steady, steady

ROOMS = 8
"""Rooms that are kept, for numbers of runs and ranks, and stacks of runs in them."""

ForwardPass = Callable[[Any, Batch], Forward]
"""(InstructBLIP, batch on its device) -> losses and query output: `trainer.model.base.forward`, or a stand-in."""


class Recorded:
    """The recorded passes of a pack on one base."""

    def __init__(self, hooks: Hooks, device: torch.device) -> None:
        self._hooks = hooks
        self._device = device
        self._graphs = Graphs(device)
        self._rooms: dict[tuple[Any, ...], Room] = {}
        self._stacks: dict[tuple[Adapter, ...], Stack] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    @property
    def on(self) -> bool:
        """Whether any pass is recorded here."""
        return self._graphs.on

    def takes(self, members: Sequence[Member]) -> bool:
        """Whether passes of these runs can be recorded.

        Their rows at adapted modules have to be the same from batch to batch, so that adapters in the language model
        are out; images have to be vision outputs, the base on one device and of a kind that runs on rows.
        """
        first = members[0]
        return (
            self.on
            and first.features is not None
            and first.config.device_map == "single"
            and runs_on_rows(self._hooks.model.config)
            and all(member.adapter.fused and not member.adapter.in_language_model for member in members)
            and alike([member.adapter for member in members])
        )

    def forget_runs(self) -> None:
        """Drop what belongs to the runs of now; recordings stay."""
        self._stacks.clear()

    def stop(self, reason: str) -> None:
        """Record nothing from now on."""
        self._graphs.stop(reason)
        self._rooms.clear()
        self._stacks.clear()

    def train(
        self, parts: Sequence[tuple[Member, Batch]], images: torch.Tensor, forward: ForwardPass
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Each run's mean loss over its label tokens, its query peak), (k,) each; gradients go to the adapters.

        The generators of dropout have been seeded for this step.

        Raises:
            NotRecorded: nothing was computed, and no pass is recorded from now on.
        """
        stack = self._stack([member.adapter for member, _ in parts])
        stack.load()
        stack.seed()

        def compute(out: Forward, found: Steady, segments: Sequence[Segment]) -> torch.Tensor:
            losses = _own(out.token_losses, found).sum(1) / found.tokens
            peaks = [out.query_output.detach()[s.start : s.stop].abs().amax() for s in segments]
            # Each run's loss is a root of its own: in their sum, one NaN would reach all of them.
            if losses.requires_grad:
                torch.autograd.backward(losses, torch.ones_like(losses))
            return torch.stack([losses.detach(), at_least_float32(torch.stack(peaks)).to(losses.dtype)])

        found = self._run(parts, images, forward, stack, compute, training=True)
        stack.add_gradients()
        losses, peaks = found.unbind()
        return losses, peaks

    def evaluate(
        self, parts: Sequence[tuple[Member, Batch]], images: torch.Tensor, forward: ForwardPass
    ) -> torch.Tensor:
        """Each run's sum of losses over its label tokens, (k,), float64. Raises as `train`."""
        stack = self._stack([member.adapter for member, _ in parts])
        stack.load()

        def compute(out: Forward, found: Steady, _: Sequence[Segment]) -> torch.Tensor:
            return _own(out.token_losses, found).double().sum(1)

        return self._run(parts, images, forward, stack, compute, training=False)

    def _run(
        self,
        parts: Sequence[tuple[Member, Batch]],
        images: torch.Tensor,
        forward: ForwardPass,
        stack: Stack,
        results: Callable[[Forward, Steady, Sequence[Segment]], torch.Tensor],
        *,
        training: bool,
    ) -> torch.Tensor:
        hooks, model = self._hooks, self._hooks.model
        sizes = [len(part) for _, part in parts]
        host = steady(model.config, merge([part for _, part in parts]), sizes)
        segments = _segments(parts, sizes)
        none = torch.empty((sum(sizes), 0), dtype=torch.long, device=self._device)

        def compute(whole: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
            found = views(host, whole)
            batch = Batch(None, none, none, none, none, none, image_embeds=images, layout=found.layout)
            with hooks.recording(segments, stack, training=training):
                return results(forward(model, batch), found, segments)

        key = (stack.room, stack.drops and training, training, shape_of(host), tuple(sizes), images.shape)
        whole = flat(host, pin=self._device.type == "cuda")
        generators = stack.generators if training else ()

        def holds() -> Any:
            return none, position_biases()

        try:
            return self._graphs.run(key, whole, images, compute, generators, holds)
        except NotRecorded:
            self._rooms.clear()
            self._stacks.clear()
            raise

    def _stack(self, adapters: Sequence[Adapter]) -> Stack:
        """The adapters in a room that has been used before, if there is one of the size."""
        key = tuple(adapters)
        if key not in self._stacks:
            rank = filled_rank(adapter.config.lora_r for adapter in adapters)
            size = (len(adapters), rank, adapters[0].modules, adapters[0].weights.dtype)
            if size not in self._rooms:
                if len(self._rooms) >= ROOMS:
                    self._graphs.clear()
                    self._rooms.clear()
                    self._stacks.clear()
                self._rooms[size] = Room(len(adapters), rank, adapters[0])
            if len(self._stacks) >= ROOMS:
                self._stacks.clear()
            self._stacks[key] = Stack(adapters, self._rooms[size])
        return self._stacks[key]


def _own(token_losses: torch.Tensor, found: Steady) -> torch.Tensor:
    """(k, N): each run's losses, 0 where a token is another's, whatever its loss."""
    return token_losses.expand(len(found.tokens), -1).masked_fill(found.owners == 0, 0.0)


def _segments(parts: Sequence[tuple[Member, Batch]], sizes: Sequence[int]) -> list[Segment]:
    """The runs' samples; their tokens are told by `Steady`."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [
        Segment(member.adapter, end - size, end, 0, 0)
        for (member, _), size, end in zip(parts, sizes, ends, strict=True)
    ]
