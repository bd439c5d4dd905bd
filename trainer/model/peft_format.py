"""LoRA as PEFT has it: which modules get an adapter, its initial values, its description on disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from trainer.common.errors import ModelError, nearest
from trainer.config import TrainConfig
from trainer.runtime import DTYPES

AUTO_MAPPING = {
    "base_model_class": "InstructBlipForConditionalGeneration",
    "parent_library": "transformers.models.instructblip.modeling_instructblip",
}
"""As PEFT writes it for a base without a task type: the class that `AutoPeftModel` loads."""


def resolve_targets(model: nn.Module, target_modules: Sequence[str]) -> tuple[str, ...]:
    """Full names of the linear modules whose name ends in one of `target_modules`, sorted.

    Raises:
        ModelError: a name that no module has; PEFT would ignore it silently if another name matched.
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


def lora_config(config: TrainConfig, modules: Sequence[str], base_name: str | None) -> Any:
    """PEFT's description of the adapter.

    `task_type` is left out: CAUSAL_LM made older PEFT versions pass `inputs_embeds` of their own, the clash that the
    hand-run log met. `auto_mapping` takes its place for `AutoPeftModel`: the class of the base.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(modules),
        bias="none",
        base_model_name_or_path=base_name,
        auto_mapping=AUTO_MAPPING if base_name is not None else None,
    )


def initial_values(model: Any, config: TrainConfig) -> tuple[dict[str, torch.Tensor], tuple[str, ...]]:
    """PEFT's initial values of an adapter for this seed, by its names for the weights, and the adapted modules' names.

    The same random numbers in the same order as `peft.get_peft_model`, to the last bit
    (tests/trainer/model/test_ragged.py), without wrapping 40 modules and unwrapping them again at once, which took
    50 ms of every trial's beginning.
    """
    modules = resolve_targets(model, config.target_modules)
    wanted = set(modules)
    # As PEFT's `autocast_adapter_dtype` where the base is in a lower dtype than the adapters.
    own = None if config.base_dtype is None else DTYPES[config.torch_dtype]
    found: dict[str, torch.Tensor] = {}
    torch.manual_seed(config.seed)
    for name, module in model.named_modules():  # the order in which initial values are drawn
        if name not in wanted:
            continue
        # PEFT makes two linear layers, which draw values of their own, and then draws A again (Hu et al. 2021).
        down = nn.Linear(module.in_features, config.lora_r, bias=False)
        up = nn.Linear(config.lora_r, module.out_features, bias=False)
        nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
        nn.init.zeros_(up.weight)
        for letter, layer in (("A", down), ("B", up)):
            found[f"base_model.model.{name}.lora_{letter}.default.weight"] = layer.weight.detach().to(
                module.weight.device, own or module.weight.dtype
            )
    return dict(sorted(found.items())), modules
