"""Q-Former, T5 and Llama on rows without padding (`trainer.model.ragged`): the library's modules, in its order.

It differs from the library's own forward in where attention finds its rows, and in two parts that are left out because
nothing reads them: the text positions of the Q-Former's last layer, and those positions of Llama's last layer that
predict no label. Modules are called, never their weights used, so that adapters and PEFT's replacements act. If the
base is spread over several devices (Accelerate splits no layer), tensors are moved at each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.checkpoint import checkpoint

from trainer.model.attention import attend, hidden
from trainer.model.ragged import Layout, Ragged, Selection, input_rows

BIAS_STEP = 64
"""Position biases are computed for lengths that are multiples of this."""


_again: ContextVar[bool] = ContextVar("whether layers of the language model are computed again", default=False)


@contextmanager
def layers_again(on: bool) -> Iterator[None]:
    """Within, the language model's layers keep their inputs alone, and are computed again in the backward pass.

    The same bits for a third more arithmetic (Chen et al. 2016, https://arxiv.org/abs/1604.06174). Only where no
    adapter is in the language model: its dropout would be drawn twice.
    """
    token = _again.set(on)
    try:
        yield
    finally:
        _again.reset(token)


def _layer(compute: Callable[..., torch.Tensor], *inputs: Any) -> torch.Tensor:
    """A layer's output; of its inputs the first is the states."""
    if _again.get() and torch.is_grad_enabled():
        return checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    return compute(*inputs)


def _on(weight: torch.Tensor, *tensors: Any) -> Any:
    """The tensors, moved to the device of a module's weight where they are elsewhere."""
    device = weight.device
    return [each if each is None or each.device == device else each.to(device) for each in tensors]


def query_images(model: Any, image_embeds: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The Q-Former's output at the query tokens, (B x Q, hidden), of (B, patches + 1, vision hidden size) images."""
    # Embeddings of query tokens and instruction.
    embeddings, layers = model.qformer.embeddings, model.qformer.encoder.layer
    text = embeddings.word_embeddings(layout.instruction_ids)
    text = text + embeddings.position_embeddings(layout.instruction_positions)
    queries = model.query_tokens.to(text).expand(layout.queries.samples, -1, -1).flatten(0, 1)
    dtype = embeddings.layernorm.weight.dtype
    queries, text = (embeddings.layernorm(each.to(dtype)) for each in (queries, text))
    # Layers: self-attention of both together, cross-attention of the queries to the image.
    joined, images = layout.instructions, Ragged.of([image_embeds.shape[1]] * layout.queries.samples, text.device)
    bias = hidden(joined.rows.seen(), dtype)
    for layer in layers:
        queries, text, image_embeds, bias = _on(layer.output_query.LayerNorm.weight, queries, text, image_embeds, bias)
        rows = joined.join(queries, text)
        if layer is layers[-1]:
            queries = _block(layer.attention, queries, layout.queries, rows, joined.rows, bias)
        else:
            rows = _block(layer.attention, rows, joined.rows, rows, joined.rows, bias)
            queries, text = joined.split(rows)
            with input_rows(layout.instruction_rows):
                text = layer.feed_forward_chunk(text)
        if layer.has_cross_attention:
            queries = _block(layer.crossattention, queries, layout.queries, image_embeds, images, None)
        with input_rows(layout.queries):
            queries = layer.feed_forward_chunk_query(queries)
    return queries  # type: ignore[no-any-return]


def _block(
    module: Any, states: torch.Tensor, rows: Ragged, memory: torch.Tensor, keys: Ragged, bias: torch.Tensor | None
) -> torch.Tensor:
    """An attention block of the Q-Former: the states attend to a memory, rows or (B, patches + 1, hidden) images."""
    inner = module.attention
    with input_rows(keys):
        key, value = (part(memory).view(keys.starts[-1], -1) for part in (inner.key, inner.value))
    size = inner.attention_head_size
    with input_rows(rows):
        query = inner.query(states)
        out = attend(query, key, value, size=size, rows=rows, keys=keys, scale=size**-0.5, bias=bias)
        return module.output(out, states)  # type: ignore[no-any-return]


def t5(language: Any, embeds: torch.Tensor, layout: Layout) -> torch.Tensor:
    """T5's decoder states at the label tokens, (N, hidden), its output scaling applied.

    Args:
        language: T5ForConditionalGeneration.
        embeds: inputs of the encoder, laid out as `layout.text`.
        layout: of the pass.
    """
    encoder, decoder = language.encoder, language.decoder
    states = _t5_stack(encoder, embeds, layout.text.rows)
    ids = _shifted(layout, language.config.decoder_start_token_id)
    states = _t5_stack(decoder, decoder.embed_tokens(ids), layout.labels, (states, layout.text.rows))
    if getattr(language.config, "scale_decoder_outputs", language.config.tie_word_embeddings):
        states = states * language.config.d_model**-0.5
    return states


def _shifted(layout: Layout, start: int) -> torch.Tensor:
    """The inputs from which T5's decoder predicts the labels: each sample's labels, moved on by one."""
    ids = layout.label_ids.roll(1)
    return ids.index_fill_(0, layout.label_firsts.to(ids.device), start)


def _t5_stack(
    stack: Any, states: torch.Tensor, rows: Ragged, encoded: tuple[torch.Tensor, Ragged] | None = None
) -> torch.Tensor:
    bias = _position_bias(stack, rows.length)
    # A decoder needs no mask for padding: it comes after everything that is read.
    seen = rows.seen() if encoded is None else None
    if seen is not None:
        # Not by `where`: it copies its number to a GPU and waits, which a recording cannot.
        bias = bias.expand(rows.samples, -1, -1, -1).masked_fill(~seen.to(bias.device), torch.finfo(bias.dtype).min)
    memory, memory_rows = encoded or (None, rows)
    memory_bias = hidden(memory_rows.seen(), states.dtype)
    for block in stack.block:
        states, memory, bias, memory_bias = _on(block.layer[0].layer_norm.weight, states, memory, bias, memory_bias)
        states = _layer(_t5_layer, states, block, rows, bias, memory, memory_rows, memory_bias)
    (states,) = _on(stack.final_layer_norm.weight, states)
    return stack.final_layer_norm(states)  # type: ignore[no-any-return]


def _t5_layer(
    states: torch.Tensor,
    block: Any,
    rows: Ragged,
    bias: torch.Tensor,
    memory: torch.Tensor | None,
    memory_rows: Ragged,
    memory_bias: torch.Tensor | None,
) -> torch.Tensor:
    layer = block.layer[0]
    states = _t5_block(layer, layer.SelfAttention, states, rows, None, rows, bias)
    if memory is not None:
        layer = block.layer[1]
        states = _t5_block(layer, layer.EncDecAttention, states, rows, memory, memory_rows, memory_bias)
    with input_rows(rows):
        return _clamped(block.layer[-1](states))


_position_biases: WeakKeyDictionary[torch.nn.Module, torch.Tensor] = WeakKeyDictionary()


def position_biases() -> list[torch.Tensor]:
    """The position biases that are kept now; a longer batch replaces a stack's, and a recording must keep its own."""
    return list(_position_biases.values())


@torch.no_grad()
def _position_bias(stack: Any, length: int) -> torch.Tensor:
    """(1, heads, length, length), causal in a decoder. Only distances count: a longer one has the shorter in it."""
    kept = _position_biases.get(stack)
    first = stack.block[0].layer[0].SelfAttention
    weight = first.relative_attention_bias.weight
    if kept is None or kept.shape[2] < length or (kept.device, kept.dtype) != (weight.device, weight.dtype):
        longest = -(-length // BIAS_STEP) * BIAS_STEP
        kept = first.compute_bias(longest, longest)
        if stack.is_decoder:
            later = torch.ones(longest, longest, dtype=torch.bool, device=kept.device).triu_(1)
            kept = kept.masked_fill(later, torch.finfo(kept.dtype).min)
        _position_biases[stack] = kept
    return kept[:, :, :length, :length]


def _t5_block(
    layer: Any,
    inner: Any,
    states: torch.Tensor,
    rows: Ragged,
    memory: torch.Tensor | None,
    keys: Ragged,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """An attention block of T5: the states attend to a memory, or to themselves."""
    normed = layer.layer_norm(states)
    with input_rows(keys):
        seen = normed if memory is None else memory
        key, value = inner.k(seen), inner.v(seen)
    with input_rows(rows):
        # T5 does not scale: its initial values do.
        size = inner.key_value_proj_dim
        out = attend(inner.q(normed), key, value, size=size, rows=rows, keys=keys, scale=1.0, bias=bias)
        return _clamped(states + inner.o(out))


def _clamped(states: torch.Tensor) -> torch.Tensor:
    """The states clamped as T5 does it in float16, where they may overflow."""
    if states.dtype != torch.float16:
        return states
    most = torch.finfo(states.dtype).max
    # Row by row, not for the whole batch as in the library: runs have to be independent.
    limit = torch.where(torch.isinf(states).any(-1, keepdim=True), most - 1000, most).to(states.dtype)
    return torch.clamp(states, min=-limit, max=limit)


def llama(language: Any, embeds: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Llama's states that predict the label tokens, (N, hidden).

    Args:
        language: LlamaForCausalLM.
        embeds: laid out as `layout.text`.
        layout: of the pass.
    """
    model, rows = language.model, layout.text.rows
    assert layout.predicts is not None
    # Each sample's positions count from 0.
    order = torch.arange(rows.length, device=embeds.device)
    positions = rows.unpad(order.repeat(rows.samples).view(rows.samples, -1, 1))
    rotary = tuple(each[0, :, None] for each in model.rotary_emb(embeds, position_ids=positions.view(1, -1)))
    bias = hidden(order <= order[:, None], embeds.dtype)
    states = embeds
    for layer in model.layers[:-1]:
        states = _layer(_llama_layer, states, layer, rows, rotary, bias)
    places = layout.labels.pad(layout.predicts.take(positions))
    bias = hidden((order <= places)[:, None], embeds.dtype)
    states = _layer(_llama_layer, states, model.layers[-1], rows, rotary, bias, (layout.predicts, layout.labels))
    (states,) = _on(model.norm.weight, states)
    return model.norm(states)  # type: ignore[no-any-return]


def _llama_layer(
    states: torch.Tensor,
    layer: Any,
    rows: Ragged,
    rotary: tuple[torch.Tensor, ...],
    bias: torch.Tensor | None,
    read: tuple[Selection, Ragged] | None = None,
) -> torch.Tensor:
    """A layer of Llama, at all rows or only at those that are read."""
    states, cos, sin, bias = _on(layer.input_layernorm.weight, states, *rotary, bias)
    inner = layer.self_attn
    with input_rows(rows):
        normed = layer.input_layernorm(states)
        key, value = _rotated(inner.k_proj(normed), cos, sin), inner.v_proj(normed)
    own = rows
    if read is not None:
        chosen, own = read
        index = chosen.index.to(cos.device)
        states, normed, cos, sin = chosen.take(states), chosen.take(normed), cos[index], sin[index]
    with input_rows(own):
        query = _rotated(inner.q_proj(normed), cos, sin)
        out = attend(query, key, value, size=inner.head_dim, rows=own, keys=rows, scale=inner.scaling, bias=bias)
        states = states + inner.o_proj(out)
        return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (N, heads x size) rows; cosines and sines are (N, 1, size)."""
    apart = states.unflatten(1, (-1, cos.shape[-1]))
    one, other = apart.chunk(2, dim=-1)
    rotated: torch.Tensor = apart * cos + torch.cat([-other, one], dim=-1) * sin
    return rotated.flatten(1)
