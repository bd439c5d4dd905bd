"""Sequences of different lengths as rows, without padding between them.

A batch's hidden states are one matrix, sample after sample: linear layers, norms and activations, which are nearly all
of the arithmetic, compute nothing for padding. Attention alone takes the samples apart and joins them again.
On the cost of padding: Krell et al. 2021, https://arxiv.org/abs/2107.02027.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch

ZEROS_GATHERED = ("cuda",)
"""Kinds of devices on which padding is filled with zeros by gathering: a scatter sorts its indices there first."""

Padded = tuple[np.ndarray, np.ndarray]
"""(values, which of them are not padding), both (B, length): as a batch holds them, on the host."""


@dataclass(frozen=True)
class Ragged:
    """The layout of N rows of B samples, the longest of which has L rows."""

    starts: tuple[int, ...]
    """(B + 1): the first row of each sample, and N."""
    length: int
    """L."""
    places: torch.Tensor | None
    """(N,): the place of each row among the (B x L) padded ones. None if all samples have L rows."""
    sources: torch.Tensor | None
    """(B x L,): the row of each place; for padding, the last row of its own sample, so that values that are not finite
    stay in their sample."""
    gradients: torch.Tensor | None
    """(B x L,): the same, but N for padding: the row of zeros that is put behind the gradient of `unpad`."""
    _heads: dict[tuple[int, torch.device], tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, compare=False
    )

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, longest: int = 0) -> Ragged:
        """The layout of samples of these lengths, as if the longest had at least `longest` rows."""
        starts = tuple(accumulate(lengths, initial=0))
        longest = max(longest, *lengths)
        if min(lengths) == longest:
            return cls(starts, longest, None, None, None)
        columns, counts = np.arange(longest), np.array(lengths, dtype=np.int64)[:, None]
        sources = np.array(starts[:-1], dtype=np.int64)[:, None] + np.minimum(columns, counts - 1)
        gradients = np.where(columns < counts, sources, starts[-1])
        places = np.flatnonzero(columns < counts)
        return cls(starts, longest, *(_tensor(each.ravel(), device) for each in (places, sources, gradients)))

    @property
    def samples(self) -> int:
        """B."""
        return len(self.starts) - 1

    def steady(self) -> Ragged:
        """The same without what differs from batch to batch on the host: of `starts`, B and N alone are left."""
        return replace(self, starts=(*(0 for _ in range(self.samples)), self.starts[-1]))

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, features) to (B, L, features); padding is finite if its sample is, and means nothing."""
        if self.sources is not None and self.places is not None:
            rows = _gather(rows, self.sources, self.places, holes=False)
        return rows.view(self.samples, self.length, -1)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """(B, L, features) to (N, features)."""
        places = padded.flatten(0, 1)
        if self.places is None or self.gradients is None:
            return places
        return _gather(places, self.places, self.gradients, holes=True)

    def seen(self) -> torch.Tensor | None:
        """(B, 1, 1, L), false at padding; None if there is none."""
        if self.places is None:
            return None
        mask = torch.zeros(self.samples * self.length, dtype=torch.bool, device=self.places.device)
        return mask.index_fill_(0, self.places, True).view(self.samples, 1, 1, self.length)

    def apart(self, rows: torch.Tensor, heads: int, *, zeros: bool = False) -> torch.Tensor:
        """(N, heads x size) to (B x heads, L, size); no autograd.

        Args:
            rows: laid out like this.
            heads: number of heads that lie side by side in a row.
            zeros: padding is 0, not just finite.
        """
        if self.places is None:
            return (
                rows.view(self.samples, self.length, heads, -1)
                .transpose(1, 2)
                .reshape(self.samples * heads, self.length, -1)
            )
        slots, sources = self._by_head(heads, rows.device)
        parts = rows.reshape(-1, rows.shape[1] // heads)
        if zeros and rows.device.type in ZEROS_GATHERED:
            assert self.gradients is not None
            whole = torch.cat([parts, parts.new_zeros(heads, parts.shape[1])])
            out = whole.index_select(0, self._gradients_by_head(heads, rows.device))
        elif zeros:
            out = parts.new_zeros(len(sources), parts.shape[1]).index_copy_(0, slots, parts)
        else:
            out = parts.index_select(0, sources)
        return out.view(self.samples * heads, self.length, -1)

    def _gradients_by_head(self, heads: int, device: torch.device) -> torch.Tensor:
        """The part of a row for each of (B, heads, L) places; behind all parts, `heads` of zeros, for padding."""
        assert self.gradients is not None
        head = torch.arange(heads, device=device)
        return (self.gradients.to(device).view(-1, 1, self.length) * heads + head[:, None]).view(-1)

    def together(self, heads_apart: torch.Tensor, heads: int) -> torch.Tensor:
        """The inverse of `apart`: (B x heads, L, size) to (N, heads x size); no autograd."""
        size = heads_apart.shape[-1]
        if self.places is None:
            whole = heads_apart.view(self.samples, heads, self.length, size).transpose(1, 2)
            return whole.reshape(self.samples * self.length, heads * size)
        slots, _ = self._by_head(heads, heads_apart.device)
        return heads_apart.view(-1, size).index_select(0, slots).view(-1, heads * size)

    def _by_head(self, heads: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """(places, sources) of the (N x heads) parts of rows among (B, heads, L) places, found once a device.

        In a base that is spread, the rows of most layers are on another one than the layout.
        """
        key = heads, device
        if key not in self._heads:
            assert self.places is not None and self.sources is not None
            places, sources = self.places.to(device), self.sources.to(device)
            head = torch.arange(heads, device=device)
            slots = (places[:, None] // self.length * heads + head) * self.length + places[:, None] % self.length
            sources = sources.view(-1, 1, self.length) * heads + head[:, None]
            self._heads[key] = slots.view(-1), sources.view(-1)
        return self._heads[key]


@dataclass(frozen=True)
class QueriesWithText:
    """The layout of samples that consist of Q queries and then text."""

    rows: Ragged
    queries: torch.Tensor
    """(B x Q,): the rows that are queries."""
    text: torch.Tensor
    """(T,): the rows that are text."""
    order: torch.Tensor
    """(N,): where each row is among all queries followed by all text."""

    @classmethod
    def of(
        cls, text: Ragged, lengths: Sequence[int], queries: int, device: torch.device, longest: int = 0
    ) -> QueriesWithText:
        """The layout for texts of these lengths, the longest of which has at least `longest` tokens."""
        rows = Ragged.of([queries + length for length in lengths], device, queries + longest if longest else 0)
        own = (np.array(rows.starts[:-1], dtype=np.int64)[:, None] + np.arange(queries)).ravel()
        # The text's rows, each moved on by the queries of its own sample and of those before.
        moved = np.arange(text.starts[-1]) + np.repeat(queries * np.arange(1, len(lengths) + 1), lengths)
        order = np.argsort(np.concatenate([own, moved]))
        return cls(rows, *(_tensor(each, device) for each in (own, moved, order)))

    def join(self, queries: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B x Q, features) and (T, features) as (N, features)."""
        return _Join.apply(queries, text, *self._on(queries.device))  # type: ignore[no-any-return,no-untyped-call]

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inverse of `join`: (N, features) to (B x Q, features) and (T, features)."""
        return _Split.apply(rows, *self._on(rows.device))  # type: ignore[no-any-return,no-untyped-call]

    def _on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.order.to(device), self.queries.to(device), self.text.to(device)


@dataclass(frozen=True)
class Selection:
    """Some of N rows."""

    index: torch.Tensor
    """(n,): which rows, each at most once."""
    back: torch.Tensor
    """(N,): where each row is among the selected; n for the others, as in `Ragged.gradients`."""

    @classmethod
    def of(cls, index: np.ndarray, total: int, device: torch.device) -> Selection:
        """The selection of these of `total` rows."""
        back = np.full(total, len(index), dtype=np.int64)
        back[index] = np.arange(len(index))
        return cls(_tensor(index, device), _tensor(back, device))

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """(N, features) to (n, features)."""
        return _gather(rows, self.index, self.back, holes=True)


@dataclass(frozen=True)
class Layout:
    """All that a pass needs to know about the lengths of its samples, and the ids of their rows."""

    queries: Ragged
    instructions: QueriesWithText
    """Inputs of the Q-Former."""
    instruction_ids: torch.Tensor
    instruction_positions: torch.Tensor
    instruction_rows: Ragged
    text: QueriesWithText
    """Inputs of the language model, or of its encoder."""
    text_ids: torch.Tensor
    labels: Ragged
    """Label tokens."""
    label_ids: torch.Tensor
    label_firsts: torch.Tensor
    """(B,): the first label token of each sample."""
    predicts: Selection | None
    """The row of `text` that predicts each label token, where the language model is decoder-only."""

    @classmethod
    def of(
        cls,
        *,
        instructions: Padded,
        text: Padded,
        labels: Padded,
        queries: int,
        decoder_only: bool,
        device: torch.device,
        longest: tuple[int, int] | None = None,
    ) -> Layout:
        """The layout of padded samples, `queries` query tokens each.

        With `longest`, the (text, label) tokens that the longest sample is to have at least, what differs from batch
        to batch is in tensors alone, their shapes apart: what was recorded with one layout serves others.
        """
        (instruction_ids, instruction_mask), (text_ids, text_mask), (label_ids, label_mask) = (
            instructions,
            text,
            labels,
        )
        instruction_lengths, text_lengths, label_lengths = (
            mask.sum(1).tolist() for mask in (instruction_mask, text_mask, label_mask)
        )
        instruction_rows = Ragged.of(instruction_lengths, device)
        most_text, most_labels = longest or (0, 0)
        joined = QueriesWithText.of(Ragged.of(text_lengths, device), text_lengths, queries, device, most_text)
        predicts = None
        if decoder_only:
            # The state before a token predicts it, and before the first there are the queries.
            sample, place = np.nonzero(label_mask)
            predicting = np.array(joined.rows.starts, dtype=np.int64)[sample] + place + queries - 1
            predicts = Selection.of(predicting, joined.rows.starts[-1], device)
        label_rows = Ragged.of(label_lengths, device, most_labels)
        firsts = np.array(label_rows.starts[:-1], dtype=np.int64)
        if longest is not None:
            label_rows = label_rows.steady()
            if decoder_only:
                joined = replace(joined, rows=joined.rows.steady())
        return cls(
            queries=Ragged.of([queries] * len(label_ids), device),
            instructions=QueriesWithText.of(instruction_rows, instruction_lengths, queries, device),
            instruction_ids=_tensor(instruction_ids[instruction_mask], device),
            instruction_positions=_tensor(np.nonzero(instruction_mask)[1], device),
            instruction_rows=instruction_rows,
            text=joined,
            text_ids=_tensor(text_ids[text_mask], device),
            labels=label_rows,
            label_ids=_tensor(label_ids[label_mask], device),
            label_firsts=_tensor(firsts, device),
            predicts=predicts,
        )

    def to(self, device: torch.device) -> Layout:
        """The layout on the device."""
        here = self.label_ids.device
        if here == device:
            return self
        if here.type == "cpu":
            return in_one_copy(self, device)
        return _moved(self, iter([each.to(device) for each in _tensors(self)]))  # type: ignore[no-any-return]


def _tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)


def in_one_copy(layout: Layout, device: torch.device) -> Layout:
    """The layout on the device by one copy from pinned memory.

    Its two dozen small tensors, each copied by itself, would be as many launches, and the host would wait at each.
    """
    return views(layout, flat(layout, pin=device.type == "cuda").to(device, non_blocking=True))  # type: ignore[no-any-return]


def flat(layout: Any, *, pin: bool) -> torch.Tensor:
    """All tensors of a layout on the host, one after the other."""
    parts = _tensors(layout)
    whole = torch.empty(sum(part.numel() for part in parts), dtype=torch.long, pin_memory=pin)
    return torch.cat([part.reshape(-1) for part in parts], out=whole)


def views(layout: Any, whole: torch.Tensor) -> Any:
    """The layout with its tensors as views of a result of `flat`, elsewhere."""
    parts = _tensors(layout)
    there = whole.split([part.numel() for part in parts])
    return _moved(layout, iter([view.view(part.shape) for view, part in zip(there, parts, strict=True)]))


def shape_of(value: Any) -> Any:
    """Everything about a layout but the values in its tensors, hashable: where it is the same, a recording serves."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape)
    if is_dataclass(value):
        return tuple(shape_of(getattr(value, f.name)) for f in fields(value) if f.init)
    return value


def _tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in a layout, which are of whole numbers, in the order of the fields."""
    if isinstance(value, torch.Tensor):
        return [value]
    if is_dataclass(value):
        return [each for f in fields(value) if f.init for each in _tensors(getattr(value, f.name))]
    return []


def _moved(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same layout with these tensors, taken in the order of `_tensors`."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{f.name: _moved(getattr(value, f.name), tensors) for f in fields(value) if f.init})
    return value


_input_rows: ContextVar[Ragged] = ContextVar("rows of the inputs of adapted modules")
"""A context, not an argument: between the forward pass, which knows the rows, and the adapted linear modules, which
need them, is code of the library (`feed_forward_chunk` of the Q-Former, T5's and Llama's feed-forwards, the output
of an attention block), which calls them with one tensor. Its number of rows does not identify them: queries and text
may be equally many. Each thread has its own."""


@contextmanager
def input_rows(rows: Ragged) -> Iterator[None]:
    """Within, the matrices that adapted modules are called with have these rows."""
    token = _input_rows.set(rows)
    try:
        yield
    finally:
        _input_rows.reset(token)


def current_input_rows() -> Ragged:
    """The rows of a matrix that an adapted module is called with here."""
    rows = _input_rows.get(None)
    assert rows is not None, "a matrix of rows outside of `input_rows`"
    return rows


# PyTorch's index_select sums its gradient up row by row, since an index may name a row twice. The indices here name no
# row twice, or only where a gradient means nothing, so that forward and backward can both be gathers: where algorithms
# have to be deterministic, CUDA sorts the indices of a scatter.


class _Gather(torch.autograd.Function):
    """rows[index], and going back grad[back]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor, holes: bool) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.holes = holes
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (back,) = ctx.saved_tensors
        if ctx.holes:  # for rows that the index does not name, `back` names a row of zeros behind all others
            grad = torch.cat([grad, grad.new_zeros(1, grad.shape[1])])
        return grad.index_select(0, back), None, None, None


def _gather(rows: torch.Tensor, index: torch.Tensor, back: torch.Tensor, *, holes: bool) -> torch.Tensor:
    device = rows.device
    return _Gather.apply(rows, index.to(device), back.to(device), holes)  # type: ignore[no-any-return,no-untyped-call]


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, one: torch.Tensor, other: torch.Tensor, order: torch.Tensor, *indices: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(*indices)
        return torch.cat([one, other]).index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        needed, indices = ctx.needs_input_grad[:2], ctx.saved_tensors
        grads = [grad.index_select(0, index) if need else None for need, index in zip(needed, indices, strict=True)]
        return *grads, None, None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor, *indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(order)
        return tuple(rows.index_select(0, index) for index in indices)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (order,) = ctx.saved_tensors
        return torch.cat(grads).index_select(0, order), None, None, None
