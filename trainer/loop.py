"""The training loop: runs that train together in one forward and backward pass on one frozen base.

`Pack` holds several runs and makes one optimizer step of each in a round; `train` is a pack of one, as a generator of
events. They report facts and decide nothing. Each run has its own adapter, data order, dropout, schedule, clipping,
optimizer and epochs, and behaves as if alone: to the last bit but for the rounding of sums whose order depends on how
many rows a matrix has (tests/trainer/test_pack.py holds it to 1e-12 in float64, against PEFT and PyTorch's AdamW).

The frozen base runs in evaluation mode: its own dropout is off, in training too. What regularises a run is
`lora_dropout`, which the search samples. So attention takes the fused kernels, and a run's random numbers are its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from trainer import checkpoint, kernels, runtime
from trainer.common.errors import ConfigError, UserError
from trainer.config import TrainConfig
from trainer.events import EpochEnded, Event, MicroBatchReduced, OutOfMemory
from trainer.member import Member, Step
from trainer.model import updates
from trainer.model.base import Forward, at_least_float32, forward, runs_on_rows
from trainer.model.batch import Batch, layout_of, merge
from trainer.model.forward import layers_again
from trainer.model.lora import Adapter, Hooks, Segment
from trainer.model.stacked import Stack, can_stack
from trainer.recorded import Recorded
from trainer.workbench import Workbench

CUDA_WINDOW = 8
"""Rounds on a GPU after which losses and norms are fetched: each time, the host waits for the device."""

STACKS = 4
"""Stacks of adapters that are kept: of a pass of all runs, of its halves where memory is short, of evaluation."""

SHARED = ("model", "torch_dtype", "base_dtype", "device", "device_map", "matmul_precision", "deterministic")
"""Fields that runs of a pack have in common, besides the form in which they see images."""

Group = tuple[Member, list[Batch], float]
"""A run, the batches of its next step, and the seconds waited for them."""
RunError = UserError | OSError
"""An error of one run's own (an image that went bad, a disk that is full): it ends that run and leaves the others
alone."""
ForwardPass = Callable[[Any, Batch], Forward]
"""(InstructBLIP, batch on its device) -> losses and query output: `trainer.model.base.forward`, or a stand-in."""

log = logging.getLogger("trainer.loop")


def train(config: TrainConfig, bench: Workbench, out_dir: Path, *, forward: ForwardPass = forward) -> Iterator[Event]:
    """Train one configuration and yield its events; closing the generator stops the run.

    A run whose `out_dir` holds a checkpoint of the same configuration continues after its last whole epoch, bit for
    bit as if it had never stopped; `history_of` has the epochs before.

    Raises:
        UserError: model, data or checkpoint cannot be used.
    """
    with Pack(bench, forward=forward) as pack:
        pack.add(config, out_dir)
        while pack.members:
            for _, event in pack.round():
                if isinstance(event, RunError):
                    raise event
                yield event


def history_of(config: TrainConfig, out_dir: Path) -> list[EpochEnded]:
    """The whole epochs that a run's newest checkpoint remembers."""
    return checkpoint.load(out_dir, config).state.history


class Pack:
    """Runs on one base. A context manager: on leaving, the base is as it was and the runs are dropped."""

    def __init__(self, bench: Workbench, *, forward: ForwardPass = forward) -> None:
        self.bench = bench
        self.forward = forward
        self.members: list[Member] = []
        self.at_once: int | None = None
        """Most runs in one pass, where memory does not hold all of them; None for no limit."""
        self.again = False
        """Whether the language model's layers are computed again in the backward pass, since memory ran out."""
        self.alive: Callable[[], None] = lambda: None
        """Called before each forward pass, in training and in evaluation."""
        self.window: int | None = None
        """Rounds after which figures are fetched; None for what suits the device."""
        self.records = True
        """Whether passes are recorded and played again where the device can do it (`trainer.recorded`)."""
        self._recorded: Recorded | None = None
        self._hooks: Hooks | None = None
        self._stack: Stack | None = None
        self._stacks: dict[tuple[Adapter, ...], Stack] = {}
        self._pending: list[list[tuple[Member, Step]]] = []
        self._passing: Sequence[Member] = ()

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.members.clear()
        self._pending.clear()
        self._passing = ()
        self._stack = None
        self._stacks.clear()
        self._recorded = None
        if self._hooks is not None:
            self._hooks.remove()

    def accepts(self, config: TrainConfig) -> bool:
        """Whether this configuration can train beside the runs that are in the pack: on one base, computed alike."""
        if not self.members:
            return True
        other = self.members[0]
        # In this order: whether it uses features is asked of its base, which must not take the place of this one.
        return all(getattr(config, name) == getattr(other.config, name) for name in SHARED) and (
            self.bench.uses_features(config) == (other.features is not None)
        )

    def add(self, config: TrainConfig, out_dir: Path) -> Member:
        """Take in a run, which begins with the next round and disturbs no other.

        Raises:
            UserError: model, data or checkpoint cannot be used.
        """
        if not self.accepts(config):
            raise ConfigError(f"runs that train together need the same {', '.join(SHARED)} and cache_features")
        runtime.prepare(config)
        inputs = self.bench.inputs(config)
        base = inputs.base
        if self._hooks is None or self._hooks.model is not base.model:
            self._hooks = Hooks(base.model)
            self._recorded = Recorded(self._hooks, base.device)
            # Padded to the longest of a pass, dropout would depend on a run's company.
            self.at_once = None if runs_on_rows(base.model.config) else 1
        member = Member(config, inputs, out_dir)
        self._hooks.cover(member.adapter.modules)
        self._window = self.window or (CUDA_WINDOW if base.device.type == "cuda" and member.adapter.fused else 1)
        self.members.append(member)
        return member

    def remove(self, member: Member) -> None:
        """Drop a run, between two rounds or in answer to one of its events."""
        if member in self.members:
            self.members.remove(member)
            self._stacks.clear()
            if self._recorded is not None:
                self._recorded.forget_runs()

    def round(self) -> Iterator[tuple[Member, Event | RunError]]:
        """One optimizer step of every run, and the evaluation and checkpoint of those whose epoch ends with it.

        Runs that have ended are gone from `members` afterwards.

        Raises:
            Exception: an error of no single run. The pack is unusable; its runs' checkpoints are intact.
        """
        # New runs start.
        for member in list(self.members):
            if not member.started:
                yield member, member.start()
        # One optimizer step of each, and the events of those whose figures are due.
        work: list[Group] = []
        for member in [m for m in self.members if not m.ended]:
            try:
                work.append((member, *member.next_group()))
            except (UserError, OSError) as error:
                member.ended = True
                yield member, error
        yield from self._step([each for each in work if each[0] in self.members])
        if self._pending and (len(self._pending) >= self._window or any(m.epoch_is_trained for m in self.members)):
            yield from self._fetch()
        # Epochs end, with evaluation and checkpoint; runs that have ended leave.
        finishing = [member for member in self.members if member.epoch_is_trained]
        if finishing:
            yield from self._end_epochs(finishing)
        for member in list(self.members):
            if member.ended:
                self.remove(member)

    def _step(self, work: list[Group]) -> Iterator[tuple[Member, Event]]:
        """One optimizer step of each run, repeated with fewer runs or samples at once while memory runs out."""
        # Gradients, with less at once until they fit.
        while work:
            began = time.perf_counter()
            detail = ""
            try:
                with kernels.strict(work[0][0].config, work[0][0].device):
                    done = self._gradients(work)
            except (RuntimeError, MemoryError) as error:
                if kernels.gave_up(error):
                    continue
                if not runtime.is_out_of_memory(error):
                    raise
                detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not detail:
                break
            # Outside the except block: there the traceback would still hold the tensors of the failed pass.
            if self._forget_recordings():
                continue
            runtime.release_memory(work[0][0].device)
            if self._waits_for_launches() and self._compute_again():
                continue
            if len(self._passing) > 1:
                self._pass_fewer(len(self._passing))
                continue
            (member,) = self._passing
            (group,) = [group for other, group, _ in work if other is member]
            size = min(member.micro_batch_size(), max(len(batch) for batch in group)) // 2
            if size < 1:
                if self._compute_again():
                    continue
                member.ended = True
                work = [each for each in work if each[0] is not member]
                yield member, OutOfMemory(step=member.next_step, detail=detail)
                continue
            member.state.micro_batch_size = size
            yield member, MicroBatchReduced(step=member.next_step, micro_batch_size=size)
        if not work:
            return
        # Updates; the time of the pass is divided by samples.
        members = [member for member, _, _ in work]
        updates.update([m.adapter for m in members], [m.rate() for m in members], torch.stack([f for _, f in done]))
        steps = [
            (member, member.stepped(group, tokens, figures, wait_s))
            for (member, group, wait_s), (tokens, figures) in zip(work, done, strict=True)
        ]
        seconds = time.perf_counter() - began
        samples = sum(step.num_samples for _, step in steps)
        for _, step in steps:
            step.step_s = seconds * step.num_samples / samples
        self._pending.append(steps)

    def _forget_recordings(self) -> bool:
        """Free what recordings hold, and record no more; false if there are none."""
        if self._recorded is None or not len(self._recorded):
            return False
        self._recorded.stop("out of memory")
        return True

    def _records(self, members: Sequence[Member]) -> bool:
        return (
            self.records
            and self._recorded is not None
            and self._recorded.takes(members)
            and not self._layers_again(members)
        )

    def _pass_fewer(self, size: int) -> None:
        self.at_once = (size + 1) // 2
        log.warning("out of memory with %d runs in one pass; continuing with %d", size, self.at_once)

    def _compute_again(self) -> bool:
        """Have the language model's layers computed again from now on; false where that changes nothing."""
        if self._layers_again(self._passing) or not self._may_compute_again(self._passing):
            return False
        self.again = True
        log.warning("out of memory: the language model's layers are computed again in the backward pass from now on")
        return True

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
        return self._passing[0].device.type == "cuda"

    def _gradients(self, work: Sequence[Group]) -> list[tuple[int, torch.Tensor]]:
        """(label tokens, (loss, gradient norm, query peak) on the device) of each run's step."""
        size = self.at_once or len(work)
        figures: list[tuple[int, torch.Tensor]] = []
        for start in range(0, len(work), size):
            figures += self._pass(work[start : start + size])
        return figures

    def _pass(self, work: Sequence[Group]) -> list[tuple[int, torch.Tensor]]:
        """The same for the runs of one pass, micro-batch after micro-batch."""
        self._passing = [member for member, _, _ in work]
        pieces = [
            [micro for batch in group for micro in batch.micro(member.micro_batch_size())] for member, group, _ in work
        ]
        tokens = [sum(batch.num_tokens() for batch in group) for _, group, _ in work]
        adapters = [member.adapter for member in self._passing]
        if all(len(parts) == 1 for parts in pieces) and self._records(self._passing):
            return self._recorded_pass([(m, parts[0]) for m, parts in zip(self._passing, pieces, strict=True)], tokens)
        weights = adapters[0].weights
        zero = at_least_float32(torch.zeros((), dtype=weights.dtype, device=weights.device))
        losses, peaks = [zero] * len(work), [zero] * len(work)
        updates.zero_gradients(adapters)
        for member in self._passing:
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

    def _fetch(self) -> Iterator[tuple[Member, Event]]:
        """The events of the rounds whose figures are still on the device: here alone the host waits for it."""
        pending, self._pending = self._pending, []
        waiting = time.perf_counter()
        fetched = torch.stack([step.figures for steps in pending for _, step in steps]).tolist()
        # A GPU computes meanwhile what the rounds have only launched: steps take this time too.
        waited = time.perf_counter() - waiting
        samples = sum(step.num_samples for steps in pending for _, step in steps)
        for _, step in (each for steps in pending for each in steps):
            step.step_s += waited * step.num_samples / samples
        figures = iter(fetched)
        for steps in pending:
            for member, step in steps:
                loss, norm, peak = next(figures)
                if member.ended or member not in self.members:
                    continue  # it diverged at an earlier step
                for event in member.step_ended(step, (loss, norm, peak)):
                    yield member, event

    def _end_epochs(self, finishing: Sequence[Member]) -> Iterator[tuple[Member, Event | RunError]]:
        """Evaluate and save; runs with the same validation rows are evaluated in the same passes."""
        by_rows: dict[tuple[object, ...], list[Member]] = {}
        for member in finishing:
            by_rows.setdefault(member.val_key, []).append(member)
        for alike in by_rows.values():
            began = time.perf_counter()
            with kernels.strict(alike[0].config, alike[0].device):
                losses = self._evaluate(alike)
            seconds = (time.perf_counter() - began) / len(alike)
            for member, loss in zip(alike, losses, strict=True):
                if member not in self.members:
                    continue
                try:
                    ended = member.epoch_ended(loss, seconds)
                except OSError as error:
                    member.ended = True
                    yield member, error
                    continue
                for event in ended:
                    yield member, event

    @torch.no_grad()
    def _evaluate(self, members: Sequence[Member]) -> list[float]:
        """Each run's mean loss over all label tokens of the validation split."""
        totals, tokens = [0.0] * len(members), 0
        for batch in zip(*(member.val_batches() for member in members), strict=True):
            sums = self._evaluate_batch(list(zip(members, batch, strict=True)))
            totals = [total + each for total, each in zip(totals, sums, strict=True)]
            tokens += batch[0].num_tokens()
        return [total / tokens for total in totals]

    def _evaluate_batch(self, parts: Sequence[tuple[Member, Batch]]) -> list[float]:
        """Each run's loss sum over its batch, in halves while memory runs out."""
        size = self.at_once or len(parts)
        if len(parts) > size:
            return [total for i in range(0, len(parts), size) for total in self._evaluate_batch(parts[i : i + size])]
        try:
            if self._records([member for member, _ in parts]):
                assert self._recorded is not None
                self.alive()
                return self._recorded.evaluate(parts, _vision_outputs(parts), self.forward).tolist()
            out, segments = self._forward(parts, training=False)
            sums = [out.token_losses[s.first_token : s.last_token].double().sum() for s in segments]
            return torch.stack(sums).tolist()
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error) or (len(parts) == 1 and len(parts[0][1]) == 1):
                raise
        if self._forget_recordings():
            return self._evaluate_batch(parts)
        runtime.release_memory(parts[0][0].device)
        if len(parts) > 1:
            self._pass_fewer(len(parts))
            return self._evaluate_batch(parts)
        ((member, batch),) = parts
        halves = batch.micro((len(batch) + 1) // 2)
        return [sum(total for half in halves for total in self._evaluate_batch([(member, half)]))]


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
