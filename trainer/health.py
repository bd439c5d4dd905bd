"""What went bad first, when something is not finite: found by looking at the tensors themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.events import NonFinite


def explain(
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
    *,
    query_peak: float,
    loss: float,
) -> NonFinite:
    """The first tensor of a bad step that is not finite, in the order of computation.

    A parameter that is not finite was made so by an earlier update (every step begins with the parameters the last
    update left); otherwise the forward pass or else the backward pass did it.

    Args:
        parameters: the adapter's, with gradients as the backward pass left them: clipping by a norm that is NaN would
            make all of them NaN, and hide which was first.
        query_peak: largest magnitude in the Q-Former's output.
        loss: of the step.
    """
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            detail = _after_update(name, parameter, optimizer, config)
            return NonFinite(tensor=f"param: {_short(name)}", value=_kind(parameter), after_update=True, detail=detail)
    where = f"dtype {config.torch_dtype}, learning rate peak {config.learning_rate:g}"
    if not math.isfinite(query_peak):
        return NonFinite(
            tensor="query_output",
            value="nan" if math.isnan(query_peak) else "inf",
            after_update=False,
            detail=f"all parameters were finite; the Q-Former's output was not ({where})",
        )
    if not math.isfinite(loss):
        value = "nan" if math.isnan(loss) else "inf"
        detail = f"parameters and query output were finite; the loss was not ({where})"
        return NonFinite(tensor="loss", value=value, after_update=False, detail=detail)
    for name, parameter in parameters.items():
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            detail = f"the loss {loss:.4g} was finite; the gradient overflowed ({where})"
            return NonFinite(
                tensor=f"grad: {_short(name)}", value=_kind(parameter.grad), after_update=False, detail=detail
            )
    detail = f"every gradient was finite, their norm was not: its sum of squares overflowed ({where})"
    return NonFinite(tensor="grad_norm", value="inf", after_update=False, detail=detail)


def _after_update(name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, config: TrainConfig) -> str:
    """Why AdamW made the parameter not finite, as far as its state shows."""
    state = optimizer.state.get(parameter, {})
    eps = float(torch.tensor(config.adam_epsilon, dtype=parameter.dtype))
    facts = [f"the update made it so; dtype {config.torch_dtype}"]
    steps = state.get("step")
    if steps is not None:
        facts.append(f"AdamW had made {int(steps)} update{'s' if int(steps) != 1 else ''}")
    first, second = state.get("exp_avg"), state.get("exp_avg_sq")
    if first is not None and second is not None:
        bad = ~torch.isfinite(parameter)
        if not bool(first[bad].any()) and not bool(second[bad].any()):
            # lora_B starts at 0, so lora_A's gradient at the first step is exactly 0.
            facts.append("the gradient there was exactly 0 (both moments are 0)")
        elif not bool(second[bad].any()):
            facts.append("the gradient's square underflowed to 0 (second moment is 0, first is not)")
    facts.append(f"eps {config.adam_epsilon:g} is {eps:g} in {config.torch_dtype}")
    if eps == 0.0 and second is not None and not bool(second[~torch.isfinite(parameter)].any()):
        facts.append("so the update divided by 0")
    return "; ".join(facts)


def _kind(tensor: torch.Tensor) -> str:
    if bool(torch.isnan(tensor).any()):
        return "nan"
    return "inf" if bool((tensor == math.inf).any()) else "-inf"


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")
