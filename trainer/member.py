"""One run in a pack: its data, adapter and counters, and the events of its steps and epochs."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from trainer import checkpoint, runtime
from trainer.config import TrainConfig
from trainer.data.batches import batches, eval_loader, train_loader
from trainer.events import CheckpointSaved, Diverged, EpochEnded, EpochTiming, Event, RunStarted, StepEnded, StepTiming
from trainer.model.batch import Batch
from trainer.model.lora import Adapter
from trainer.nonfinite import explain
from trainer.schedule import learning_rate

if TYPE_CHECKING:
    from trainer.workbench import Inputs


@dataclass
class Step:
    """An optimizer step whose loss and norms are still on the device."""

    number: int
    epoch: int
    rate: float
    num_samples: int
    num_tokens: int
    wait_s: float
    figures: torch.Tensor
    """(3,): loss, gradient norm, query peak."""
    step_s: float = 0.0


class Member:
    """A run that trains, alone or beside others.

    The seconds of a pass that several runs share are divided among them by samples, so that the times that the runs of
    a pack report add up to the machine's.
    """

    def __init__(self, config: TrainConfig, inputs: Inputs, out_dir: Path, owner: str | None = None) -> None:
        """Prepare the run, from its checkpoint if there is one; see `checkpoint.load` for its owner.

        Raises:
            UserError: the model cannot be adapted as configured, or the checkpoint cannot be used.
        """
        self.config = config
        self.out_dir = out_dir
        self.device = inputs.base.device
        self.adapter = Adapter(inputs.base.model, config)
        # Data.
        self.features = inputs.features
        self.skipped_rows = inputs.skipped_rows
        self.split = inputs.split
        self.num_train, self.num_val = len(inputs.train.rows), len(inputs.val.rows)
        self.instruction = Counter(row.prompt for row in inputs.train.rows).most_common(1)[0][0]
        """What most of its rows ask."""
        pin = self.device.type == "cuda"
        # Rows of a store and token ids need no processes to fetch them.
        loading = config if self.features is None else config.model_copy(update={"num_workers": 0})
        self.loader, self.sampler = train_loader(inputs.train, inputs.tokenizer, loading, pin=pin)
        self.val_loader = eval_loader(inputs.val, inputs.tokenizer, loading, pin=pin)
        self.val_key = (id(inputs.val.rows), config.eval_batch_size)
        """What runs must have in common to be evaluated in the same passes."""
        self.steps_per_epoch = math.ceil(len(self.loader) / config.gradient_accumulation_steps)
        self.total_steps = self.steps_per_epoch * config.num_epochs
        # Where it stands.
        self.found = checkpoint.load(out_dir, config, owner)
        checkpoint.check_fingerprints(self.found, inputs.fingerprints)
        self.state = self.found.state
        self.state.fingerprints = dict(inputs.fingerprints)
        self.state.owner = owner or self.state.owner
        if self.found.folder is not None:
            checkpoint.restore(self.found.folder, self.adapter)
        checkpoint.claim(out_dir)
        self.started = False
        self.ended = self.state.epoch >= config.num_epochs
        self.next_step = self.state.step + 1
        self._group: Iterator[Batch] | None = None
        self._held: list[Batch] | None = None
        self._steps: list[StepEnded] = []
        self._val_batches: list[Batch] | None = None
        self._epoch_s = 0.0
        self._peak_gib = 0.0

    @property
    def epoch(self) -> int:
        """The epoch in progress, from 1."""
        return self.state.epoch + 1

    @property
    def epoch_is_trained(self) -> bool:
        """Whether all steps of the epoch in progress have been made."""
        return not self.ended and self.next_step > self.epoch * self.steps_per_epoch

    def start(self) -> RunStarted:
        """Facts known before the first step."""
        self.started = True
        return RunStarted(
            num_train_samples=self.num_train,
            num_val_samples=self.num_val,
            steps_per_epoch=self.steps_per_epoch,
            total_steps=self.total_steps,
            warmup_steps=self.config.warmup_steps,
            trainable_parameters=len(self.adapter),
            adapted_modules=self.adapter.modules,
            skipped_rows=self.skipped_rows,
            data_fingerprint=self.state.fingerprints["data"],
            model_fingerprint=self.state.fingerprints["model"],
            device=str(self.device),
            num_threads=torch.get_num_threads(),
            resumed_from_epoch=self.state.epoch,
            data=self.config.data,
            split=self.split.tags(),
            data_lines=tuple(self.split.lines()),
            damaged_checkpoints=self.found.problems,
        )

    def next_group(self) -> tuple[list[Batch], float]:
        """The batches of the next optimizer step, and the seconds waited for them."""
        if self._held is not None:
            return self._held, 0.0
        waiting = time.perf_counter()
        if self._group is None:
            self.sampler.epoch = self.epoch
            self._steps, self._epoch_s = [], 0.0
            self._group = self._ahead(batches(self.loader), self.config.gradient_accumulation_steps)
        group = list(islice(self._group, self.config.gradient_accumulation_steps))
        return group, time.perf_counter() - waiting

    def hold(self) -> list[Batch]:
        """Take the batches of the next step for all that follow, so that their passes are of one shape: for timing."""
        self._held, _ = self.next_group()
        return self._held

    def val_batches(self) -> Iterator[Batch]:
        """One pass over the validation split, in order."""
        if self.features is None:
            yield from batches(self.val_loader)
            return
        if self._val_batches is None:  # token ids and row numbers are small: kept
            self._val_batches = list(batches(self.val_loader))
        for batch in self._ahead(self._val_batches, 1):
            yield batch
            batch.ahead = None  # its images are not small

    def _ahead(self, source: Iterable[Batch], number: int) -> Iterator[Batch]:
        return iter(source) if self.features is None else self.features.ahead(source, number)

    def micro_batch_size(self) -> int:
        """Most samples in a forward pass."""
        return self.state.micro_batch_size or self.config.micro_batch_size or self.config.batch_size

    def seed(self) -> None:
        """Seed dropout for the next step.

        The generator's state is a function of (seed, step): a resumed run, and a step repeated after memory ran out,
        draw the same masks as an undisturbed run, and nothing has to be saved.
        """
        self.adapter.generator.manual_seed(runtime.step_seed(self.config.seed, self.next_step))

    def rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.config, self.next_step, self.total_steps)

    def stepped(self, group: Sequence[Batch], tokens: int, figures: torch.Tensor, wait_s: float) -> Step:
        """The next step, which has been made; its figures are not fetched yet."""
        samples = sum(len(batch) for batch in group)
        step = Step(self.next_step, self.epoch, self.rate(), samples, tokens, wait_s, figures)
        self.next_step += 1
        return step

    def step_ended(self, step: Step, figures: tuple[float, float, float]) -> Iterator[Event]:
        """The events of a step whose figures have been fetched."""
        loss, grad_norm, query_peak = figures
        nonfinite = None
        if all(math.isfinite(figure) for figure in figures):
            self.state.nonfinite_in_a_row, self.state.first_bad = 0, None
        else:
            fresh = step.number == self.next_step - 1
            nonfinite = explain(self.adapter, self.config, query_peak=query_peak, loss=loss, fresh=fresh)
            self.state.nonfinite_in_a_row += 1
            self.state.first_bad = self.state.first_bad or nonfinite
        self.state.step = step.number
        ended = StepEnded(
            step=step.number,
            epoch=step.epoch,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=step.rate,
            num_samples=step.num_samples,
            num_tokens=step.num_tokens,
            nonfinite=nonfinite,
            timing=StepTiming(step_s=step.step_s + step.wait_s, data_wait_s=step.wait_s),
        )
        self._steps.append(ended)
        self._epoch_s += ended.timing.step_s
        yield ended
        if self.state.nonfinite_in_a_row >= self.config.max_nonfinite_steps:
            self.ended = True
            assert self.state.first_bad is not None
            first_step = step.number - self.state.nonfinite_in_a_row + 1
            yield Diverged(step=step.number, epoch=step.epoch, first_bad_step=first_step, cause=self.state.first_bad)

    def note_memory(self) -> None:
        """Keep the peak so far: with a run that is taken in, the device's is counted anew."""
        self._peak_gib = max(self._peak_gib, runtime.peak_memory_gib(self.device))

    def epoch_ended(self, val_loss: float, eval_s: float) -> tuple[EpochEnded, CheckpointSaved]:
        """Sum up the epoch and save the checkpoint, whose history includes the epoch itself."""
        steps, self._group = self._steps, None
        good = [s for s in steps if s.nonfinite is None]
        tokens = sum(s.num_tokens for s in good)
        norms = [s.grad_norm for s in good]
        nan = float("nan")
        train_s = self._epoch_s
        epoch = self.epoch
        self.note_memory()

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
                    epoch_s=train_s + eval_s + checkpoint_s,
                    train_s=train_s,
                    data_wait_s=sum(s.timing.data_wait_s for s in steps),
                    eval_s=eval_s,
                    checkpoint_s=checkpoint_s,
                    samples_per_s=sum(s.num_samples for s in steps) / train_s,
                    peak_memory_gib=self._peak_gib,
                ),
            )

        # How long saving takes is known only afterwards: on disk it is 0 until the next checkpoint.
        self.state.epoch = epoch
        self.state.history.append(facts(0.0))
        saving = time.perf_counter()
        folder = checkpoint.save(self.out_dir, self.state, self.config, self.adapter, self.instruction)
        ended = facts(time.perf_counter() - saving)
        self.state.history[-1] = ended
        self.ended = epoch >= self.config.num_epochs
        is_best = self.state.best_epoch() == epoch
        return ended, CheckpointSaved(epoch=epoch, step=self.state.step, path=str(folder), is_best=is_best)
