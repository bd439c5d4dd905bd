"""The first cause when a step is not finite, found by looking at the tensors themselves."""

from __future__ import annotations

import math

import torch

from trainer.config import TrainConfig
from trainer.events import NonFinite
from trainer.model.lora import Adapter, Named


def explain(adapter: Adapter, config: TrainConfig, *, query_peak: float, loss: float, fresh: bool = True) -> NonFinite:
    """The first tensor of a step that is not finite, in the order of computation.

    A parameter that is not finite was made so by an earlier update (every step begins with the parameters that the
    last update left); otherwise it was the forward pass, or else the backward pass.

    Args:
        adapter: its gradients must be as the backward pass left them: clipping by a norm that is NaN would make all
            of them NaN, and hide which was first.
        config: of the run.
        query_peak: largest magnitude in the Q-Former's output.
        loss: of the step.
        fresh: whether the gradients are still those of the step.
    """
    named = adapter.named()
    # Parameters, as the last update left them.
    for name, each in named.items():
        if not bool(torch.isfinite(each.weight).all()):
            detail = _after_update(each, adapter.updates(), config)
            return NonFinite(
                tensor=f"param: {_short(name)}", value=_kind(each.weight), after_update=True, detail=detail
            )
    # The forward pass.
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
    # The backward pass.
    for name, each in named.items():
        if fresh and not bool(torch.isfinite(each.grad).all()):
            detail = f"the loss {loss:.4g} was finite; the gradient overflowed ({where})"
            return NonFinite(tensor=f"grad: {_short(name)}", value=_kind(each.grad), after_update=False, detail=detail)
    detail = f"every gradient was finite, their norm was not: its sum of squares overflowed ({where})"
    if not fresh:
        detail = f"the loss {loss:.4g} was finite, the gradients' norm was not; the gradients were not kept ({where})"
    return NonFinite(tensor="grad_norm", value="inf", after_update=False, detail=detail)


def _after_update(each: Named, updates: int, config: TrainConfig) -> str:
    """The reason why AdamW made the parameter not finite, as far as its state shows."""
    first, second = each.exp_avg, each.exp_avg_sq
    eps = float(torch.tensor(config.adam_epsilon, dtype=each.weight.dtype))
    facts = [f"the update made it so; dtype {config.torch_dtype}"]
    if updates:
        facts.append(f"AdamW had made {updates} update{'s' if updates != 1 else ''}")
    bad = ~torch.isfinite(each.weight)
    if first is not None and second is not None:
        if not bool(first[bad].any()) and not bool(second[bad].any()):
            # lora_B starts at 0, so lora_A's gradient at the first step is exactly 0.
            facts.append("the gradient there was exactly 0 (both moments are 0)")
        elif not bool(second[bad].any()):
            facts.append("the gradient's square underflowed to 0 (second moment is 0, first is not)")
    facts.append(f"eps {config.adam_epsilon:g} is {eps:g} in {config.torch_dtype}")
    if eps == 0.0 and second is not None and not bool(second[bad].any()):
        facts.append("so the update divided by 0")
    return "; ".join(facts)


def _kind(tensor: torch.Tensor) -> str:
    if bool(torch.isnan(tensor).any()):
        return "nan"
    return "inf" if bool((tensor == math.inf).any()) else "-inf"


def _short(name: str) -> str:
    return name.removeprefix("base_model.model.")
