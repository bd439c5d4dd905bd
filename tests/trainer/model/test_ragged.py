"""Rows without padding: their layout, attention between them, and the library's forward in their place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import peft_reference
from tests.support.tiny import QUERIES, tiny_batch, tiny_model
from tests.trainer.model.test_base import KINDS, library_forward
from trainer.config import TrainConfig
from trainer.loop import Pack
from trainer.model import attention, base
from trainer.model import forward as forwards
from trainer.model.attention import attend, hidden
from trainer.model.base import forward
from trainer.model.batch import IGNORE, layout_of
from trainer.model.lora import Adapter
from trainer.model.ragged import (
    QueriesWithText,
    Ragged,
    Selection,
    _tensors,
    current_input_rows,
    in_one_copy,
    input_rows,
)
from trainer.workbench import Workbench

CPU = torch.device("cpu")
lengths_of = st.lists(st.integers(1, 7), min_size=1, max_size=5)


@settings(deadline=None)
@given(lengths_of, st.integers(1, 3))
def test_rows_come_back_as_they_were(lengths: list[int], heads: int) -> None:
    rows = Ragged.of(lengths, CPU)
    x = torch.randn(sum(lengths), heads * 2)
    padded = rows.pad(x)
    assert padded.shape == (len(lengths), max(lengths), heads * 2)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    for sample, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        own = x[start : start + length]
        assert torch.equal(padded[sample, :length], own)
        # Padding holds something of its own sample: what is not finite stays there.
        assert all(any(torch.equal(place, row) for row in own) for place in padded[sample, length:])
    assert torch.equal(rows.unpad(padded), x)
    by_head = padded.unflatten(2, (heads, 2)).transpose(1, 2)
    assert torch.equal(rows.apart(x, heads).view(by_head.shape), by_head)
    assert torch.equal(rows.together(rows.apart(x, heads), heads), x)
    zeros = rows.apart(x, heads, zeros=True).view(by_head.shape)
    assert torch.equal(rows.together(zeros, heads), x)
    assert zeros.count_nonzero() == x.count_nonzero()
    seen = rows.seen()
    assert seen is None if min(lengths) == max(lengths) else seen is not None and int(seen.sum()) == sum(lengths)


@settings(deadline=None)
@given(lengths_of, st.integers(1, 3))
def test_queries_come_before_their_samples_text(lengths: list[int], queries: int) -> None:
    joined = QueriesWithText.of(Ragged.of(lengths, CPU), lengths, queries, CPU)
    text = torch.arange(float(sum(lengths)))[:, None]
    own = -1 - torch.arange(float(queries * len(lengths)))[:, None]
    rows = joined.join(own, text)[:, 0].tolist()
    expected: list[float] = []
    for sample, length in enumerate(lengths):
        expected += [-1.0 - (sample * queries + query) for query in range(queries)]
        expected += [float(sum(lengths[:sample]) + place) for place in range(length)]
    assert rows == expected
    whole = joined.join(own, text)
    assert all(map(torch.equal, joined.split(whole), (own, text)))


def test_derivatives() -> None:
    """Gathers and scatters have the right derivatives, in which padding has no part."""
    rows = Ragged.of([2, 4, 1], CPU)
    joined = QueriesWithText.of(rows, [2, 4, 1], 2, CPU)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    seen = rows.seen()
    assert seen is not None
    mask = seen.view(3, 4, 1)
    assert torch.autograd.gradcheck(lambda x: rows.unpad((rows.pad(x) * mask).cumsum(1)), x)
    assert torch.autograd.gradcheck(lambda q, x: joined.join(q, x) ** 2, (queries, x))
    chosen = Selection.of(np.array([5, 0, 6]), 7, CPU)
    assert torch.equal(chosen.take(x), x[[5, 0, 6]])
    assert torch.autograd.gradcheck(lambda x: chosen.take(x) ** 2, x)
    assert torch.autograd.gradcheck(lambda q, x: joined.split(joined.join(q, x) ** 2), (queries, x))
    assert torch.autograd.gradcheck(lambda q, x: joined.split(joined.join(q, x) ** 2)[1], (queries, x))


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [(3, 5, 2), (4, 4, 4)])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_attention_written_out_equals_pytorchs(
    heads: int, key_heads: int, lengths: tuple[int, ...], own: bool, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 5
    rows = Ragged.of(lengths, CPU)
    keys = rows if own else Ragged.of((6, 1, 4), CPU)
    torch.manual_seed(1)
    inputs = [
        torch.randn(of.starts[-1], n * size, dtype=torch.float64, requires_grad=True)
        for of, n in ((rows, heads), (keys, key_heads), (keys, key_heads))
    ]
    bias = torch.randn(1, heads, rows.length, keys.length, dtype=torch.float64)
    padding = hidden(keys.seen(), torch.float64)
    bias = bias if padding is None else bias + padding
    above = torch.randn(rows.starts[-1], heads * size, dtype=torch.float64)
    found = []
    for dense in (attention.DENSE, 0):
        monkeypatch.setattr(attention, "DENSE", dense)
        out = attend(*inputs, size=size, rows=rows, keys=keys, scale=scale, bias=bias)
        assert ("_Dense" in type(out.grad_fn).__name__) == bool(dense)
        found.append((out, *torch.autograd.grad(out, inputs, above)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_where_labels_are_predicted(kind: str) -> None:
    model_, batch = tiny_model(kind), tiny_batch(kind)
    layout = layout_of(model_.config, batch)
    assert torch.equal(layout.label_ids, batch.labels[batch.labels != IGNORE])
    assert torch.equal(layout.text_ids, batch.text_ids[batch.text_mask.bool()])
    if kind == "t5":
        assert layout.predicts is None
        return
    places = torch.full((len(batch), QUERIES + batch.text_ids.shape[1]), -1)
    at = 0
    for sample, length in enumerate(batch.text_mask.sum(1).tolist()):
        places[sample, : QUERIES + length] = torch.arange(at, at + QUERIES + length)
        at += QUERIES + length
    assert layout.predicts is not None
    assert torch.equal(layout.predicts.index, places[:, QUERIES - 1 : -1][batch.labels != IGNORE])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 3])
def test_other_language_models_go_through_the_librarys_forward(
    kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_, batch = tiny_model(kind), tiny_batch(kind, size)
    ours = forward(model_, batch).token_losses
    monkeypatch.setattr(base, "FORWARDS", {})
    assert not base.runs_on_rows(model_.config)
    padded = forward(model_, batch).token_losses
    torch.testing.assert_close(padded, ours, rtol=1e-5, atol=1e-6)
    expected = library_forward(model_, batch, kind).loss
    torch.testing.assert_close(padded.mean(), expected, rtol=1e-5, atol=1e-6)


def test_they_train_one_run_in_a_pass(
    small: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in (True, False):
        if not known:
            monkeypatch.setattr(base, "FORWARDS", {})
        with Pack(Workbench()) as pack:
            pack.add(small(), tmp_path / str(known))
            assert pack.passes.at_once == (None if known else 1)


def test_float16_is_kept_from_overflow_as_t5_does_it() -> None:
    """As in T5Block: what overflows becomes 1,000 less than the largest number, to float16's precision."""
    inf = float("inf")
    half = torch.tensor([[inf, -inf, 65_504, 5.0], [65_504, 0.0, 0.0, 0.0]], dtype=torch.float16)
    assert forwards._clamped(half).tolist() == [[64_512, -64_512, 64_512, 5.0], [65_504, 0.0, 0.0, 0.0]]
    assert forwards._clamped(half.float()).tolist()[0] == [inf, -inf, 65_504, 5.0]
    model_, batch = tiny_model("t5", torch.float16), tiny_batch("t5")
    assert batch.pixel_values is not None
    batch.pixel_values = batch.pixel_values.half()
    ours = forward(model_, batch).token_losses.mean()
    torch.testing.assert_close(ours, library_forward(model_, batch, "t5").loss.float(), rtol=5e-3, atol=0)


@pytest.mark.parametrize("targets", [("query", "key", "value", "dense"), ("q", "v", "fc1"), ("lm_head",)])
def test_initial_values_are_pefts(targets: tuple[str, ...]) -> None:
    model_: Any = tiny_model("t5")
    config = TrainConfig(target_modules=targets, lora_r=3, seed=11)
    before = dict(model_.named_modules())
    adapter = Adapter(model_, config)
    assert dict(model_.named_modules()) == before
    with peft_reference.attached(model_, config) as (peft_model, modules):
        assert adapter.modules == modules
        expected = peft_reference.parameters(peft_model)
        found = adapter.named()
        assert list(found) == list(expected)
        for name, parameter in expected.items():
            assert torch.equal(found[name].weight, parameter)
        assert any(parameter.any() for parameter in expected.values())


def test_a_matrix_outside_is_a_fault() -> None:
    rows = Ragged.of([1, 2], CPU)
    with input_rows(rows):
        assert current_input_rows() is rows
    with pytest.raises(AssertionError, match="outside"):
        current_input_rows()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_moves_by_one_copy(kind: str) -> None:
    """As to a GPU: every tensor is a part of one."""
    layout = layout_of(tiny_model(kind).config, tiny_batch(kind))
    moved = in_one_copy(layout, CPU)
    before, after = _tensors(layout), _tensors(moved)
    assert len(before) == len(after) > 15
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.long for a, b in zip(before, after, strict=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in after}) == 1
    assert moved.text.rows.starts == layout.text.rows.starts and moved.queries.length == layout.queries.length
    model = tiny_model(kind)
    batch = tiny_batch(kind)
    expected = forward(model, batch).token_losses
    batch.layout = moved
    assert torch.equal(forward(model, batch).token_losses, expected)
