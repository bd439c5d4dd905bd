"""Scaled dot-product attention between rows without padding (`trainer.model.ragged`).

It is PyTorch's fused kernel on padded sequences, or batched products of matrices: for short sequences on a CPU, where
the kernel works head by head and for some dozens of tokens its overhead is more than its arithmetic, and on a GPU
where no fused kernel may be taken (`trainer.kernels`).
Vaswani et al. 2017, https://arxiv.org/abs/1706.03762.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainer import kernels
from trainer.model.library_private import softmax_backward
from trainer.model.ragged import Ragged

DENSE = 10_000
"""Scores of a head up to which attention written out is faster on a CPU: forward and backward of 70 x 70 take 2.95 ms
instead of 4.08 (4 samples, 9 heads of 64), of 47 x 47 4.0 instead of 5.2 (32 samples, 4 heads of 32), of 128 x 128 the
same time."""


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    size: int,
    rows: Ragged,
    keys: Ragged,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of each query to the keys of its own sample: (N, heads x size).

    Args:
        query: (N, heads x size), laid out as `rows`.
        key: (M, key heads x size), laid out as `keys`; with fewer heads than the queries, each serves several of them.
        value: as `key`.
        size: of a head.
        rows: layout of the queries.
        keys: layout of keys and values.
        scale: factor of the products of queries and keys.
        bias: added to the products, broadcast to (B, heads, L, keys): from `hidden`, where there must be no attention,
            for example to padding.
    """
    if _written_out(query, rows.length * keys.length):
        return _Dense.apply(query, key, value, bias, size, rows, keys, scale)  # type: ignore[no-any-return,no-untyped-call]
    # Padded, through the fused kernel.
    padded = rows.pad(query), keys.pad(key), keys.pad(value)
    q, k, v = (each.unflatten(2, (-1, size)).transpose(1, 2) for each in padded)
    if k.shape[1] != q.shape[1]:
        # Not by `enable_gqa`: with a bias, that falls back to the slowest of CUDA's kernels.
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    return rows.unpad(out.transpose(1, 2).flatten(2))


def _written_out(query: torch.Tensor, scores: int) -> bool:
    """Whether attention of so many scores a head is written out.

    PyTorch's math kernel, which is left on a GPU where no fused one may be taken, keeps the scores twice; it is as
    fast in float32 and slower in bfloat16: 145 instead of 136 ms for a round of eight runs of 4 (H200).
    """
    if query.device.type == "cuda":
        return query.dtype != torch.float16 and not kernels.fused_attention_allowed()
    return scores <= DENSE and query.dtype in (torch.float32, torch.float64)


def hidden(seen: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias for a mask: 0 where `seen` is true, elsewhere the lowest number, as in Transformers."""
    if seen is None:
        return None
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


class _Dense(torch.autograd.Function):
    """Attention as one autograd node: rows to heads, scores, softmax, and back."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        size: int,
        rows: Ragged,
        keys: Ragged,
        scale: float,
    ) -> torch.Tensor:
        heads, groups = query.shape[1] // size, key.shape[1] // size
        k, v = keys.apart(key, groups), keys.apart(value, groups)
        # Queries of heads that share keys lie one after the other: for the product, they are queries of one head.
        # (`reshape`: of a single sample, the heads apart are a view with strides of its own.)
        q = rows.apart(query, heads).reshape(k.shape[0], -1, size)
        if scale != 1.0:
            q = q * scale
        scores = torch.bmm(q, k.transpose(1, 2))
        if bias is not None:
            scores.view(rows.samples, heads, rows.length, -1).add_(bias)
        shares = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, shares)
        ctx.args = heads, groups, rows, keys, scale
        return rows.together(torch.bmm(shares, v), heads)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        q, k, v, shares = ctx.saved_tensors
        heads, groups, rows, keys, scale = ctx.args
        above = rows.apart(grad, heads, zeros=True).reshape(k.shape[0], -1, v.shape[2])
        grad_v = torch.bmm(shares.transpose(1, 2), above)
        grad_scores = softmax_backward(torch.bmm(above, v.transpose(1, 2)), shares, -1, shares.dtype)
        grad_q = torch.bmm(grad_scores, k)
        if scale != 1.0:
            grad_q.mul_(scale)
        grad_k = torch.bmm(grad_scores.transpose(1, 2), q)
        back = rows.together(grad_q, heads), keys.together(grad_k, groups), keys.together(grad_v, groups)
        return *back, None, None, None, None, None
