"""InstructBLIP-FlanT5-XL with random weights and random pictures: `python -m tests.benchmarks.xl FOLDER`.

For a GPU machine that reaches no hub: what a step costs depends on shapes, not on what the weights know. The sizes
are those of Salesforce/instructblip-flan-t5-xl's config.json; tokenizers are the embedded model's, the captions as
long as RSICap's. Writes FOLDER/checkpoint (16 GB in float32) and FOLDER/data, then e.g.

    python -m tests.benchmarks.makespan --scale xl --model FOLDER/checkpoint --data FOLDER/data --trials 8
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BlipImageProcessorPil,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from trainer.data.dataset import DEFAULT_PROMPT
from trainer.mini import CHECKPOINT

PIXELS = 224
QUERIES = 32
VISION = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": PIXELS,
    "patch_size": 14,
    "initializer_range": 0.02,  # the library's 1e-10 makes a model that sees nothing
}
QFORMER = {
    "vocab_size": 30_523,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "encoder_hidden_size": 1408,
    "cross_attention_frequency": 2,
}
TEXT_WIDTH = 2048
TEXT = {
    "model_type": "t5",
    "vocab_size": 32_128,
    "d_model": TEXT_WIDTH,
    "d_kv": 64,
    "d_ff": 5120,
    "num_layers": 24,
    "num_heads": 32,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
CAPTION_TOKENS = (40, 120)
"""Shortest and longest; RSICap's have 60 tokens on average and 170 at most."""


def make(device: torch.device, layers: int | None = None, seed: int = 0) -> tuple[Any, Any]:
    """(model, processor); `layers` instead of each part's own number, to try it on a small machine."""
    processor = InstructBlipProcessor.from_pretrained(CHECKPOINT)
    processor.image_processor = BlipImageProcessorPil(size={"height": PIXELS, "width": PIXELS})
    processor.num_query_tokens = QUERIES
    fewer = {} if layers is None else {"num_hidden_layers": layers}
    config = InstructBlipConfig(
        vision_config={**VISION, **fewer},
        qformer_config={**QFORMER, **fewer},
        text_config={**TEXT, **({} if layers is None else {"num_layers": layers})},
        num_query_tokens=QUERIES,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(seed)
    with device:
        model = InstructBlipForConditionalGeneration(config)
        with torch.no_grad():
            model.query_tokens.normal_(std=0.02)
            # The library's std of 1 gives logits of some hundreds, and losses that no training can move.
            model.language_model.lm_head.weight.normal_(std=TEXT_WIDTH**-0.5)
    return model, processor


def build_checkpoint(out: Path, layers: int | None, seed: int = 0) -> None:
    """Write the checkpoint."""
    model, processor = make(torch.device("cuda" if torch.cuda.is_available() else "cpu"), layers, seed)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters in {out}")


def build_data(out: Path, images: int, seed: int = 0) -> None:
    """Write pictures of noise with captions of words that the tokenizer has, four to a scene."""
    out.mkdir(parents=True)
    rng, noise = random.Random(seed), np.random.default_rng(seed)
    vocabulary = InstructBlipProcessor.from_pretrained(CHECKPOINT).tokenizer.get_vocab()
    words = sorted(piece[1:] for piece in vocabulary if piece.startswith("▁") and piece[1:].isalpha())
    with (out / "metadata.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(images):
            name = f"{number:04d}.png"
            # Coarse noise, as pixels that are all independent average to grey in every patch.
            coarse = noise.integers(0, 256, (PIXELS // 16, PIXELS // 16, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(out / name)
            caption = " ".join(rng.choices(words, k=rng.randint(*CAPTION_TOKENS)))
            row = {"file_name": name, "prompt": DEFAULT_PROMPT, "text": caption, "scene": f"S{number // 4:03d}"}
            stream.write(json.dumps(row) + "\n")
    print(f"{images} images in {out}")


def main() -> None:
    """Write checkpoint and data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="must not hold them yet")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--layers", type=int, help="fewer layers in every part, to try it")
    options = parser.parse_args()
    build_data(options.folder / "data", options.images)
    build_checkpoint(options.folder / "checkpoint", options.layers)


if __name__ == "__main__":
    main()
