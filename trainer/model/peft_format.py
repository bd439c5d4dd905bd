"""LoRA on the frozen base, through PEFT: which modules get it, how many parameters that is, saving, taking it off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.common.errors import ModelError
from trainer.config import TrainConfig, nearest


def resolve_targets(model: nn.Module, target_modules: Sequence[str]) -> tuple[str, ...]:
    """Full names of the linear modules whose name ends in one of `target_modules`, sorted.

    Raises:
        ModelError: a name that no module has; PEFT would pass over it silently if another name matched.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: set[str] = set()
    unknown = []
    for target in target_modules:
        matching = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not matching:
            unknown.append(target)
        found |= matching
    if unknown:
        endings = sorted({name.rpartition(".")[2] for name in linear})
        lines = "\n".join(f"  - no linear module is named {name!r}{nearest(name, endings)}" for name in unknown)
        raise ModelError(f"target_modules do not fit the model:\n{lines}\nIts linear modules: {', '.join(endings)}")
    return tuple(sorted(found))


def lora_parameters(model: nn.Module, modules: Sequence[str], r: int) -> int:
    """Trainable parameters by the closed formula: the sum of r * (d_in + d_out) over the adapted modules."""
    total = 0
    for name in modules:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        total += r * (linear.in_features + linear.out_features)
    return total


def lora_config(config: TrainConfig, modules: Sequence[str], base_name: str | None) -> Any:
    """PEFT's description of the adapter.

    `task_type` is left out: CAUSAL_LM made older PEFT versions pass `inputs_embeds` of their own, the clash that the
    hand-run log met.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(modules),
        bias="none",
        base_model_name_or_path=base_name,
    )


def initial_values(model: Any, config: TrainConfig) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """What PEFT gives a fresh adapter for this seed, by its names for the weights, and the adapted modules' names.

    The same random numbers in the same order as `attached`, to the last bit (test_ragged.py), without 40 wrapped
    modules that would be taken off again at once: that took 50 ms of every trial's beginning.
    """
    modules = resolve_targets(model, config.target_modules)
    wanted = set(modules)
    found: dict[str, torch.Tensor] = {}
    torch.manual_seed(config.seed)
    for name, module in model.named_modules():  # in this order initial values are drawn
        if name not in wanted:
            continue
        # PEFT makes two linear layers, which draw values of their own, and then draws A's anew (Hu et al. 2021).
        down = nn.Linear(module.in_features, config.lora_r, bias=False)
        up = nn.Linear(config.lora_r, module.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        for letter, layer in (("A", down), ("B", up)):
            found[f"base_model.model.{name}.lora_{letter}.default.weight"] = layer.weight.detach().to(module.weight)
    return dict(sorted(found.items())), modules


@contextmanager
def attached(model: Any, config: TrainConfig) -> Iterator[tuple[Any, tuple[str, ...]]]:
    """The base with a fresh adapter, for as long as the context lasts: (PEFT model, adapted module names).

    Afterwards the base is as it was.
    """
    from peft import get_peft_model

    modules = resolve_targets(model, config.target_modules)
    training = model.training
    torch.manual_seed(config.seed)  # lora_A's initial values
    lora = lora_config(config, modules, None)
    with warnings.catch_warnings():
        # PEFT warns when a model is wrapped a second time; a worker wraps its base once a trial and unwraps it.
        warnings.filterwarnings("ignore", message=".*modify a model with PEFT for a second time.*")
        # PEFT 0.21 reads an attribute that Transformers 5.20 renamed.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing. is deprecated.*")
        # autocast_adapter_dtype=False: float16 means what it meant in the hand-run, adapters included.
        peft_model = get_peft_model(model, lora, autocast_adapter_dtype=False)
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
