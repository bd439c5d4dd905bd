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

from trainer.model.lora import Adapter, by_uniform
from trainer.model.rounding import filled_rank

STACKED = ("cuda",)
"""Kinds of devices on which runs are stacked. Eight runs of 4 samples on an H200, bfloat16: a round takes 514 ms
instead of 1,167, both waiting for launches."""


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


class Room:
    """Memory for the adapters of k runs, ranks filled up to R: their weights, gradients and what dropout needs.

    Runs come and go, and a stack of others may use the same room: what was recorded with it (`trainer.model.graphs`)
    holds no run's own tensors.
    """

    def __init__(self, k: int, rank: int, like: Adapter) -> None:
        sizes = [(name, pair.a.shape[1], pair.b.shape[0]) for name, pair in like.pairs.items()]
        weights = like.weights
        self.k, self.rank = k, rank
        total = sum(k * rank * (d_in + d_out) for _, d_in, d_out in sizes)
        self.weights = torch.empty(total, dtype=weights.dtype, device=weights.device)
        self.grads = torch.zeros_like(self.weights)
        self.keeps, self.factors = (torch.ones(k, 1, 1, dtype=weights.dtype, device=weights.device) for _ in range(2))
        """Of dropout, (k, 1, 1): 1 - p, and 1 / (1 - p)."""
        self.generators = [torch.Generator(weights.device) for _ in range(k)]
        self.modules = self._views(sizes)

    def _views(self, sizes: Sequence[tuple[str, int, int]]) -> dict[str, Matrices]:
        k, rank, at, found = self.k, self.rank, 0, {}
        for name, d_in, d_out in sizes:
            middle, end = at + k * rank * d_in, at + k * rank * (d_in + d_out)
            a, grad_a = (whole[at:middle].view(k, rank, d_in) for whole in (self.weights, self.grads))
            b, grad_b = (whole[middle:end].view(k, rank, d_out) for whole in (self.weights, self.grads))
            found[name] = Matrices(a, b, grad_a, grad_b)
            at = end
        return found


class Stack:
    """The weights of several adapters in one tensor, and their gradients in another."""

    def __init__(self, adapters: Sequence[Adapter], room: Room | None = None) -> None:
        """Find where each weight goes; `load` copies them there.

        Args:
            adapters: of the same modules, dtype and device.
            room: for as many adapters, none of a higher rank; one of its own without.
        """
        self.adapters = tuple(adapters)
        weights = adapters[0].weights
        device = weights.device
        total = sum(len(adapter) for adapter in adapters)
        self.room = room or Room(len(adapters), filled_rank(a.config.lora_r for a in adapters), adapters[0])
        places = _places(adapters, self.room.rank, total)
        scales = torch.ones(total + 1, dtype=weights.dtype, device=device)
        first = 0
        for adapter in adapters:
            for pair in adapter.pairs.values():
                at = first + int(pair.b.storage_offset())
                scales[at : at + pair.b.numel()] = adapter.scale
            first += len(adapter)
        taken = (places != total).nonzero().squeeze(1)
        self._back = torch.empty(total, dtype=torch.int32, device=device)
        self._back.index_copy_(0, places[taken].long(), taken.int())
        self._places, self._scales = places, scales.index_select(0, places)
        self._zero = weights.new_zeros(1)
        keeps = torch.tensor([1.0 - adapter.dropout for adapter in adapters], dtype=torch.float64)
        self.drops = bool((keeps < 1).any())
        """Whether any run has dropout."""
        self.generators: Sequence[torch.Generator] = ()
        """That draw dropout in place of the adapters' own: the room's, once `seed` has been called."""
        self._keeps = keeps.view(-1, 1, 1).to(weights)
        self._factors = keeps.reciprocal().view(-1, 1, 1).to(weights)

    @property
    def modules(self) -> dict[str, Matrices]:
        """The matrices of each adapted module."""
        return self.room.modules

    @torch.no_grad()
    def load(self) -> None:
        """Take over the adapters' weights as they are now, and forget all gradients."""
        room = self.room
        flat = torch.cat([*(adapter.weights for adapter in self.adapters), self._zero])
        torch.index_select(flat, 0, self._places, out=room.weights)
        room.weights.mul_(self._scales)
        room.grads.zero_()
        if self.drops:
            room.keeps.copy_(self._keeps)
            room.factors.copy_(self._factors)

    def seed(self) -> None:
        """Draw dropout with the room's generators from now on, from where the adapters' own were seeded."""
        self.generators = self.room.generators
        for generator, adapter in zip(self.generators, self.adapters, strict=True):
            generator.manual_seed(adapter.generator.initial_seed())

    def apply(
        self, anchor: torch.Tensor | None, x: torch.Tensor, module: nn.Linear, name: str, sizes: list[int], train: bool
    ) -> torch.Tensor:
        """The output of an adapted module for the rows of all runs, of each as many as `sizes` says."""
        return _StackedLora.apply(anchor, x, module.weight, module.bias, name, self, sizes, train)  # type: ignore[no-any-return,no-untyped-call]

    @torch.no_grad()
    def add_gradients(self) -> None:
        """Add the gradients since `load` to the adapters' own."""
        flat = self.room.grads.mul_(self._scales).index_select(0, self._back)
        sizes = [len(adapter) for adapter in self.adapters]
        for adapter, part in zip(self.adapters, flat.split(sizes), strict=True):
            adapter.grads.add_(part)


def _places(adapters: Sequence[Adapter], rank: int, zero: int) -> torch.Tensor:
    """For each place of the stack the weight that it takes, or `zero`.

    A module has the As of all runs, then the Bs, each filled up to `rank` rows.
    """
    parts: list[torch.Tensor] = []
    device = adapters[0].weights.device

    def add(first: int, matrix: torch.Tensor, rows: int) -> None:
        width = matrix.numel() // rows
        start = first + int(matrix.storage_offset())
        parts.append(torch.arange(start, start + matrix.numel(), dtype=torch.int32, device=device))
        parts.append(torch.full(((rank - rows) * width,), zero, dtype=torch.int32, device=device))

    firsts = [sum(len(each) for each in adapters[:run]) for run in range(len(adapters))]
    for name in adapters[0].modules:
        for first, adapter in zip(firsts, adapters, strict=True):
            add(first, adapter.pairs[name].a, adapter.config.lora_r)
        for first, adapter in zip(firsts, adapters, strict=True):
            add(first, adapter.pairs[name].b, adapter.config.lora_r)
    return torch.cat(parts)


def alike(adapters: Sequence[Adapter]) -> bool:
    """Whether these runs' adapters fit into one stack: the same modules, each with the run's own rank."""
    first = adapters[0]
    # A module's rank may be another than `lora_r` only through PEFT's patterns, which the configuration has not.
    return all(adapter.modules == first.modules for adapter in adapters) and all(
        adapter.pairs[first.modules[0]].a.shape[0] == adapter.config.lora_r for adapter in adapters
    )


def can_stack(adapters: Sequence[Adapter]) -> bool:
    """Whether these runs' adapters are to be in a stack on their device, and fit into one."""
    return len(adapters) > 1 and adapters[0].weights.device.type in STACKED and alike(adapters)


class _StackedLora(torch.autograd.Function):
    """x W' + bias, and s_k drop(x_k) A_k' B_k' added to the rows of each run k; gradients go to the stack.

    Runs of equally many rows are one batch of matrices; others go one after the other.
    """

    @staticmethod
    def forward(
        ctx: Any,
        _anchor: torch.Tensor,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        name: str,
        stack: Stack,
        sizes: list[int],
        training: bool,
    ) -> torch.Tensor:
        own = stack.modules[name]
        rows = x.reshape(-1, x.shape[-1])
        y = nn.functional.linear(rows, weight, bias)
        runs = rows.to(own.a.dtype)
        mask = _masks(stack, runs, sizes) if training and stack.drops else None
        seen = runs if mask is None else runs * mask
        if len(set(sizes)) == 1:
            k = len(sizes)
            low: Any = torch.bmm(seen.view(k, -1, seen.shape[-1]), own.a.transpose(1, 2))
            _add_products(y.view(k, -1, y.shape[-1]), low, own.b)
        else:
            low = [torch.mm(part, a.t()) for part, a in zip(seen.split(sizes), own.a.unbind(), strict=True)]
            for out, one, b in zip(y.split(sizes), low, own.b.unbind(), strict=True):
                _add_product(out, one, b)
        ctx.save_for_backward(weight, rows, *(() if mask is None else (mask,)))
        ctx.own, ctx.sizes, ctx.shape, ctx.low = own, sizes, x.shape, low
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        weight, rows, *masks = ctx.saved_tensors
        own: Matrices = ctx.own
        grad = grad.reshape(-1, grad.shape[-1])
        above, runs = grad.to(own.a.dtype), rows.to(own.a.dtype)
        seen = runs * masks[0] if masks else runs
        grad_x = torch.mm(grad, weight) if ctx.needs_input_grad[1] else None
        parts = _together if len(set(ctx.sizes)) == 1 else _one_by_one
        parts(own, ctx.sizes, ctx.low, above, seen, grad_x, masks[0] if masks else None)
        return None, None if grad_x is None else grad_x.view(ctx.shape), None, None, None, None, None, None


def _together(
    own: Matrices,
    sizes: list[int],
    low: torch.Tensor,
    above: torch.Tensor,
    seen: torch.Tensor,
    grad_x: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """The gradients of all runs' matrices, and of their inputs if wanted, as batches of matrices."""
    k = len(sizes)
    above, seen = (each.view(k, -1, each.shape[-1]) for each in (above, seen))
    back, drop = (None if each is None else each.view(k, -1, each.shape[-1]) for each in (grad_x, mask))
    below = torch.bmm(above, own.b.transpose(1, 2))
    own.grad_b.baddbmm_(low.transpose(1, 2), above)
    own.grad_a.baddbmm_(below.transpose(1, 2), seen)
    if back is None:
        return
    if drop is None:
        _add_products(back, below, own.a)
    else:
        back.add_(torch.bmm(below, own.a).mul_(drop))


def _one_by_one(
    own: Matrices,
    sizes: list[int],
    low: Sequence[torch.Tensor],
    above: torch.Tensor,
    seen: torch.Tensor,
    grad_x: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """The same for runs that differ in their number of rows."""
    nothing = [None] * len(sizes)
    backs, drops = (nothing if each is None else each.split(sizes) for each in (grad_x, mask))
    for run, (up, x, back, drop) in enumerate(zip(above.split(sizes), seen.split(sizes), backs, drops, strict=True)):
        below = torch.mm(up, own.b[run].t())
        own.grad_b[run].addmm_(low[run].t(), up)
        own.grad_a[run].addmm_(below.t(), x)
        if back is not None and drop is None:
            _add_product(back, below, own.a[run])
        elif back is not None and drop is not None:
            back.add_(torch.mm(below, own.a[run]).mul_(drop))


def _masks(stack: Stack, runs: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The factors of (rows, features), each run's by its own generator: 0, or 1 / (1 - p)."""
    masks = torch.empty_like(runs)
    parts = masks.split(sizes)
    room = stack.room
    if not by_uniform(runs.device):
        for part, adapter, factor in zip(parts, stack.adapters, room.factors.unbind(), strict=True):
            part.bernoulli_(1.0 - adapter.dropout, generator=adapter.generator).mul_(factor)
        return masks
    generators = stack.generators or [adapter.generator for adapter in stack.adapters]
    for part, generator in zip(parts, generators, strict=True):
        part.uniform_(generator=generator)
    if len(set(sizes)) == 1:
        each = masks.view(len(sizes), -1, masks.shape[-1])
        torch.lt(each, room.keeps, out=each).mul_(room.factors)
    else:
        for part, keep, factor in zip(parts, room.keeps.unbind(), room.factors.unbind(), strict=True):
            torch.lt(part, keep, out=part).mul_(factor)
    return masks


def _add_products(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """total += one @ other, in place, run by run; summed in the adapters' dtype and rounded once."""
    if total.dtype == one.dtype:
        total.baddbmm_(one, other)
    else:
        total.add_(torch.bmm(one, other))


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    """The same for one run."""
    if total.dtype == one.dtype:
        total.addmm_(one, other)
    else:
        total.add_(torch.mm(one, other))
