"""Adapters in PEFT's format that change what a model says, made without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.model.base import Base
from trainer.model.lora import Adapter


def write(base: Base, folder: Path, **fields: Any) -> Path:
    """An adapter of random weights, large enough to be seen in the captions."""
    config = TrainConfig.parse({"model": base.name, "lora_r": 4, "lora_alpha": 16, **fields})
    adapter = Adapter(base.model, config)
    generator = torch.Generator().manual_seed(1)
    for pair in adapter.pairs.values():
        pair.b.copy_(torch.randn(pair.b.shape, generator=generator) * 0.3)
    adapter.save(folder, base.name)
    return folder
