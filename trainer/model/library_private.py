"""Names that belong to libraries and that their documentation does not promise: all that the trainer uses of them.

Each with the reason why no public name serves. A new version of a library may drop one:
tests/trainer/model/test_library_private.py then fails and says which.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

softmax_backward = torch._softmax_backward_data
"""(gradient, softmax's output, dim, dtype) -> the gradient of softmax's input, in one pass over the scores.

Written out, `out * (grad - (grad * out).sum(dim))`, it takes four operations and two more tensors as large as the
scores, in every attention (trainer/model/attention.py).
"""

ACCELERATE_HOOK = "_hf_hook"
"""Attribute of a module that Accelerate has hooked into, which moves its inputs to where its weights are."""

ACCELERATE_FORWARD = "_old_forward"
"""Attribute for the forward that Accelerate's own calls: what stands in for a module's forward belongs there, or the
input would not have been moved yet. Its public `remove_hook_from_module` undoes the spreading altogether."""


def has_accelerate_hook(module: nn.Module) -> bool:
    """Whether Accelerate has put itself before the module's forward, as it does in a base that is spread."""
    return hasattr(module, ACCELERATE_HOOK)


def forward_attribute(module: nn.Module) -> str:
    """The attribute of a module whose value computes it: `forward`, or what Accelerate has put in its place."""
    return ACCELERATE_FORWARD if has_accelerate_hook(module) else "forward"


def attention_kernels(config: Any) -> str:
    """Which attention a part of a model uses, `sdpa` or `eager`: the kernels differ in the last bits.

    Transformers writes it to no other place: `config.to_dict()` leaves it out.
    """
    return str(config._attn_implementation)


def foreach_norm(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """The 2-norm of each tensor, a scalar: what `torch.nn.utils.get_total_norm` begins with, without its total."""
    return torch._foreach_norm(list(tensors))


def foreach_zero(tensors: Sequence[torch.Tensor]) -> None:
    """Set tensors to 0, on a GPU in one kernel: what `zero_grad(set_to_none=False)` does with gradients."""
    torch._foreach_zero_(list(tensors))


def fused_adamw(optimizers: Sequence[torch.optim.AdamW], found_inf: Sequence[torch.Tensor]) -> None:
    """`step()` of several fused AdamWs of one parameter each.

    PyTorch's own step has 60 to 100 microseconds of Python around one kernel, and three kernels for its count of
    updates; here these are two for all optimizers.

    Args:
        optimizers: with `fused=True` and without `amsgrad`; their parameters on one device.
        found_inf: for each a float scalar; 1 leaves parameter, moments and count as they are, unknown to the host, as
            PyTorch's GradScaler has it.
    """
    groups = [optimizer.param_groups[0] for optimizer in optimizers]
    states = [_adamw_state(o, g["params"][0]) for o, g in zip(optimizers, groups, strict=True)]
    counts = [state["step"] for state in states]
    torch._foreach_add_(counts, 1)
    for group, state, bad in zip(groups, states, found_inf, strict=True):
        parameter = group["params"][0]
        torch._fused_adamw_(
            [parameter],
            [parameter.grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=None,
            found_inf=bad,
        )
    torch._foreach_sub_(counts, list(found_inf))


def _adamw_state(optimizer: torch.optim.AdamW, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state of a fused AdamW, made as its own first step makes it."""
    state: dict[str, torch.Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter)
        state["exp_avg_sq"] = torch.zeros_like(parameter)
    return state
