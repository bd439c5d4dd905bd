"""What a frozen base is changed to after loading: the same function, to rounding, in fewer operations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from trainer.activation import TanhGELU
from trainer.norm import RMSNorm


def fuse(model: Any) -> None:
    """Replace what Transformers writes out in many operations, and leave out what nobody reads.

    The tanh GELU of FlanT5's feed-forward, see `trainer.activation`; in training it keeps two tensors instead of six.
    The norms of T5 and Llama, see `trainer.norm`. Text positions of the Q-Former's last layer. Norms and the layer are
    left as they are where Accelerate has hooked into them.
    """
    from transformers.activations import NewGELUActivation
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, TanhGELU())
            elif isinstance(child, T5LayerNorm | LlamaRMSNorm) and not hasattr(child, "_hf_hook"):
                setattr(module, name, RMSNorm(child))
    last = model.qformer.encoder.layer[-1]
    # Other kinds of attention have masks of other shapes.
    if not hasattr(last, "_hf_hook") and model.qformer.config._attn_implementation in ("sdpa", "eager"):
        last.forward = partial(_query_positions, last)


def _query_positions(
    layer: Any,
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    encoder_hidden_states: torch.Tensor | None = None,
    encoder_attention_mask: torch.Tensor | None = None,
    query_length: int = 0,
    **kwargs: Any,
) -> torch.Tensor:
    """A Q-Former layer's output at the query tokens, (B, Q, hidden): from its last layer nothing else is read.

    Text is attended to, and not carried further: in the language model, it comes in anew. Of the layer's work in the
    embedded model that is two fifths.
    """
    queries = hidden_states[:, :query_length]
    own_rows = attention_mask if attention_mask is None else attention_mask[..., :query_length, :]
    # The library's cross-attention, of the queries to all positions, themselves among them.
    attended, _ = layer.attention.attention(
        queries, encoder_hidden_states=hidden_states, encoder_attention_mask=own_rows, **kwargs
    )
    output = layer.attention.output(attended, queries)
    if layer.has_cross_attention:
        output = layer.crossattention(
            output,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )
    return layer.feed_forward_chunk_query(output)  # type: ignore[no-any-return]
