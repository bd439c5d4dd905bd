"""The training loop: runs that train together in one forward and backward pass on one frozen base.

`Pack` holds several runs and makes one optimizer step of each in a round; `train` is a pack of one, as a generator of
events. They report facts and decide nothing. Each run has its own adapter, data order, dropout, schedule, clipping,
optimizer and epochs, and behaves as if alone: to the last bit but for the rounding of sums whose order depends on how
many rows a matrix has (tests/trainer/test_pack.py holds it to 1e-12 in float64, against PEFT and PyTorch's AdamW).

The frozen base runs in evaluation mode: its own dropout is off, in training too. What regularises a run is
`lora_dropout`, which the search samples. So attention takes the fused kernels, and a run's random numbers are its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from trainer import checkpoint, kernels, runtime
from trainer.common.errors import ConfigError, UserError
from trainer.config import TrainConfig
from trainer.events import EpochEnded, Event, MicroBatchReduced, OutOfMemory
from trainer.member import Member, Step
from trainer.model import updates
from trainer.model.base import forward
from trainer.passes import Group, Passes
from trainer.recorded import ForwardPass
from trainer.workbench import Workbench

CUDA_WINDOW = 8
"""Rounds on a GPU after which losses and norms are fetched: each time, the host waits for the device."""

SHARED = ("model", "torch_dtype", "base_dtype", "device", "device_map", "matmul_precision", "deterministic")
"""Fields that runs of a pack have in common, besides the form in which they see images."""

RunError = UserError | OSError
"""An error of one run's own (an image that went bad, a disk that is full): it ends that run and leaves the others
alone."""


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


def history_of(config: TrainConfig, out_dir: Path, owner: str | None = None) -> list[EpochEnded]:
    """The whole epochs that a run's newest checkpoint remembers; see `checkpoint.load` for its owner."""
    return checkpoint.load(out_dir, config, owner).state.history


class Pack:
    """Runs on one base. A context manager: on leaving, the base is as it was and the runs are dropped."""

    def __init__(self, bench: Workbench, *, forward: ForwardPass = forward, owner: str | None = None) -> None:
        self.bench = bench
        self.owner = owner
        """Whose the runs are: they take up no checkpoint of another's. None for nobody's."""
        self.passes = Passes(forward)
        self.members: list[Member] = []
        self.window: int | None = None
        """Rounds after which figures are fetched; None for what suits the device."""
        self._pending: list[list[tuple[Member, Step]]] = []

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        self.members.clear()
        self._pending.clear()
        self.passes.close()

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
        device = runtime.prepare(config)
        for other in self.members:
            other.note_memory()
        runtime.restart_peak_memory(device)
        inputs = self.bench.inputs(config)
        member = Member(config, inputs, out_dir, self.owner)
        self.passes.cover(member, inputs.base.model)
        self._window = self.window or (CUDA_WINDOW if member.device.type == "cuda" and member.adapter.fused else 1)
        self.members.append(member)
        return member

    def remove(self, member: Member) -> None:
        """Drop a run, between two rounds or in answer to one of its events."""
        if member in self.members:
            self.members.remove(member)
            self.passes.forget_runs()

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
                    done = self.passes.gradients(work)
            except (RuntimeError, MemoryError) as error:
                if kernels.gave_up(error):
                    continue
                if not runtime.is_out_of_memory(error):
                    raise
                detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not detail:
                break
            # Outside the except block: there the traceback would still hold the tensors of the failed pass.
            if self.passes.make_room():
                continue
            (member,) = self.passes.passing
            (group,) = [group for other, group, _ in work if other is member]
            size = min(member.micro_batch_size(), max(len(batch) for batch in group)) // 2
            if size < 1:
                if self.passes.compute_again():
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
            sums = self.passes.losses(list(zip(members, batch, strict=True)))
            totals = [total + each for total, each in zip(totals, sums, strict=True)]
            tokens += batch[0].num_tokens()
        return [total / tokens for total in totals]
