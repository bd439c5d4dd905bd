"""Tiny InstructBLIPs on disk in the forms in which checkpoints come: shards, float16, old configs, a cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig, T5Config

from trainer.mini import CHECKPOINT

KINDS = ("t5", "t5-untied", "llama", "llama-gqa")
"""Language models: FlanT5's like `t5-untied` (its head is a weight of its own), Vicuna's like `llama`."""
VOCABULARY = 352
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write(folder: Path, kind: str = "t5", *, dtype: torch.dtype = torch.float32, shards: int = 1) -> Path:
    """A checkpoint of random weights, not blind and without dropout, with the embedded model's tokenizers."""
    text: Any
    if kind.startswith("t5"):
        text = T5Config(
            vocab_size=VOCABULARY,
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            decoder_start_token_id=0,
            tie_word_embeddings=kind == "t5",  # whether outputs are scaled: Transformers 5 ties all T5s made anew
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
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    qformer = InstructBlipConfig.from_pretrained(CHECKPOINT).qformer_config.to_dict()
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = InstructBlipConfig(
        vision_config={**small, "num_hidden_layers": 1, "image_size": 64, "patch_size": 16, "initializer_range": 0.1},
        qformer_config={**qformer, **small, **no_dropout, "encoder_hidden_size": 32},
        text_config=text.to_dict(),
        num_query_tokens=12,
        image_token_index=344,
    )
    torch.manual_seed(0)
    model: Any = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vision_model", "query_tokens", "qformer", "language_projection")):
                parameter.normal_(std=0.2)
        if kind == "t5-untied":
            model.language_model.lm_head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 32) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size="1GB" if shards == 1 else "120KB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards > 1)
    if kind == "t5-untied":  # as in FlanT5's config.json
        edit_json(folder / "config.json", lambda saved: saved["text_config"].update(tie_word_embeddings=False))
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "qformer_tokenizer"):
        source = CHECKPOINT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    return folder


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    """The checkpoint with other tensors in its one file."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


def edit_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A JSON file, changed in place by a function."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def in_cache(checkpoint: Path, cache: Path, name: str, *, ref: bool = True) -> Path:
    """The checkpoint as the hub's cache holds it: blobs, and a snapshot of links to them; returns the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(each for each in checkpoint.rglob("*") if each.is_file())):
        link = snapshot / file.relative_to(checkpoint)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / f"{number:040x}"
        shutil.copy(file, blob)
        link.symlink_to(blob)
    if ref:
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return snapshot
