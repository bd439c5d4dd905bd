"""A run as the libraries alone make it: InstructBLIP's own forward, PEFT's adapters, PyTorch's AdamW and clipping.

What a precision or a card is held to: `tests/trainer/test_precision.py` on the CPU, `tests.benchmarks.gpu` on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.support import peft_reference
from trainer.config import TrainConfig
from trainer.model.batch import IGNORE, Batch
from trainer.schedule import learning_rate


@dataclass(frozen=True)
class Ran:
    """What a number of steps came to."""

    losses: list[float]
    norms: list[float]
    """Of the gradients, before clipping."""
    weights: dict[str, torch.Tensor]
    """The adapter's, by PEFT's names, after the last step."""


def library_inputs(batch: Batch, *, image_token: int, num_query_tokens: int) -> dict[str, torch.Tensor]:
    """A batch as the library's processor would give it: the image tokens stand before the text.

    `input_ids`: (B, Q + text length). Labels of a decoder-only model are as long; those of a T5 stay as they are.
    """
    assert batch.pixel_values is not None
    before = (len(batch), num_query_tokens)
    ids, mask, labels = batch.text_ids, batch.text_mask, batch.labels
    if labels.shape == ids.shape and bool((labels[:, 0] == IGNORE).all()):  # decoder-only: the prompt has no labels
        labels = torch.cat([labels.new_full(before, IGNORE), labels], dim=1)
    return {
        "pixel_values": batch.pixel_values,
        "qformer_input_ids": batch.qformer_ids,
        "qformer_attention_mask": batch.qformer_mask,
        "input_ids": torch.cat([ids.new_full(before, image_token), ids], dim=1),
        "attention_mask": torch.cat([mask.new_ones(before), mask], dim=1),
        "labels": labels,
    }


def run(model: Any, config: TrainConfig, batches: Sequence[Batch]) -> Ran:
    """One step on each batch, a batch a step.

    Args:
        model: an InstructBLIP with the library's own modules; afterwards it is as it was.
        config: of the run; without dropout, since ours draws its masks from a generator of its own.
        batches: with pixels, on the model's device, in the order of the run.
    """
    assert config.lora_dropout == 0 and config.gradient_accumulation_steps == 1
    tokens = {"image_token": model.config.image_token_index, "num_query_tokens": model.config.num_query_tokens}
    losses, norms = [], []
    with peft_reference.attached(model, config, autocast=config.base_dtype is not None) as (peft_model, _):
        peft_model.eval()  # as ours: the frozen base without its own dropout
        named = peft_reference.parameters(peft_model)
        optimizer = torch.optim.AdamW(
            named.values(), lr=config.learning_rate, eps=config.adam_epsilon, weight_decay=config.weight_decay
        )
        for number, batch in enumerate(batches, 1):
            inputs = library_inputs(batch, **tokens)
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            optimizer.param_groups[0]["lr"] = learning_rate(config, number, len(batches))
            loss = peft_model(**inputs).loss
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(named.values(), config.max_grad_norm)))
            losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
        return Ran(losses, norms, {name: p.detach().clone() for name, p in named.items()})
