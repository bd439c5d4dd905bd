"""Sizes, batches and optimizer of the embedded model's pretraining."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of the pretraining."""

    tiles: int = 16_000
    vision_steps: int = 800
    vision_rate: float = 2e-3
    caption_steps: int = 1_400
    caption_rate: float = 1.5e-3
    batch_size: int = 32
    question_share: float = 0.3
    """Share of questions among the samples of step 4; the others are captions."""
    dropout_from: float = 0.5
    """Share of step 4 without dropout, where it learns to see in half the steps. The rest has dropout, as the
    fine-tuning will."""
    gain: float = 16.0
    """Scale of the Q-Former's states, see `build.rescale`."""


def batches(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Index tensors for `steps` batches, in a new order each time round."""
    done = 0
    while True:
        order = torch.randperm(count)
        for start in range(0, count - batch_size + 1, batch_size):
            if done == steps:
                return
            done += 1
            yield order[start : start + batch_size]


def optimizer_for(
    parameters: Sequence[nn.Parameter], rate: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warmup over a twentieth of the steps and a cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
