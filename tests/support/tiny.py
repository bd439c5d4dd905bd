"""Tiny randomly initialised InstructBLIPs, T5 and Llama, that are not blind, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    T5Config,
)

from trainer.model.batch import IGNORE, Batch

QUERIES = 4
VOCABULARY = 97
IMAGE_TOKEN = 96


def tiny_model(kind: str, dtype: torch.dtype = torch.float32, cross_attention_frequency: int = 2) -> Any:
    """An InstructBLIP of some ten thousand parameters; its language model is `t5`, `llama` or, with grouped queries,
    `llama-gqa`."""
    torch.manual_seed(0)
    if kind == "t5":
        text: Any = T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
        )
    else:
        text = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2 if kind == "llama-gqa" else 4,
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=1,
        )
    config = InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            initializer_range=0.02,
        ).to_dict(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            encoder_hidden_size=24,
            max_position_embeddings=40,
            cross_attention_frequency=cross_attention_frequency,
        ).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_TOKEN,
    )
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vision_model", "query_tokens")):
                parameter.normal_(std=0.3)
    model.requires_grad_(False)
    return model.to(dtype).eval()


def tiny_batch(kind: str, size: int = 3, seed: int = 1) -> Batch:
    """A batch of captions of different lengths for `tiny_model(kind)`."""
    g = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 90, (n,), generator=g) for n in torch.randint(2, 6, (size,), generator=g).tolist()]
    targets = [torch.randint(3, 90, (n,), generator=g) for n in torch.randint(3, 9, (size,), generator=g).tolist()]

    def pad(parts: list[torch.Tensor], value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    if kind == "t5":
        texts, labels = prompts, targets
    else:
        texts = [torch.cat([p, t]) for p, t in zip(prompts, targets, strict=True)]
        labels = [torch.cat([torch.full_like(p, IGNORE), t]) for p, t in zip(prompts, targets, strict=True)]
    instructions = [p % 50 for p in prompts]
    return Batch(
        pixel_values=torch.randn(size, 3, 16, 16, generator=g),
        qformer_ids=pad(instructions, 0),
        qformer_mask=pad([torch.ones_like(p) for p in instructions], 0),
        text_ids=pad(texts, 0),
        text_mask=pad([torch.ones_like(t) for t in texts], 0),
        labels=pad(labels, IGNORE),
    )
