"""How the runs of a pack pass through their base: forward and backward, in as few passes as memory holds.

A pass computes the next step of several runs at once. Where memory runs out it is made again with less: without
recordings, with the layers computed again, with fewer runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from trainer import runtime
from trainer.member import Member
from trainer.model import updates
from trainer.model.base import Forward, at_least_float32, runs_on_rows
from trainer.model.batch import Batch, layout_of, merge
from trainer.model.forward import layers_again
from trainer.model.graphs import NotRecorded
from trainer.model.lora import Adapter, Hooks, Segment
from trainer.model.stacked import Stack, can_stack
from trainer.recorded import ForwardPass, Recorded

STACKS = 4
"""Stacks of adapters that are kept: of a pass of all runs, of its halves where memory is short, of evaluation."""

Group = tuple[Member, list[Batch], float]
"""A run, the batches of its next step, and the seconds waited for them."""

log = logging.getLogger("trainer.passes")


class Passes:
    """The passes of one pack over one base."""

    def __init__(self, forward: ForwardPass) -> None:
        self.forward = forward
        self.at_once: int | None = None
        """Most runs in one pass, where memory does not hold all of them; None for no limit."""
        self.again = False
        """Whether the language model's layers are computed again in the backward pass, since memory ran out."""
        self.squeezed = False
        """Whether memory ran out, and passes are carried out otherwise since then."""
        self.alive: Callable[[], None] = lambda: None
        """Called before each forward pass, in training and in evaluation."""
        self.records = True
        """Whether passes are recorded and played again where the device can do it (`trainer.recorded`)."""
        self.passing: Sequence[Member] = ()
        """The runs of the latest training pass."""
        self._recorded: Recorded | None = None
        self._hooks: Hooks | None = None
        self._stack: Stack | None = None
        self._stacks: dict[tuple[Adapter, ...], Stack] = {}

    @property
    def recordings(self) -> int:
        """How many passes are recorded."""
        return 0 if self._recorded is None else len(self._recorded)

    def cover(self, member: Member, model: Any) -> None:
        """Let a run's adapter act on the base, which is another than before only where no run is left on that."""
        if self._hooks is None or self._hooks.model is not model:
            self._hooks = Hooks(model)
            self._recorded = Recorded(self._hooks, member.device)
            # Padded to the longest of a pass, dropout would depend on a run's company.
            self.at_once = None if runs_on_rows(model.config) else 1
        self._hooks.cover(member.adapter.modules)

    def forget_runs(self) -> None:
        """Drop what was laid out for the runs until now."""
        self._stacks.clear()
        if self._recorded is not None:
            self._recorded.forget_runs()

    def close(self) -> None:
        """Leave the base as it was."""
        self.passing = ()
        self._stack = None
        self._stacks.clear()
        self._recorded = None
        if self._hooks is not None:
            self._hooks.remove()

    def make_room(self) -> bool:
        """Have the pass that ran out of memory need less, see `passing`; false where only smaller batches would.

        To be called outside of the `except` block, in which the traceback still holds the failed pass's tensors.
        """
        if self._forget_recordings():
            return True
        runtime.release_memory(self.passing[0].device)
        if self._waits_for_launches() and self.compute_again():
            return True
        if len(self.passing) > 1:
            self._pass_fewer(len(self.passing))
            return True
        return False

    def gradients(self, work: Sequence[Group]) -> list[tuple[int, torch.Tensor]]:
        """(label tokens, (loss, gradient norm, query peak) on the device) of each run's step."""
        size = self.at_once or len(work)
        figures: list[tuple[int, torch.Tensor]] = []
        for start in range(0, len(work), size):
            figures += self._pass(work[start : start + size])
        return figures

    def losses(self, parts: Sequence[tuple[Member, Batch]]) -> list[float]:
        """Each run's loss sum over its batch, in halves while memory runs out."""
        size = self.at_once or len(parts)
        if len(parts) > size:
            return [total for i in range(0, len(parts), size) for total in self.losses(parts[i : i + size])]
        try:
            if self._records([member for member, _ in parts]):
                assert self._recorded is not None
                self.alive()
                try:
                    return self._recorded.evaluate(parts, _vision_outputs(parts), self.forward).tolist()
                except NotRecorded as error:
                    self._note(error)
            out, segments = self._forward(parts, training=False)
            sums = [out.token_losses[s.first_token : s.last_token].double().sum() for s in segments]
            return torch.stack(sums).tolist()
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error) or (len(parts) == 1 and len(parts[0][1]) == 1):
                raise
        if self._forget_recordings():
            return self.losses(parts)
        runtime.release_memory(parts[0][0].device)
        if len(parts) > 1:
            self._pass_fewer(len(parts))
            return self.losses(parts)
        ((member, batch),) = parts
        halves = batch.micro((len(batch) + 1) // 2)
        return [sum(total for half in halves for total in self.losses([(member, half)]))]

    def compute_again(self) -> bool:
        """Have the language model's layers computed again from now on; false where that changes nothing."""
        if self._layers_again(self.passing) or not self._may_compute_again(self.passing):
            return False
        self.again = self.squeezed = True
        log.warning("out of memory: the language model's layers are computed again in the backward pass from now on")
        return True

    def _pass(self, work: Sequence[Group]) -> list[tuple[int, torch.Tensor]]:
        """The same for the runs of one pass, micro-batch after micro-batch."""
        self.passing = [member for member, _, _ in work]
        pieces = [
            [micro for batch in group for micro in batch.micro(member.micro_batch_size())] for member, group, _ in work
        ]
        tokens = [sum(batch.num_tokens() for batch in group) for _, group, _ in work]
        adapters = [member.adapter for member in self.passing]
        if all(len(parts) == 1 for parts in pieces) and self._records(self.passing):
            try:
                one = [(member, parts[0]) for member, parts in zip(self.passing, pieces, strict=True)]
                return self._recorded_pass(one, tokens)
            except NotRecorded as error:
                self._note(error)  # the step is made anew, its dropout drawn by the runs' own generators
        weights = adapters[0].weights
        zero = at_least_float32(torch.zeros((), dtype=weights.dtype, device=weights.device))
        losses, peaks = [zero] * len(work), [zero] * len(work)
        updates.zero_gradients(adapters)
        for member in self.passing:
            member.seed()
        for turn in range(max(len(parts) for parts in pieces)):
            here = [i for i, parts in enumerate(pieces) if turn < len(parts)]
            out, segments = self._forward([(work[i][0], pieces[i][turn]) for i in here], training=True)
            shares = []
            for i, segment in zip(here, segments, strict=True):
                # The mean over all tokens of the step, however it is cut into micro-batches.
                shares.append(out.token_losses[segment.first_token : segment.last_token].sum() / tokens[i])
                losses[i] = losses[i] + shares[-1].detach()
                # NaN goes through abs, amax and maximum.
                peak = out.query_output.detach()[segment.start : segment.stop].abs().amax()
                peaks[i] = torch.maximum(peaks[i], at_least_float32(peak))
            # Each run's loss is a root of its own: in their sum, one NaN would reach all of them. A run whose adapters
            # all sit where nothing is read (the text feed-forward of the Q-Former's last layer) may have no gradient.
            live = [share for share in shares if share.requires_grad]
            if live:
                torch.autograd.backward(live)
            if self._stack is not None:
                self._stack.add_gradients()
            del out, shares, live  # frees this graph before the next micro-batch's is built
        norms = [at_least_float32(norm) for norm in updates.norms(adapters)]
        figures = torch.stack([figure for each in zip(losses, norms, peaks, strict=True) for figure in each])
        return list(zip(tokens, figures.view(-1, 3).unbind(), strict=True))

    def _recorded_pass(
        self, parts: Sequence[tuple[Member, Batch]], tokens: Sequence[int]
    ) -> list[tuple[int, torch.Tensor]]:
        """The same by a recording: whatever its shape was first."""
        assert self._recorded is not None
        self.alive()
        # In the order of their batches' sizes: whoever comes and goes, there are fewer shapes. Not of this batch's, an
        # epoch's last being smaller: each order of the runs is a stack to be laid out.
        order = sorted(range(len(parts)), key=lambda i: parts[i][0].config.batch_size)
        parts = [parts[i] for i in order]
        adapters = [member.adapter for member, _ in parts]
        updates.zero_gradients(adapters)
        for member, _ in parts:
            member.seed()
        losses, peaks = self._recorded.train(parts, _vision_outputs(parts), self.forward)
        norms = torch.stack([at_least_float32(norm) for norm in updates.norms(adapters)])
        figures = torch.stack([losses, norms, peaks], 1).unbind()
        return [(each, figures[order.index(i)]) for i, each in enumerate(tokens)]

    def _forward(self, parts: Sequence[tuple[Member, Batch]], *, training: bool) -> tuple[Forward, list[Segment]]:
        """One pass over the batches of several runs, each seeing its own adapter."""
        assert self._hooks is not None
        self.alive()
        batch = merge([part for _, part in parts])
        if batch.layout is None:  # a run alone keeps its validation batches, with their layouts
            batch.layout = layout_of(self._hooks.model.config, batch)
        segments: list[Segment] = []
        for member, part in parts:
            last = segments[-1] if segments else None
            start, token = (last.stop, last.last_token) if last else (0, 0)
            segments.append(Segment(member.adapter, start, start + len(part), token, token + part.num_tokens()))
        moved = batch.to(parts[0][0].device)
        if batch.image_rows is not None:
            moved.image_embeds = _vision_outputs(parts)
        self._hooks.segments, self._hooks.training = segments, training
        self._hooks.stack = self._stacked([segment.adapter for segment in segments])
        again = training and self._layers_again([member for member, _ in parts])
        try:
            with layers_again(again):
                return self.forward(self._hooks.model, moved), segments
        finally:
            self._hooks.segments = ()

    def _stacked(self, adapters: Sequence[Adapter]) -> Stack | None:
        """The adapters of a pass with their weights as they are now, to be computed together, if they can be."""
        self._stack = None
        if can_stack(adapters):
            key = tuple(adapters)
            if key not in self._stacks:
                if len(self._stacks) >= STACKS:
                    self._stacks.clear()
                self._stacks[key] = Stack(adapters)
            self._stack = self._stacks[key]
            self._stack.load()
        return self._stack

    def _forget_recordings(self) -> bool:
        """Free what recordings hold, and record no more; false if there are none."""
        if self._recorded is None or not len(self._recorded):
            return False
        self._recorded.stop("out of memory")
        self.squeezed = True
        return True

    def _note(self, error: NotRecorded) -> None:
        """A pass that cannot be recorded for another reason than memory never could be."""
        self.squeezed = self.squeezed or (error.__cause__ is not None and runtime.is_out_of_memory(error.__cause__))

    def _records(self, members: Sequence[Member]) -> bool:
        return (
            self.records
            and self._recorded is not None
            and self._recorded.takes(members)
            and not self._layers_again(members)
        )

    def _pass_fewer(self, size: int) -> None:
        self.at_once = (size + 1) // 2
        self.squeezed = True
        log.warning("out of memory with %d runs in one pass; continuing with %d", size, self.at_once)

    def _layers_again(self, members: Sequence[Member]) -> bool:
        wanted = self.again or any(m.config.gradient_checkpointing == "always" for m in members)
        return wanted and self._may_compute_again(members)

    def _may_compute_again(self, members: Sequence[Member]) -> bool:
        """Whether no run forbids it, and none has an adapter in the language model, whose dropout is drawn once."""
        assert self._hooks is not None
        return runs_on_rows(self._hooks.model.config) and not any(
            m.config.gradient_checkpointing == "never" or m.adapter.in_language_model for m in members
        )

    def _waits_for_launches(self) -> bool:
        """Whether two small passes take longer than one that computes a third more: where launches are waited for.

        On an H200 in every precision: a step of 4 samples that is not recorded, and neither way is, takes 405 ms in
        float32, of which the GPU works 87 (docs/gpu.md).
        """
        return self.passing[0].device.type == "cuda"


def _vision_outputs(parts: Sequence[tuple[Member, Batch]]) -> torch.Tensor:
    """The vision outputs of the parts' images: those read ahead, or looked up in one go where parts share a store."""
    stores = [member.features for member, _ in parts]
    rows = [batch.image_rows for _, batch in parts]
    assert stores[0] is not None
    if all(store is stores[0] for store in stores) and not any(batch.ahead for _, batch in parts):
        return stores[0].take(torch.cat([each for each in rows if each is not None]))
    found = []
    for store, each, (_, batch) in zip(stores, rows, parts, strict=True):
        assert store is not None and each is not None
        here = None if batch.ahead is None else batch.ahead.take()
        found.append(store.take(each) if here is None else here)
    return found[0] if len(found) == 1 else torch.cat(found)
