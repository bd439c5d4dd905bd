"""The adapters of a pack's runs as one batch of matrices: a module takes as many kernels for k runs as for one.

Run by run, an adapted module has a dozen small operations for each run: of the 16,000 kernels of a round of 8 runs at
the real depth 10,400 were these, and 2,400 are (`python -m tests.benchmarks.launches`). Here a module's A and B of
all runs lie side by side, ranks filled up with zeros, and products of matrices go through `bmm`: runs never meet.

For runs with equally many rows and the same modules, on devices of `STACKED`. On a CPU, where it is arithmetic that is
waited for, grouped products were as slow as separate ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.model.lora import Adapter, Pair

STACKED = ("cuda",)
"""Kinds of devices on which runs are stacked. It was not measured on a GPU yet (`tests.benchmarks.gpu` does)."""


@dataclass(frozen=True)
class Matrices:
    """One module's adapters: views of the stack, k runs, ranks filled up to R."""

    a: torch.Tensor
    """(k, R, d_in)."""
    b: torch.Tensor
    """(k, R, d_out): B transposed, times the run's scaling."""
    grad_a: torch.Tensor
    grad_b: torch.Tensor
    """Of B transposed, without the scaling."""


class Stack:
    """The weights of several adapters in one tensor, and their gradients in another."""

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        """Find where each weight goes; `load` copies them there.

        Args:
            adapters: of the same modules, dtype and device.
        """
        self.adapters = tuple(adapters)
        weights = adapters[0].weights
        total = sum(len(adapter) for adapter in adapters)
        rank = max(adapter.config.lora_r for adapter in adapters)
        places, sizes = _places(adapters, rank, total)
        scales = torch.ones(total + 1, dtype=torch.float64)
        first = 0
        for adapter in adapters:
            for pair in adapter.pairs.values():
                at = first + int(pair.b.storage_offset())
                scales[at : at + pair.b.numel()] = adapter.scale
            first += len(adapter)
        back = torch.empty(total + 1, dtype=torch.int32)
        back[places.long()] = torch.arange(len(places), dtype=torch.int32)
        self._places, self._back = places.to(weights.device), back[:-1].to(weights.device)
        self._scales = scales[places.long()].to(weights)
        self._zero = weights.new_zeros(1)
        self._weights = torch.empty(len(places), dtype=weights.dtype, device=weights.device)
        self._grads = torch.zeros_like(self._weights)
        self.modules = self._views(rank, sizes)
        keeps = [1.0 - adapter.dropout for adapter in adapters]
        self.keeps = keeps if min(keeps) < 1 else None
        """Of dropout, by run; None if no run has any."""
        self.factors = torch.tensor([[[1 / keep]] for keep in keeps], dtype=weights.dtype, device=weights.device)

    def _views(self, rank: int, sizes: Sequence[tuple[str, int, int]]) -> dict[str, Matrices]:
        k, at, found = len(self.adapters), 0, {}
        for name, d_in, d_out in sizes:
            middle, end = at + k * rank * d_in, at + k * rank * (d_in + d_out)
            a, grad_a = (whole[at:middle].view(k, rank, d_in) for whole in (self._weights, self._grads))
            b, grad_b = (whole[middle:end].view(k, rank, d_out) for whole in (self._weights, self._grads))
            found[name] = Matrices(a, b, grad_a, grad_b)
            at = end
        return found

    @torch.no_grad()
    def load(self) -> None:
        """Take over the adapters' weights as they are now, and forget all gradients."""
        flat = torch.cat([*(adapter.weights for adapter in self.adapters), self._zero])
        torch.index_select(flat, 0, self._places, out=self._weights)
        self._weights.mul_(self._scales)
        self._grads.zero_()

    def apply(
        self, anchor: torch.Tensor | None, x: torch.Tensor, module: nn.Linear, name: str, training: bool
    ) -> torch.Tensor:
        """The output of an adapted module for the rows of all runs, equally many of each."""
        return _StackedLora.apply(anchor, x, module.weight, module.bias, name, self, training)  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients since `load` to the adapters' own."""
        flat = self._grads.mul_(self._scales).index_select(0, self._back)
        sizes = [len(adapter) for adapter in self.adapters]
        for adapter, part in zip(self.adapters, flat.split(sizes), strict=True):
            adapter.grads.add_(part)


def _places(adapters: Sequence[Adapter], rank: int, zero: int) -> tuple[torch.Tensor, list[tuple[str, int, int]]]:
    """(For each place of the stack the weight that it takes, or `zero`; (module, d_in, d_out)).

    A module has the As of all runs, then the Bs, each filled up to `rank` rows.
    """
    parts: list[torch.Tensor] = []
    sizes: list[tuple[str, int, int]] = []

    def add(first: int, matrix: torch.Tensor, rows: int) -> None:
        width = matrix.numel() // rows
        start = first + int(matrix.storage_offset())
        parts.append(torch.arange(start, start + matrix.numel(), dtype=torch.int32))
        parts.append(torch.full(((rank - rows) * width,), zero, dtype=torch.int32))

    firsts = [sum(len(each) for each in adapters[:run]) for run in range(len(adapters))]
    for name in adapters[0].modules:
        for first, adapter in zip(firsts, adapters, strict=True):
            add(first, adapter.pairs[name].a, adapter.config.lora_r)
        for first, adapter in zip(firsts, adapters, strict=True):
            add(first, adapter.pairs[name].b, adapter.config.lora_r)
        pair: Pair = adapters[0].pairs[name]
        sizes.append((name, pair.a.shape[1], pair.b.shape[0]))
    return torch.cat(parts), sizes


def can_stack(adapters: Sequence[Adapter]) -> bool:
    """Whether these runs' adapters fit into one stack, and are to be in one on their device."""
    first = adapters[0]
    return (
        len(adapters) > 1
        and first.weights.device.type in STACKED
        and all(adapter.modules == first.modules for adapter in adapters)
        # A module's rank may be another than `lora_r` only through PEFT's patterns, which the configuration has not.
        and all(adapter.pairs[first.modules[0]].a.shape[0] == adapter.config.lora_r for adapter in adapters)
    )


class _StackedLora(torch.autograd.Function):
    """x W' + bias, and s_k drop(x_k) A_k' B_k' added to the rows of each run k; gradients go to the stack."""

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        name: str,
        stack: Stack,
        training: bool,
    ) -> torch.Tensor:
        own = stack.modules[name]
        k = len(stack.adapters)
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, weight, bias)
        runs = rows.view(k, -1, x.shape[-1]).to(own.a.dtype)
        mask = _masks(stack, runs) if training and stack.keeps is not None else None
        low = torch.bmm(runs if mask is None else runs * mask, own.a.transpose(1, 2))
        _add_products(y.view(k, -1, y.shape[-1]), low, own.b)
        ctx.save_for_backward(weight, rows, *(() if mask is None else (mask,)))
        ctx.own, ctx.k, ctx.shape, ctx.low = own, k, x.shape, low
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, rows, *masks = ctx.saved_tensors
        own, k = ctx.own, ctx.k
        grad = grad.reshape(-1, grad.shape[-1])
        above = grad.view(k, -1, grad.shape[-1]).to(own.a.dtype)
        runs = rows.view(k, -1, rows.shape[-1]).to(own.a.dtype)
        below = torch.bmm(above, own.b.transpose(1, 2))
        own.grad_b.baddbmm_(ctx.low.transpose(1, 2), above)
        own.grad_a.baddbmm_(below.transpose(1, 2), runs * masks[0] if masks else runs)
        if not ctx.needs_input_grad[1]:
            return (None,) * 7
        grad_x = torch.mm(grad, weight)
        back = grad_x.view(k, -1, grad_x.shape[-1])
        if masks:
            back.add_(torch.bmm(below, own.a).mul_(masks[0]))
        else:
            _add_products(back, below, own.a)
        return None, grad_x.view(ctx.shape), None, None, None, None, None


def _masks(stack: Stack, runs: torch.Tensor) -> torch.Tensor:
    """The factors of (k, rows, features), each run's by its own generator: 0, or 1 / (1 - p)."""
    assert stack.keeps is not None
    masks = torch.empty_like(runs)
    for mask, keep, adapter in zip(masks.unbind(), stack.keeps, stack.adapters, strict=True):
        mask.bernoulli_(keep, generator=adapter.generator)
    return masks.mul_(stack.factors)


def _add_products(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """total += one @ other, in place, run by run; summed in the adapters' dtype and rounded once."""
    if total.dtype == one.dtype:
        total.baddbmm_(one, other)
    else:
        total.copy_(total.to(one.dtype).baddbmm_(one, other))
