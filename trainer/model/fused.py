"""Modules that replace those of a frozen base after loading: the same functions, to rounding, in fewer operations.

Transformers writes the tanh GELU of FlanT5 and the norms of T5 and Llama out in many small operations; on the short
matrices of a fine-tuning step it is the number of operations that costs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from trainer.model.library_private import has_accelerate_hook

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = SLOPE * 0.044715
"""gelu(x) = x sigmoid(SLOPE x + CUBIC x^3)."""


def fuse(model: Any) -> None:
    """Replace the tanh GELUs and the root mean square norms of a frozen base, in place.

    Norms that Accelerate has hooked into stay as they are.
    """
    from transformers.activations import NewGELUActivation
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, TanhGELU())
            elif isinstance(child, T5LayerNorm | LlamaRMSNorm) and not has_accelerate_hook(child):
                setattr(module, name, RMSNorm(child))


# --- the tanh GELU of FlanT5's feed-forward ----------------------------------------------------------------------


class TanhGELU(nn.Module):
    """The function of `nn.GELU(approximate="tanh")`, to rounding, through the sigmoid where that is faster: on a CPU.

    PyTorch's kernel evaluates tanh there at some 4 ns a number, forward and again backward, and its sigmoid at 1 ns;
    (1 + tanh u) / 2 = sigmoid(2 u). In training it keeps two tensors instead of six.
    Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape to the same."""
        if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
            return nn.functional.gelu(x, approximate="tanh")
        return _TanhGELU.apply(x)  # type: ignore[no-any-return,no-untyped-call]


class _TanhGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        gate = (x * x).mul_(CUBIC).add_(SLOPE).mul_(x).sigmoid_()
        ctx.save_for_backward(x, gate)
        return x * gate

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, gate = ctx.saved_tensors
        # Beyond 1e4 the derivative is 0 or 1 whatever the slope; its overflow times 0 would be NaN.
        slope = (x * x).clamp_(max=1e8).mul_(3 * CUBIC).add_(SLOPE).mul_(x)
        return slope.mul_(torch.ops.aten.sigmoid_backward(grad, gate)).addcmul_(grad, gate)


# --- the norms of T5 and Llama ------------------------------------------------------------------------------------


FUSED_NORMS = ("cuda",)
"""Kinds of devices on which PyTorch has one kernel for the norm, and one for its derivative."""


class RMSNorm(nn.Module):
    """Root mean square normalisation with a frozen weight: Transformers' T5LayerNorm or LlamaRMSNorm, to rounding.

    In a third of their operations: they take six, whose derivatives are a dozen more.
    Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.

    On a GPU by PyTorch's fused kernel, which computes in float32 and rounds once; on a CPU, other dtypes than float32
    go through the original, whose choice of where to round is part of what it computes.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.weight = original.weight
        self.variance_epsilon = original.variance_epsilon
        self._original = (original,)  # in a tuple: as a submodule it would give the weight a second name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) to the same."""
        weight: torch.Tensor = self.weight  # type: ignore[assignment]
        if x.device.type in FUSED_NORMS and x.dtype == weight.dtype and not weight.requires_grad:
            return nn.functional.rms_norm(x, x.shape[-1:], weight, self.variance_epsilon)  # type: ignore[arg-type]
        if x.dtype != torch.float32 or weight.dtype != torch.float32 or weight.requires_grad:
            return self._original[0](x)  # type: ignore[no-any-return]
        return _Normed.apply(x, self.weight, self.variance_epsilon)  # type: ignore[no-any-return,no-untyped-call]


class _Normed(torch.autograd.Function):
    """y = w x / rms(x), and its gradient for x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        inverse = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        normed: torch.Tensor = (x * inverse).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        x, weight, inverse = ctx.saved_tensors
        grad = grad * weight
        along = (grad * x).sum(-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
        return grad.mul_(inverse).addcmul_(x, along), None, None
