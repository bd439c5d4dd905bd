"""The peer: one trial as one would write it without this project, with HF Trainer, PEFT and MLflow's callback.

    python -m tests.benchmarks.peer --config config.json --rows rows.json --trial 3 --out DIR
        --tracking-uri sqlite:///mlflow.db --experiment peer [--storage sqlite:///optuna.db --study peer]

What it shares with ours is what decides the numbers: rows and split, token ids, order of the samples, initial values
of the adapter. The model, its forward, the loop, the checkpoints and the tracking are the libraries' own. So that
losses can be compared, the base's dropout is 0, as in ours, and the validation loss is the mean over all label tokens
rather than over batches. With `--storage` the trial reports to Optuna and is stopped by the search's own pruner.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset, Sampler
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from tests.benchmarks.configs import RESULT
from tests.support.library_run import library_inputs
from trainer import runtime
from trainer.config import TrainConfig
from trainer.data.batches import CaptionDataset, Collator, EpochSampler, Pixels, Sample, Tokenizer
from trainer.data.dataset import Row
from trainer.model.batch import IGNORE, Batch
from trainer.model.locate import locate

DROPOUTS = ("dropout", "dropout_rate", "attention_dropout", "hidden_dropout_prob", "attention_probs_dropout_prob")


@dataclass
class Clock:
    """Where a trial's time went, in seconds since the process began."""

    imported: float = 0.0
    loaded: float = 0.0
    """Model, adapter and data are there."""
    first_step: float = 0.0
    train_s: float = 0.0
    eval_s: float = 0.0
    save_s: float = 0.0
    trained: float = 0.0
    """`Trainer.train` has returned."""
    began: float = field(default_factory=lambda: psutil.Process().create_time())

    def now(self) -> float:
        """Seconds since the process began."""
        return time.time() - self.began


class LibraryCollator:
    """Pads samples to the library's inputs."""

    def __init__(self, tokenizer: Tokenizer, config: InstructBlipConfig) -> None:
        self.collate = Collator(tokenizer)
        self.image_token = int(config.image_token_index)
        self.num_query_tokens = int(config.num_query_tokens)

    def __call__(self, items: Sequence[Sample]) -> dict[str, torch.Tensor]:
        batch = self.collate(items)
        assert isinstance(batch, Batch), batch
        return library_inputs(batch, image_token=self.image_token, num_query_tokens=self.num_query_tokens)


class TrainerSampler(EpochSampler):
    """Our order of samples under the name by which Accelerate sets the epoch, which counts from 0."""

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each pass."""
        self.epoch = epoch + 1


class CaptionTrainer(Trainer):  # type: ignore[misc]  # the library has no types
    """Trainer with our order of samples and the validation loss per label token."""

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int]:
        return TrainerSampler(len(self.train_dataset), self.args.seed)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
        """Trainer's own, with the batch's loss weighted by its label tokens."""
        loss, logits, labels = super().prediction_step(model, inputs, *args, **options)
        tokens = (inputs["labels"] != IGNORE).sum().to(loss.device)
        self._loss_sum += loss.double() * tokens
        self._tokens += tokens
        return loss, logits, labels

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        """Trainer's own, whose `eval_loss` is a mean over batches, replaced by the mean over all label tokens."""
        device = self.args.device
        self._loss_sum = torch.zeros((), dtype=torch.double, device=device)
        self._tokens = torch.zeros((), dtype=torch.long, device=device)
        output = super().evaluation_loop(*args, **options)
        output.metrics["eval_loss"] = float(self._loss_sum / self._tokens)
        return output


class Timing(TrainerCallback):  # type: ignore[misc]
    """Fills the clock; `losses` are the validation losses by epoch."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.losses = clock, list[float]()
        self._mark = 0.0

    def _since(self) -> float:
        now = time.perf_counter()
        spent, self._mark = now - self._mark, now
        return spent

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._since()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.first_step = self.clock.first_step or self.clock.now()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self.clock.train_s += self._since()

    def on_evaluate(self, *_: Any, metrics: dict[str, float], **__: Any) -> None:
        self.losses.append(metrics["eval_loss"])
        self.clock.eval_s += self._since()

    def on_save(self, *_: Any, **__: Any) -> None:
        self.clock.save_s += self._since()


class OptunaPruning(TrainerCallback):  # type: ignore[misc]
    """Reports each validation loss to Optuna and ends the run when the search's pruner says so."""

    def __init__(self, storage_url: str, study_name: str, number: int, pruner: str, config: TrainConfig) -> None:
        import optuna

        from search import pruning
        from search.storage.database import open_storage
        from search.storage.optuna_private import trial_id
        from search.study import Study

        self._verdict = pruning.verdict
        self._id = trial_id
        made = pruning.make_pruner(
            pruner, patience=Study.patience, min_delta=Study.min_delta, num_epochs=config.num_epochs
        )
        self.study = optuna.load_study(study_name=study_name, storage=open_storage(storage_url), pruner=made)
        self.trial = optuna.Trial(self.study, trial_id(self.study.get_trials(deepcopy=False)[number]))
        self.config = config
        self.ended_as: str | None = None
        self._train_losses: list[float] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, *, metrics: dict[str, float], **_: Any) -> None:
        """Trainer saves this epoch all the same before it stops."""
        from search import records

        epoch = round(state.epoch)
        steps = [log["loss"] for log in state.log_history if "loss" in log and log["epoch"] > epoch - 1]
        self._train_losses.append(statistics.fmean(steps))
        self.trial.set_user_attr(records.TRAIN_LOSSES, self._train_losses)
        self.trial.report(metrics["eval_loss"], epoch)
        if epoch == self.config.num_epochs:
            return
        verdict = self._verdict(self.study, self.trial.storage.get_trial(self._id(self.trial)))
        if verdict is not None:
            self.ended_as = verdict.state
            control.should_training_stop = True


def read_rows(path: Path) -> tuple[list[Row], list[Row]]:
    """(training, validation) rows, split beforehand: see `makespan.write_rows`."""
    parts = json.loads(path.read_text(encoding="utf-8"))

    def row(values: dict[str, Any]) -> Row:
        return Row(**{**values, "image": Path(values["image"]), "more_captions": tuple(values["more_captions"])})

    train, val = ([row(values) for values in parts[name]] for name in ("train", "val"))
    return train, val


def load_model(config: TrainConfig, nudge: float = 0.0) -> tuple[Any, Any]:
    """(model with a fresh adapter, processor). `nudge` is the relative change of the adapter's initial values."""
    path = locate(config.model)
    processor = InstructBlipProcessor.from_pretrained(path)
    model_config = InstructBlipConfig.from_pretrained(path)
    for part in (model_config.vision_config, model_config.qformer_config, model_config.text_config):
        for name in DROPOUTS:
            if hasattr(part, name):
                setattr(part, name, 0.0)
    dtype = runtime.DTYPES[config.torch_dtype]
    model = InstructBlipForConditionalGeneration.from_pretrained(path, config=model_config, dtype=dtype)
    torch.manual_seed(config.seed)  # lora_A's initial values, as ours
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.target_modules),
        bias="none",
    )
    peft_model = get_peft_model(model, lora)
    if nudge:
        with torch.no_grad():
            for parameter in peft_model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1 + nudge)
    return peft_model, processor


def arguments(config: TrainConfig, out: Path, *, trial: int, logging_steps: int, track: bool) -> TrainingArguments:
    """Trainer's arguments that mean what the configuration means; everything else is Trainer's default."""
    on_cpu = runtime.resolve_device(config.device).type == "cpu"
    return TrainingArguments(
        output_dir=str(out),
        run_name=f"trial {trial:03d}",
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        adam_epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
        seed=config.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        logging_steps=logging_steps,
        report_to=["mlflow"] if track else [],
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        dataloader_num_workers=config.num_workers,
        dataloader_persistent_workers=config.num_workers > 0,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        disable_tqdm=True,
    )


def train(
    config: TrainConfig,
    rows: tuple[Sequence[Row], Sequence[Row]],
    out: Path,
    *,
    clock: Clock,
    trial: int = 0,
    logging_steps: int = 1,
    track: bool = True,
    pruning: OptunaPruning | None = None,
    nudge: float = 0.0,
) -> dict[str, Any]:
    """Train one trial; returns what goes into `RESULT`."""
    torch.set_float32_matmul_precision(config.matmul_precision)
    model, processor = load_model(config, nudge)
    tokenizer = Tokenizer(processor, model.config, config.max_target_length)
    pixels = Pixels(processor.image_processor)  # each image decoded once a process
    timing = Timing(clock)
    trainer = CaptionTrainer(
        model=model,
        args=arguments(config, out, trial=trial, logging_steps=logging_steps, track=track),
        data_collator=LibraryCollator(tokenizer, model.config),
        train_dataset=CaptionDataset(rows[0], tokenizer, pixels),
        eval_dataset=CaptionDataset(rows[1], tokenizer, pixels),
        callbacks=[timing, pruning] if pruning else [timing],
    )
    clock.loaded = clock.now()
    trainer.train()
    clock.trained = clock.now()
    state = (pruning.ended_as if pruning else None) or "COMPLETE"
    return {"state": state, "val_losses": timing.losses, "steps": trainer.state.global_step, "clock": vars(clock)}


def main() -> None:
    """Train the trial of the command line."""
    clock = Clock()
    clock.imported = clock.now()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="a TrainConfig as JSON")
    parser.add_argument("--rows", type=Path, required=True, help="training and validation rows as JSON")
    parser.add_argument("--trial", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tracking-uri", help="MLflow's; none without it")
    parser.add_argument("--experiment", default="peer")
    parser.add_argument("--storage", help="Optuna's URL, to report to and to be pruned")
    parser.add_argument("--study", default="peer")
    parser.add_argument("--pruner", default="rising")
    # Ours keeps every step's loss and gradient norm, so the peer does: what is recorded is the same.
    parser.add_argument("--logging-steps", type=int, default=1)
    # How far a trial's losses move if its start moves by as much as rounding: what the comparison can show at all.
    parser.add_argument("--nudge", type=float, default=0.0, help="relative change of the adapter's initial values")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    if options.tracking_uri:  # how MLflow's callback is told
        os.environ |= {"MLFLOW_TRACKING_URI": options.tracking_uri, "MLFLOW_EXPERIMENT_NAME": options.experiment}
    config = TrainConfig.parse(json.loads(options.config.read_text(encoding="utf-8")))
    pruning = None
    if options.storage:
        pruning = OptunaPruning(options.storage, options.study, options.trial, options.pruner, config)
    result = train(
        config,
        read_rows(options.rows),
        options.out,
        clock=clock,
        trial=options.trial,
        logging_steps=options.logging_steps,
        track=options.tracking_uri is not None,
        pruning=pruning,
        nudge=options.nudge,
    )
    (options.out / RESULT).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
