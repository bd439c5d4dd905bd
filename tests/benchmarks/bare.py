"""The least code that does a step's arithmetic: PEFT, PyTorch's AdamW and clipping, batches that are there already."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tests.support import peft_reference
from trainer.config import TrainConfig
from trainer.data.batches import batches, train_loader
from trainer.model.base import forward
from trainer.model.batch import Batch, layout_of
from trainer.workbench import Workbench


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ready_batches(bench: Workbench, config: TrainConfig, epoch: int = 1) -> list[Batch]:
    """The epoch's batches on the device, vision outputs included where the configuration keeps them."""
    base = bench.base(config)
    train_set, _ = bench.datasets(config)
    features = bench.features(config)
    if features is not None:
        index = features.index
        train_set = train_set.seen_through(lambda path: torch.tensor(index(path)))
    loader, sampler = train_loader(train_set, bench.tokenizer(config), config, pin=False)
    sampler.epoch = epoch
    found = []
    for batch in batches(loader):
        batch.layout = layout_of(base.model.config, batch)  # on the host: a GPU would be asked for each length
        found.append(batch.to(base.device))
    if features is None:
        return found
    return [
        replace(b, image_rows=None, image_embeds=features.take(b.image_rows))
        for b in found
        if b.image_rows is not None
    ]


class Bare:
    """A training loop and nothing else: no events, no checks, no data loading."""

    def __init__(self, peft_model: Any, config: TrainConfig) -> None:
        self.model = peft_model.get_base_model()
        self.config = config
        self.parameters: list[nn.Parameter] = list(peft_reference.parameters(peft_model).values())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; the loss stays on the device."""
        loss = forward(self.model, batch).loss_sum / batch.num_tokens()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def epoch(self, ready: list[Batch]) -> float:
        """Seconds of one pass."""
        synchronize()
        began = time.perf_counter()
        for batch in ready:
            self.step(batch)
        synchronize()
        return time.perf_counter() - began


@contextmanager
def bare_loop(bench: Workbench, config: TrainConfig) -> Iterator[Bare]:
    """The loop on the workbench's base, which must have no other adapter meanwhile."""
    with peft_reference.attached(bench.base(config).model, config) as (peft_model, _):
        peft_model.eval()  # as ours: the frozen base without its own dropout
        yield Bare(peft_model, config)
