"""The schedules equal those of Transformers at every step, warmup and end included."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from trainer.config import TrainConfig
from trainer.schedule import learning_rate


@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine"])
@pytest.mark.parametrize(("warmup", "total"), [(0, 7), (3, 20), (10, 10), (25, 12)])
def test_equals_transformers(kind: str, warmup: int, total: int) -> None:
    config = TrainConfig.parse({"lr_scheduler_type": kind, "warmup_steps": warmup, "learning_rate": 3e-4})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    theirs = []
    for _ in range(total):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert [learning_rate(config, step, total) for step in range(1, total + 1)] == theirs
