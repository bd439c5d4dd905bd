"""Root mean square normalisation of a frozen base in a third of the operations.

T5 and Llama write it out in six operations, whose derivatives are a dozen more; on rows this short it is their number
that costs. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class RMSNorm(nn.Module):
    """Transformers' T5LayerNorm or LlamaRMSNorm, with a weight that is not trained: the same function, to rounding.

    Other dtypes than float32 go through the original, whose choice of where to round is part of what it computes.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.weight = original.weight
        self.variance_epsilon = original.variance_epsilon
        self._original = (original,)  # in a tuple: as a submodule it would give the weight a second name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., hidden size) to the same."""
        if x.dtype != torch.float32 or self.weight.dtype != torch.float32 or self.weight.requires_grad:
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
