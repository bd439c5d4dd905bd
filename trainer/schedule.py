"""Learning-rate schedules as pure functions of the step: a resumed run needs to know nothing else."""

from __future__ import annotations

import math

from trainer.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 1) of `total_steps`.

    Equal to that of `transformers.get_scheduler` for that step, warmup from 0 included: the first step of a warmup
    has rate 0 (tests/trainer/test_schedule.py compares them).
    """
    return config.learning_rate * _factor(config.lr_scheduler_type, step - 1, config.warmup_steps, total_steps)


def _factor(kind: str, done: int, warmup: int, total: int) -> float:
    if done < warmup:
        return done / max(1, warmup)
    if kind == "constant_with_warmup":
        return 1.0
    if kind == "linear":
        return max(0.0, (total - done) / max(1, total - warmup))
    progress = (done - warmup) / max(1, total - warmup)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
