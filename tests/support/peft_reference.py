"""PEFT's own LoRA on a base, which tests and benchmarks compare the trainer's with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.model.peft_format import lora_config, resolve_targets


@contextmanager
def attached(model: Any, config: TrainConfig, *, autocast: bool = False) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The base with a fresh adapter, for as long as the context lasts: (PEFT model, adapted module names).

    Afterwards the base is as it was.

    Args:
        model: the base.
        config: of the adapter.
        autocast: adapters in float32 on a base of a lower dtype, which is PEFT's default.
    """
    from peft import get_peft_model

    modules = resolve_targets(model, config.target_modules)
    training = model.training
    torch.manual_seed(config.seed)  # lora_A's initial values
    lora = lora_config(config, modules, None)
    with warnings.catch_warnings():
        # PEFT warns when a model is wrapped a second time, as a base is by one test after the other.
        warnings.filterwarnings("ignore", message=".*modify a model with PEFT for a second time.*")
        # PEFT 0.21 reads an attribute that Transformers 5.20 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")
        # Without autocast, float16 means what it meant in the hand-run, adapters included.
        peft_model = get_peft_model(model, lora, autocast_adapter_dtype=autocast)
    try:
        yield peft_model, modules
    finally:
        peft_model.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        model.requires_grad_(False)
        model.train(training)


def parameters(peft_model: Any) -> dict[str, nn.Parameter]:
    """The adapter's parameters by name, in a fixed order."""
    named = {name: p for name, p in peft_model.named_parameters() if p.requires_grad}
    return dict(sorted(named.items()))


def lora_parameters(model: nn.Module, modules: Sequence[str], r: int) -> int:
    """Trainable parameters by the closed formula: the sum of r * (d_in + d_out) over the adapted modules."""
    total = 0
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        total += r * (linear.in_features + linear.out_features)
    return total
