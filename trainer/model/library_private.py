"""Names that belong to libraries and that their documentation does not promise: all that the trainer uses of them.

Each with the reason why no public name serves. A new version of a library may drop one:
tests/trainer/model/test_library_private.py then fails and says which.
"""

from __future__ import annotations

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


def skip_update_if(optimizer: torch.optim.Optimizer, bad: torch.Tensor) -> None:
    """Make a fused optimizer's next step do nothing where `bad` is true, without asking the device for it.

    Args:
        optimizer: with `fused=True`.
        bad: scalar bool.
    """
    # What PyTorch's GradScaler sets on the optimizer; the fused kernels do nothing if it is 1.
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
