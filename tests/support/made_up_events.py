"""Events of a run that never trained."""

from __future__ import annotations

from trainer.events import EpochEnded, EpochTiming, RunStarted, StepEnded, StepTiming


def started(total_steps: int = 8, modules: int = 2) -> RunStarted:
    """A run of so many steps; `modules` names, and as many rows that were left out."""
    return RunStarted(
        num_train_samples=8,
        num_val_samples=2,
        steps_per_epoch=4,
        total_steps=total_steps,
        warmup_steps=0,
        trainable_parameters=10,
        adapted_modules=tuple(f"qformer.layer.{i}.query" for i in range(modules)),
        skipped_rows=tuple(f"row {i}: no caption" for i in range(modules)),
        data_fingerprint="d",
        model_fingerprint="m",
        device="cpu",
        num_threads=1,
        resumed_from_epoch=0,
    )


def step(number: int, epoch: int = 1) -> StepEnded:
    """A step whose loss is 0.5."""
    timing = StepTiming(step_s=0.1, data_wait_s=0.0)
    figures = {"loss": 0.5, "grad_norm": 0.1, "learning_rate": 1e-3}
    return StepEnded(step=number, epoch=epoch, num_samples=2, num_tokens=9, timing=timing, **figures)


def epoch(number: int, val_loss: float = 0.4) -> EpochEnded:
    """An epoch of four steps and three seconds."""
    timing = EpochTiming(
        epoch_s=3.0,
        train_s=2.0,
        data_wait_s=0.0,
        eval_s=0.5,
        checkpoint_s=0.1,
        samples_per_s=4.0,
        peak_memory_gib=0.1,
    )
    losses = {"train_loss": 0.5, "val_loss": val_loss, "grad_norm_mean": 0.1, "grad_norm_max": 0.2}
    return EpochEnded(epoch=number, step=4 * number, learning_rate=1e-3, nonfinite_steps=0, timing=timing, **losses)
