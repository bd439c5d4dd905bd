"""The training loop, as a generator of events. It reports facts and decides nothing; closing it stops the run.

Modules are in training mode as under the Hugging Face Trainer: the Q-Former's dropout (0.1) and the language model's
are live in training and off in evaluation. The frozen vision tower has none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from trainer import adapters, checkpoint, health, runtime
from trainer.bench import Workbench
from trainer.config import TrainConfig
from trainer.data import Batch, batches, eval_loader, train_loader
from trainer.events import (
    CheckpointSaved,
    Diverged,
    EpochEnded,
    EpochTiming,
    Event,
    MicroBatchReduced,
    OutOfMemory,
    RunStarted,
    StepEnded,
    StepTiming,
)
from trainer.model import forward
from trainer.schedule import learning_rate


def train(config: TrainConfig, bench: Workbench, out_dir: Path) -> Iterator[Event]:
    """Train one configuration and yield its events.

    A run whose `out_dir` holds a checkpoint of the same configuration continues after its last whole epoch, bit for
    bit as if it had never stopped; the epochs before it are in `history_of`.

    Raises:
        UserError: model, data or checkpoint cannot be used.
    """
    device = runtime.prepare(config)
    base = bench.base(config)
    with adapters.attached(base.model, config) as (peft_model, modules):
        # The run is held by this frame alone: closing the generator frees it, DataLoader workers included.
        yield from _Run(config, bench, out_dir, device, peft_model, modules).events()


def history_of(config: TrainConfig, out_dir: Path) -> list[EpochEnded]:
    """The whole epochs that a run's checkpoint remembers, so that nothing an epoch measured is lost."""
    return checkpoint.load(out_dir, config).state.history


@dataclass(frozen=True)
class _Pass:
    """Forward and backward over one step's samples; the gradients are in the parameters, not clipped yet."""

    loss: float
    """Mean over the step's label tokens."""
    grad_norm: float
    query_peak: float
    """Largest magnitude in the Q-Former's output."""
    num_tokens: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm) and math.isfinite(self.query_peak)


class _Run:
    """One run in progress."""

    def __init__(
        self,
        config: TrainConfig,
        bench: Workbench,
        out_dir: Path,
        device: torch.device,
        peft_model: Any,
        modules: tuple[str, ...],
    ) -> None:
        self.config = config
        self.out_dir = out_dir
        self.device = device
        self.bench = bench
        self.peft_model = peft_model
        self.model = peft_model.get_base_model()
        self.modules = modules
        self.parameters = adapters.parameters(peft_model)
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()),
            lr=config.learning_rate,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            # One call for a tensor instead of ten; on CPU that is 7 ms of the embedded model's step. Only in float32:
            # the fused kernel computes in float32 whatever the dtype, and float16 has to fail as it did in the
            # hand-run. On CUDA the default is as fast.
            fused=True if device.type == "cpu" and config.torch_dtype == "float32" else None,
        )
        self.train_set, self.val_set = bench.datasets(config)
        tokenizer = bench.tokenizer(config)
        pin = device.type == "cuda"
        self.loader, self.sampler = train_loader(self.train_set, tokenizer, config, pin=pin)
        self.val_loader = eval_loader(self.val_set, tokenizer, config, pin=pin)
        self.steps_per_epoch = math.ceil(len(self.loader) / config.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        self.found = checkpoint.load(out_dir, config)
        fingerprints = {"data": bench.examined(config).fingerprint, "model": bench.base(config).fingerprint}
        checkpoint.check_fingerprints(self.found, fingerprints)
        self.state = self.found.state
        self.state.fingerprints = fingerprints
        if self.found.folder is not None:
            checkpoint.restore(self.found.folder, peft_model, self.optimizer)
        self.eval_batch_size = config.eval_batch_size
        self.ended = False

    def events(self) -> Iterator[Event]:
        """All events of the run, from RunStarted to its end."""
        checkpoint.claim(self.out_dir)
        yield self._started()
        for epoch in range(self.state.epoch + 1, self.config.num_epochs + 1):
            yield from self._epoch(epoch)
            if self.ended:
                return

    def _started(self) -> RunStarted:
        examined = self.bench.examined(self.config)
        return RunStarted(
            num_train_samples=len(self.train_set),
            num_val_samples=len(self.val_set),
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            warmup_steps=self.config.warmup_steps,
            trainable_parameters=sum(p.numel() for p in self.parameters.values()),
            adapted_modules=self.modules,
            skipped_rows=examined.bad,
            data_fingerprint=self.state.fingerprints["data"],
            model_fingerprint=self.state.fingerprints["model"],
            device=str(self.device),
            num_threads=torch.get_num_threads(),
            resumed_from_epoch=self.state.epoch,
            damaged_checkpoints=self.found.problems,
        )

    def _epoch(self, epoch: int) -> Iterator[Event]:
        began = time.perf_counter()
        self.peft_model.train()
        self.sampler.epoch = epoch
        steps: list[StepEnded] = []
        passing = batches(self.loader)
        while True:
            waiting = time.perf_counter()
            group = list(islice(passing, self.config.gradient_accumulation_steps))
            wait_s = time.perf_counter() - waiting
            if not group:
                break
            for event in self._step(group, epoch, wait_s):
                if isinstance(event, StepEnded):
                    steps.append(event)
                yield event
            if self.ended:
                return
        train_s = time.perf_counter() - began
        val_loss, eval_s = self._evaluate()
        self.state.epoch = epoch
        ended, saved = self._end_epoch(epoch, steps, val_loss, began, train_s, eval_s)
        yield ended
        yield saved

    def _end_epoch(
        self, epoch: int, steps: Sequence[StepEnded], val_loss: float, began: float, train_s: float, eval_s: float
    ) -> tuple[EpochEnded, CheckpointSaved]:
        """Put the epoch together and make it durable; the checkpoint's history holds the epoch itself."""
        good = [s for s in steps if s.nonfinite is None]
        tokens = sum(s.num_tokens for s in good)
        norms = [s.grad_norm for s in good]
        nan = float("nan")

        def facts(checkpoint_s: float) -> EpochEnded:
            return EpochEnded(
                epoch=epoch,
                step=self.state.step,
                train_loss=sum(s.loss * s.num_tokens for s in good) / tokens if tokens else nan,
                val_loss=val_loss,
                learning_rate=steps[-1].learning_rate,
                grad_norm_mean=sum(norms) / len(norms) if norms else nan,
                grad_norm_max=max(norms) if norms else nan,
                nonfinite_steps=len(steps) - len(good),
                timing=EpochTiming(
                    epoch_s=time.perf_counter() - began,
                    train_s=train_s,
                    data_wait_s=sum(s.timing.data_wait_s for s in steps),
                    eval_s=eval_s,
                    checkpoint_s=checkpoint_s,
                    samples_per_s=sum(s.num_samples for s in steps) / train_s,
                    peak_memory_gib=runtime.peak_memory_gib(self.device),
                ),
            )

        self.state.history.append(facts(0.0))
        saving = time.perf_counter()
        folder = checkpoint.save(self.out_dir, self.state, self.config, self.peft_model, self.optimizer)
        ended = facts(time.perf_counter() - saving)
        self.state.history[-1] = ended
        is_best = self.state.best_epoch() == epoch
        return ended, CheckpointSaved(epoch=epoch, step=self.state.step, path=str(folder), is_best=is_best)

    def _step(self, group: Sequence[Batch], epoch: int, wait_s: float) -> Iterator[Event]:
        """One optimizer step, begun anew with smaller micro-batches while memory runs out."""
        began = time.perf_counter()
        step = self.state.step + 1
        while True:
            detail = ""
            try:
                done = self._gradients(group, step)
            except (RuntimeError, MemoryError) as error:
                if not runtime.is_out_of_memory(error):
                    raise
                detail = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if not detail:
                break
            # Outside the except block: there the traceback would still hold the tensors of the failed pass.
            self.optimizer.zero_grad(set_to_none=True)
            runtime.release_memory(self.device)
            size = min(self._micro_batch_size(), max(len(batch) for batch in group)) // 2
            if size < 1:
                self.ended = True
                yield OutOfMemory(step=step, detail=detail)
                return
            self.state.micro_batch_size = size
            yield MicroBatchReduced(step=step, micro_batch_size=size)
        yield from self._update(group, epoch, step, done, wait_s, began)

    def _micro_batch_size(self) -> int:
        return self.state.micro_batch_size or self.config.micro_batch_size or self.config.batch_size

    def _gradients(self, group: Sequence[Batch], step: int) -> _Pass:
        """Gradients of one step, micro-batch by micro-batch."""
        runtime.seed_step(self.config.seed, step)
        tokens = sum(batch.num_tokens() for batch in group)
        loss = torch.zeros((), device=self.device)
        peak = torch.zeros((), device=self.device)
        for batch in group:
            for micro in batch.micro(self._micro_batch_size()):
                out = forward(self.model, micro.to(self.device))
                # The mean over all tokens of the step, however it is cut into micro-batches.
                share = out.loss_sum / tokens
                share.backward()
                loss += share.detach()
                # NaN goes through abs, amax and maximum.
                peak = torch.maximum(peak, out.query_output.detach().abs().amax().float())
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters.values() if p.grad is not None])
        # The step's only synchronisation.
        mean_loss, grad_norm, query_peak = torch.stack([loss, norm.float(), peak]).tolist()
        return _Pass(mean_loss, grad_norm, query_peak, tokens)

    def _update(
        self,
        group: Sequence[Batch],
        epoch: int,
        step: int,
        done: _Pass,
        wait_s: float,
        began: float,
    ) -> Iterator[Event]:
        """Clip and apply the gradients if all was finite, else count the step; too many in a row end the run."""
        rate = learning_rate(self.config, step, self.total_steps)
        nonfinite = None
        if done.finite:
            norm = torch.tensor(done.grad_norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.config.max_grad_norm, norm)
            for param_group in self.optimizer.param_groups:
                param_group["lr"] = rate
            self.optimizer.step()
            self.state.nonfinite_in_a_row, self.state.first_bad = 0, None
        else:
            nonfinite = health.explain(
                self.parameters, self.optimizer, self.config, query_peak=done.query_peak, loss=done.loss
            )
            self.state.nonfinite_in_a_row += 1
            self.state.first_bad = self.state.first_bad or nonfinite
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step = step
        yield StepEnded(
            step=step,
            epoch=epoch,
            loss=done.loss,
            grad_norm=done.grad_norm,
            learning_rate=rate,
            num_samples=sum(len(batch) for batch in group),
            num_tokens=done.num_tokens,
            nonfinite=nonfinite,
            timing=StepTiming(step_s=time.perf_counter() - began + wait_s, data_wait_s=wait_s),
        )
        if self.state.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            self.ended = True
            assert self.state.first_bad is not None
            first_step = step - self.state.nonfinite_in_a_row + 1
            yield Diverged(step=step, epoch=epoch, first_bad_step=first_step, cause=self.state.first_bad)

    def _evaluate(self) -> tuple[float, float]:
        """(mean loss over all label tokens of the validation split, seconds)."""
        began = time.perf_counter()
        self.peft_model.eval()
        total, tokens = 0.0, 0
        with torch.no_grad():
            for batch in batches(self.val_loader):
                total += self._evaluate_batch(batch)
                tokens += batch.num_tokens()
        return total / tokens, time.perf_counter() - began

    def _evaluate_batch(self, batch: Batch) -> float:
        """Loss sum of a batch, in halves while memory runs out."""
        while True:
            try:
                parts = [
                    forward(self.model, micro.to(self.device)).loss_sum for micro in batch.micro(self.eval_batch_size)
                ]
                return float(torch.stack(parts).double().sum())
            except (RuntimeError, MemoryError) as error:
                if not runtime.is_out_of_memory(error) or self.eval_batch_size == 1:
                    raise
            runtime.release_memory(self.device)
            self.eval_batch_size //= 2
