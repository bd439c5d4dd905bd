"""Measures whether the embedded model behaves like the real one.

`python -m trainer.mini.behaviour > docs/mini-behaviour.md` writes the report. Every number is measured with the
project's own trainer on the studies' data; each claim is checked, and the exit code is 1 if one does not hold.
Takes about five minutes on one core.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data.batches import eval_loader
from trainer.events import Diverged, EpochEnded, Event, RunStarted, StepEnded
from trainer.loop import train
from trainer.mini import CHECKPOINT
from trainer.model.base import forward
from trainer.model.batch import Batch
from trainer.workbench import Workbench

RATES = (5e-6, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 7e-4, 1e-3)
"""Learning rates of the sweep: the hand-run log's range."""
SWEEP: dict[str, Any] = {
    "num_epochs": 8, "max_samples": 160, "batch_size": 4, "warmup_steps": 10, "lora_r": 8, "lora_alpha": 16,
}  # fmt: skip
OVERFITTING: dict[str, Any] = {
    "num_epochs": 20, "max_samples": 40, "batch_size": 8, "learning_rate": 5e-4, "warmup_steps": 0,
    "lora_r": 32, "lora_alpha": 128, "lora_dropout": 0.0,
}  # fmt: skip
DIVERGING: dict[str, Any] = {
    "num_epochs": 6, "max_samples": 160, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 0,
    "lora_r": 32, "lora_alpha": 128,
}  # fmt: skip
EXPERIMENT_1: dict[str, Any] = {
    "num_epochs": 10, "batch_size": 2, "learning_rate": 5e-6, "max_samples": 20, "warmup_steps": 0,
    "lora_r": 4, "lora_alpha": 8, "torch_dtype": "float16",
}  # fmt: skip
"""The hand-run log's experiment 1."""


@dataclass
class Report:
    """Lines of the report, and whether all claims held so far."""

    bench: Workbench
    ok: bool = True

    def say(self, text: str = "") -> None:
        """Print a line immediately: the program takes minutes."""
        print(text, flush=True)

    def claim(self, holds: bool, text: str) -> None:
        """Print a claim with its verdict."""
        self.ok = self.ok and holds
        self.say(f"- [{'x' if holds else ' '}] {text}")

    def run(self, settings: dict[str, Any]) -> list[Event]:
        """All events of a run with these settings; its checkpoints are deleted."""
        with tempfile.TemporaryDirectory() as folder:
            return list(train(TrainConfig.parse(settings), self.bench, Path(folder)))


def epochs_of(events: Sequence[Event]) -> list[EpochEnded]:
    """The run's epochs."""
    return [event for event in events if isinstance(event, EpochEnded)]


def best(epochs: Sequence[EpochEnded]) -> EpochEnded:
    """The epoch of the lowest validation loss."""
    return min(epochs, key=lambda e: e.val_loss)


def curve(values: Sequence[float]) -> str:
    """The losses as text, with three decimals."""
    return " ".join(f"{value:.3f}" for value in values)


def validation_loss(
    bench: Workbench, change: Callable[[torch.Tensor], torch.Tensor], max_samples: int | None = None
) -> float:
    """The base's mean validation loss by token, without an adapter, with its images changed.

    Args:
        bench: has the base and the data.
        change: function of all validation images, (samples, 3, height, width).
        max_samples: number of rows used, all by default.
    """
    config = TrainConfig(max_samples=max_samples)
    base = bench.base(config)
    base.model.eval()
    batches: list[Batch] = list(eval_loader(bench.datasets(config)[1], bench.tokenizer(config), config, pin=False))
    before = [batch.pixel_values for batch in batches if batch.pixel_values is not None]
    pixels = change(torch.cat(before)).split([len(batch) for batch in batches])
    total, tokens = 0.0, 0
    with torch.no_grad():
        for batch, images in zip(batches, pixels, strict=True):
            total += float(forward(base.model, replace(batch, pixel_values=images)).loss_sum)
            tokens += batch.num_tokens()
    return total / tokens


def size(report: Report) -> None:
    """Parameters, bytes, and the time of an epoch."""
    megabytes = sum(path.stat().st_size for path in CHECKPOINT.rglob("*") if path.is_file()) / 1e6
    parameters = sum(p.numel() for p in report.bench.base(TrainConfig()).model.parameters())
    report.say("## Size and speed\n")
    report.claim(2e6 <= parameters <= 3e6, f"{parameters:,} parameters, between 2 and 3 million")
    report.claim(megabytes <= 6, f"{megabytes:.1f} MB on disk, at most 6")
    seconds = []
    for batch_size in (4, 8, 16):
        began = time.process_time()
        settings = {"max_samples": 200, "num_epochs": 3, "batch_size": batch_size}
        epochs = epochs_of(report.run(settings))
        seconds.append((time.process_time() - began) / len(epochs))
        report.say(
            f"- an epoch of 200 samples (160 trained on, 40 evaluated), batch size {batch_size}: "
            f"{seconds[-1]:.1f} s of CPU time on one core, wall {min(e.timing.epoch_s for e in epochs):.1f} s"
        )
    report.claim(min(seconds) <= 3, f"an epoch of 200 samples takes at most 3 s on one core: {min(seconds):.1f} s")


def sight(report: Report) -> None:
    """The image matters: without it, or with another's, the base is much worse."""
    seen = validation_loss(report.bench, lambda pixels: pixels)
    blank = validation_loss(report.bench, torch.zeros_like)
    swapped = validation_loss(report.bench, lambda pixels: pixels.roll(7, 0))
    report.say("\n## The image matters\n")
    report.say(f"Validation loss of the base on the studies' data, without an adapter: {seen:.3f}.\n")
    report.claim(blank >= 1.15 * seen, f"blank images: {blank:.3f}, {100 * (blank / seen - 1):.0f} % higher")
    report.claim(
        swapped >= 1.15 * seen, f"another tile's image: {swapped:.3f}, {100 * (swapped / seen - 1):.0f} % higher"
    )


def sweep(report: Report) -> None:
    """The best learning rate lies inside the log's range."""
    start = validation_loss(report.bench, lambda pixels: pixels, SWEEP["max_samples"])
    report.say("\n## Learning rate\n")
    report.say(f"`{SWEEP}`, dropout 0.1; without an adapter {start:.4f}.\n")
    report.say("| rate | best validation loss | epoch | training loss | validation loss by epoch |")
    report.say("|---|---|---|---|---|")
    found: dict[float, float] = {}
    for rate in RATES:
        epochs = epochs_of(report.run({**SWEEP, "learning_rate": rate}))
        found[rate] = best(epochs).val_loss
        report.say(
            f"| {rate:g} | {found[rate]:.4f} | {best(epochs).epoch} | {epochs[0].train_loss:.3f} to "
            f"{epochs[-1].train_loss:.3f} | {curve([e.val_loss for e in epochs])} |"
        )
    optimum = min(found, key=lambda rate: found[rate])
    gain, first_gain = start - found[optimum], start - found[RATES[0]]
    report.say()
    report.claim(
        first_gain < 0.25 * gain,
        f"{RATES[0]:g} hardly moves: {start:.3f} to {found[RATES[0]]:.3f}, the best rate to {found[optimum]:.3f}",
    )
    report.claim(optimum not in (RATES[0], RATES[-1]), f"the best rate, {optimum:g}, is not at the edge of the range")


def overfitting(report: Report) -> None:
    """Too much capacity for the data: training loss falls, validation loss rises."""
    epochs = epochs_of(report.run(OVERFITTING))
    low, last = best(epochs), epochs[-1]
    report.say(f"\n## Overfitting\n\n`{OVERFITTING}`\n")
    report.say(f"- training {curve([e.train_loss for e in epochs])}")
    report.say(f"- validation {curve([e.val_loss for e in epochs])}")
    report.claim(
        last.train_loss < low.train_loss and last.val_loss > 1.03 * low.val_loss and low.epoch < len(epochs) - 3,
        f"after epoch {low.epoch} training loss still falls ({low.train_loss:.3f} to {last.train_loss:.3f}) while "
        f"validation loss rises ({low.val_loss:.3f} to {last.val_loss:.3f})",
    )


def divergence(report: Report) -> None:
    """Too aggressive: both losses jump up."""
    start = validation_loss(report.bench, lambda pixels: pixels, DIVERGING["max_samples"])
    epochs = epochs_of(report.run(DIVERGING))
    worst = max(epochs, key=lambda e: e.val_loss)
    report.say(f"\n## Divergence\n\n`{DIVERGING}`\n")
    report.say(f"- training {curve([e.train_loss for e in epochs])}")
    report.say(f"- validation {curve([e.val_loss for e in epochs])}")
    report.claim(
        worst.val_loss > 1.2 * start, f"validation loss {worst.val_loss:.3f} at epoch {worst.epoch}, from {start:.3f}"
    )


def half_precision(report: Report) -> None:
    """float16 as the log's experiment 1: one good batch, then NaN."""
    events = report.run(EXPERIMENT_1)
    steps = [event for event in events if isinstance(event, StepEnded)]
    ends = [event for event in events if isinstance(event, Diverged)]
    report.say(f"\n## float16\n\n`{EXPERIMENT_1}`\n")
    report.say(f"- losses by step: {' '.join(f'{step.loss:.4f}' for step in steps)}")
    good = [step.nonfinite is None for step in steps]
    report.claim(good[:2] == [True, False], "the first step is finite, the second is not")
    report.claim(bool(ends), "the run ends as diverged")
    for end in ends:
        report.say(f"- the first that was not finite: {end.cause.tensor}; {end.cause.detail}")


def main() -> int:
    """Measure everything and print the report.

    Returns:
        the exit code: 1 if a claim does not hold.
    """
    argparse.ArgumentParser(
        prog="python -m trainer.mini.behaviour",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    torch.set_num_threads(1)
    report = Report(Workbench())
    started = next(iter(report.run({"num_epochs": 1})))
    assert isinstance(started, RunStarted)
    report.say("# How the embedded model behaves\n")
    report.say("Written by `python -m trainer.mini.behaviour`; every claim is checked by it.\n")
    report.say(
        f"{started.num_train_samples} training and {started.num_val_samples} validation samples, "
        f"model {started.model_fingerprint}, data {started.data_fingerprint}, LoRA on "
        f"{len(started.adapted_modules)} modules of the Q-Former.\n"
    )
    for part in (size, sight, sweep, overfitting, divergence, half_precision):
        part(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
