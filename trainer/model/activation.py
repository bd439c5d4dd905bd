"""The tanh GELU of FlanT5's feed-forward on a CPU, through the sigmoid.

PyTorch's kernel evaluates tanh there at some 4 ns a number, forward and again backward, and its sigmoid at 1 ns; they
are the same function: (1 + tanh u) / 2 = sigmoid(2 u). Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = SLOPE * 0.044715
"""gelu(x) = x sigmoid(SLOPE x + CUBIC x^3)."""


class TanhGELU(nn.Module):
    """The same function as `nn.GELU(approximate="tanh")`, to rounding."""

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
