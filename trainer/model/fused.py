"""What a frozen base is changed to after loading: the same function, to rounding, in fewer operations."""

from __future__ import annotations

from typing import Any

from trainer.model.activation import TanhGELU
from trainer.model.norm import RMSNorm


def fuse(model: Any) -> None:
    """Replace what Transformers writes out in many operations.

    The tanh GELU of FlanT5's feed-forward, see activation.py; in training it keeps two tensors instead of six.
    The norms of T5 and Llama, see `trainer.model.norm`; left as they are where Accelerate has hooked into them.
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
