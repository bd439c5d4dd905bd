"""Q-Former, T5 and Llama on rows without padding (`trainer.rows`): the library's modules, in its order.

What differs from the library's own forward is where attention finds its rows, and what is left out because nobody
reads it: the text positions of the Q-Former's last layer, and those positions of Llama's last layer that predict no
label. Modules are called, never their weights used, so that adapters and PEFT's replacements act. Of a base that is
spread over several devices (Accelerate splits no layer), what flows is moved at each layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from trainer.rows import Layout, Rows, laid_out, take


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: int,
    rows: Rows,
    scale: float,
    mask: torch.Tensor | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Scaled dot-product attention of N rows: (N, features).

    Args:
        query: (N, features), as `rows` lie.
        key: (B, keys, features of the key heads), padded; fewer heads than queries have are used by several.
        value: likewise.
        heads: of the queries.
        mask: broadcast to (B, heads, L, keys): true where attended, or what is added.
        causal: keys after the query are not attended to, instead of a mask.
    """
    padded = rows.pad(query).unflatten(2, (heads, -1)).transpose(1, 2)
    key, value = (each.unflatten(2, (-1, padded.shape[3])).transpose(1, 2) for each in (key, value))
    out = F.scaled_dot_product_attention(
        padded, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=key.shape[1] != heads
    )
    return rows.unpad(out.transpose(1, 2).flatten(2))


def _on(module: torch.nn.Module, *tensors: Any) -> Any:
    """The tensors on the device that the module is on."""
    device = next(module.parameters()).device
    return [each.to(device) if isinstance(each, torch.Tensor) else each for each in tensors]


def query_images(model: Any, image_embeds: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The Q-Former's output at the query tokens of (B, patches + 1, hidden) images: (B x Q, Q-Former's hidden size)."""
    embeddings, layers = model.qformer.embeddings, model.qformer.encoder.layer
    text = embeddings.word_embeddings(layout.instruction_ids)
    text = text + embeddings.position_embeddings(layout.instruction_positions)
    queries = model.query_tokens.to(text).expand(layout.queries.samples, -1, -1).flatten(0, 1)
    dtype = embeddings.layernorm.weight.dtype
    queries, text = (embeddings.layernorm(each.to(dtype)) for each in (queries, text))
    joined = layout.instructions
    mask = joined.rows.keys()
    for layer in layers:
        queries, text, image_embeds, mask = _on(layer, queries, text, image_embeds, mask)
        attention = layer.attention
        rows = joined.join(queries, text)
        with laid_out(joined.rows):
            key, value = (joined.rows.pad(part(rows)) for part in (attention.attention.key, attention.attention.value))
        last = layer is layers[-1]
        own, own_rows = (queries, layout.queries) if last else (rows, joined.rows)
        with laid_out(own_rows):
            own = _attention(attention, own, key, value, own_rows, mask)
        if not last:
            queries, text = take(own, joined.queries), take(own, joined.text)
            with laid_out(layout.instruction_rows):
                text = layer.feed_forward_chunk(text)
        else:
            queries = own
        with laid_out(layout.queries):
            if layer.has_cross_attention:
                cross = layer.crossattention.attention
                key, value = cross.key(image_embeds), cross.value(image_embeds)
                queries = _attention(layer.crossattention, queries, key, value, layout.queries, None)
            queries = layer.feed_forward_chunk_query(queries)
    return queries


def _attention(
    module: Any, rows: torch.Tensor, key: torch.Tensor, value: torch.Tensor, of: Rows, mask: torch.Tensor | None
) -> torch.Tensor:
    """An attention block of the Q-Former, its keys and values known."""
    inner = module.attention
    out = attend(
        inner.query(rows),
        key,
        value,
        heads=inner.num_attention_heads,
        rows=of,
        scale=inner.attention_head_size**-0.5,
        mask=mask,
    )
    return module.output(out, rows)  # type: ignore[no-any-return]


def t5(language: Any, embeds: torch.Tensor, layout: Layout) -> torch.Tensor:
    """T5's decoder states at the label tokens, (N, hidden), its output scaling applied.

    Args:
        language: T5ForConditionalGeneration.
        embeds: what the encoder sees, as `layout.text` lies.
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
    """What T5's decoder is given to predict the labels: each sample's, moved on by one."""
    ids = layout.label_ids.roll(1)
    firsts = torch.tensor(layout.labels.starts[:-1]).to(ids.device, non_blocking=True)
    return ids.index_fill_(0, firsts, start)


def _t5_stack(
    stack: Any, states: torch.Tensor, rows: Rows, encoded: tuple[torch.Tensor, Rows] | None = None
) -> torch.Tensor:
    first = stack.block[0].layer[0].SelfAttention
    bias = first.compute_bias(rows.length, rows.length).to(states.dtype)
    lowest = torch.finfo(bias.dtype).min
    # Of padding, a decoder sees nothing anyway: it comes after what is read.
    visible = rows.keys() if encoded is None else torch.ones_like(bias[:1, :1], dtype=torch.bool).tril_()
    bias = bias if visible is None else torch.where(visible.to(bias.device), bias, lowest)
    cross_mask = None
    memory, memory_rows = encoded or (states, rows)
    if encoded is not None:
        cross_mask = memory_rows.keys()
    for block in stack.block:
        states, memory, bias, cross_mask = _on(block, states, memory, bias, cross_mask)
        with laid_out(rows):
            states = _clamped(_t5_attention(block.layer[0], "SelfAttention", states, None, rows, rows, bias))
        if encoded is not None:
            layer = block.layer[1]
            states = _clamped(_t5_attention(layer, "EncDecAttention", states, memory, rows, memory_rows, cross_mask))
        with laid_out(rows):
            states = _clamped(block.layer[-1](states))
    (states,) = _on(stack.final_layer_norm, states)
    return stack.final_layer_norm(states)  # type: ignore[no-any-return]


def _t5_attention(
    layer: Any,
    kind: str,
    states: torch.Tensor,
    memory: torch.Tensor | None,
    rows: Rows,
    memory_rows: Rows,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    inner = getattr(layer, kind)
    normed = layer.layer_norm(states)
    with laid_out(memory_rows):
        seen = normed if memory is None else memory
        key, value = memory_rows.pad(inner.k(seen)), memory_rows.pad(inner.v(seen))
    with laid_out(rows):
        # T5 does not scale: its initial values do.
        out = attend(inner.q(normed), key, value, heads=inner.n_heads, rows=rows, scale=1.0, mask=mask)
        return states + inner.o(out)  # type: ignore[no-any-return]


def _clamped(states: torch.Tensor) -> torch.Tensor:
    """As T5 has it in float16, whose overflow it would otherwise carry on; the library's own arithmetic."""
    if states.dtype != torch.float16:
        return states
    most = torch.finfo(states.dtype).max
    limit = torch.where(torch.isinf(states).any(), most - 1000, most)
    return torch.clamp(states, min=-limit, max=limit)


def llama(language: Any, embeds: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Llama's states that predict the label tokens, (N, hidden).

    Args:
        language: LlamaForCausalLM.
        embeds: as `layout.text` lies.
        layout: of the pass.
    """
    model, rows = language.model, layout.text.rows
    assert layout.predicts is not None
    # Positions of a sample count from 0: rows that are padded to the right have those of the places.
    positions = torch.arange(rows.length, device=embeds.device).repeat(rows.samples)
    positions = positions if rows.slots is None else positions.index_select(0, rows.slots)
    cos, sin = (each[0, :, None] for each in model.rotary_emb(embeds, position_ids=positions[None]))
    states = embeds
    for layer in model.layers[:-1]:
        states, cos, sin = _on(layer, states, cos, sin)
        with laid_out(rows):
            key, value, normed = _llama_keys(layer, states, rows, cos, sin)
            query = _rotated(layer.self_attn.q_proj(normed), cos, sin)
            states = _llama_rest(layer, states, query, key, value, rows, None)
    layer = model.layers[-1]
    states, cos, sin, predicts = _on(layer, states, cos, sin, layout.predicts)
    with laid_out(rows):
        key, value, normed = _llama_keys(layer, states, rows, cos, sin)
    with laid_out(layout.labels):
        states, normed, cos, sin = take(states, predicts), take(normed, predicts), cos[predicts], sin[predicts]
        query = _rotated(layer.self_attn.q_proj(normed), cos, sin)
        places = layout.labels.pad(positions.to(predicts.device)[predicts][:, None])
        mask = torch.arange(rows.length, device=places.device) <= places  # (B, labels, keys)
        states = _llama_rest(layer, states, query, key, value, layout.labels, mask[:, None])
        (states,) = _on(model.norm, states)
        return model.norm(states)  # type: ignore[no-any-return]


def _llama_keys(
    layer: Any, states: torch.Tensor, rows: Rows, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(keys, values) padded, and the normed states that they are of."""
    inner = layer.self_attn
    normed = layer.input_layernorm(states)
    return rows.pad(_rotated(inner.k_proj(normed), cos, sin)), rows.pad(inner.v_proj(normed)), normed


def _llama_rest(
    layer: Any,
    states: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: Rows,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    inner = layer.self_attn
    heads, causal = query.shape[1] // inner.head_dim, mask is None
    out = attend(query, key, value, heads=heads, rows=rows, scale=inner.scaling, mask=mask, causal=causal)
    states = states + inner.o_proj(out)
    return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


def _rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (N, heads x size) rows; cosines and sines are (N, 1, size)."""
    apart = states.unflatten(1, (-1, cos.shape[-1]))
    one, other = apart.chunk(2, dim=-1)
    return (apart * cos + torch.cat([-other, one], dim=-1) * sin).flatten(1)
