"""The frozen base: loading an InstructBLIP, and its forward pass, written out.

The pass is vision_model -> qformer (which sees the instruction) -> language_projection -> language_model. Written out,
it lets a run look at the query output, keep the vision output, and compute logits at label positions only. It equals
the library's forward on the same batch (tests/trainer/model/test_base.py, for T5 and Llama).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from trainer.common.errors import ModelError
from trainer.model import files, tokens, weights
from trainer.model.batch import Batch, layout_of
from trainer.model.forward import llama, query_images, t5
from trainer.model.fused import fuse
from trainer.model.locate import fetch
from trainer.model.ragged import Layout, input_rows

FORWARDS = {"t5": t5, "llama": llama}
"""Language models whose arithmetic is written out on rows without padding; others go through the library's forward."""

SAMPLE_BLOCKS, SAMPLE_BYTES = 64, 65_536
"""A weight file's fingerprint reads this many blocks of this size: 4 MiB instead of 16 GB."""


@dataclass
class Base:
    """A frozen InstructBLIP with its processor, loaded once and shared by all runs of a process."""

    model: Any
    """InstructBlipForConditionalGeneration, without gradients."""
    processor: Any
    name: str
    dtype: torch.dtype
    device: torch.device
    """Where inputs and adapters are, and the whole base, unless it is spread over several devices."""
    fingerprint: str

    @property
    def num_query_tokens(self) -> int:
        """Number of query tokens, which is also that of image positions before the text."""
        return int(self.model.config.num_query_tokens)


@dataclass
class Forward:
    """The results of one forward pass, still on the device."""

    token_losses: torch.Tensor
    """(N,), cross entropy of the N label tokens, float32, sample by sample."""
    query_output: torch.Tensor
    """(B, Q, Q-Former's hidden size)."""

    @property
    def loss_sum(self) -> torch.Tensor:
        """The sum of the losses of all label tokens, scalar."""
        return self.token_losses.sum()


def load_base(
    name: str, *, dtype: torch.dtype, device: torch.device, spread: bool = False, fused: bool = True
) -> Base:
    """Load an InstructBLIP checkpoint (folder, hub id or `mini`) frozen onto the device.

    With `spread`, Accelerate spreads it over all CUDA devices that the process sees, and moves tensors from layer
    to layer; on a CPU or a single GPU, the whole base is there. Without `fused` every module is the library's own, so
    that what it computes is to the last bit what Transformers computes.

    Config, processor, tokenizers and weights are all read from one folder. Only safetensors are read, never pickle,
    and no code that comes with the checkpoint is run.

    Raises:
        ModelError: no such checkpoint, one of another architecture, without safetensors, with weights that are not the
            model's, or with tokenizers that do not fit.
    """
    from transformers import InstructBlipForConditionalGeneration

    # Load processor and model.
    folder = fetch(name)
    config, processor = open_processor(name, folder)
    tokens.check(name, processor, config)
    placement: dict[str, Any] = {}
    if spread:
        several = device.type == "cuda" and torch.cuda.device_count() > 1
        placement["device_map"] = "auto" if several else {"": device}
    try:
        model, info = InstructBlipForConditionalGeneration.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported by `check_loaded`, all at once
            **placement,
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"the model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    weights.check_loaded(name, model, info, files.shapes(folder), untied=files.has_own_head(folder))
    # Freeze it, and put it on its device.
    model.requires_grad_(False)
    if fused:
        fuse(model)
    if spread:
        _refuse_offloaded(name, model, device)
        device = next(model.qformer.parameters()).device
    else:
        model.to(device)
    return Base(model.eval(), processor, name, dtype, device, fingerprint(folder))


def open_processor(name: str, folder: Path) -> tuple[Any, Any]:
    """(config, processor) of a checkpoint's folder.

    Raises:
        ModelError: they cannot be read, or differ in the number of query tokens.
    """
    from transformers import InstructBlipConfig, InstructBlipProcessor
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        config = InstructBlipConfig.from_pretrained(folder, local_files_only=True)
        processor = InstructBlipProcessor.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever the library's own readers of JSON and vocabularies raise
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(f"the model {name!r} cannot be loaded: {type(error).__name__}: {reason}") from error
    if processor.num_query_tokens not in (None, config.num_query_tokens):
        # Image positions that don't match the query tokens would silently drop the image.
        raise ModelError(
            f"the model {name!r} has {config.num_query_tokens} query tokens, "
            f"but its processor writes {processor.num_query_tokens} image tokens"
        )
    return config, processor


def _refuse_offloaded(name: str, model: Any, device: torch.device) -> None:
    """Refuse a base of which Accelerate put layers on the host or on disk: each would be fetched at every step."""
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    if device.type == "cuda" and places & {"cpu", "disk"}:
        raise ModelError(
            f"the model {name!r} does not fit on the {torch.cuda.device_count()} GPUs that this process sees: parts "
            "of it would lie on the host; give it more GPUs (in a search: --gpus-per-worker), or "
            "--set base_dtype=bfloat16"
        )


def fingerprint(folder: Path) -> str:
    """Hash of a checkpoint's folder: its config.json, and names, sizes and samples of its weight files."""
    whole = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("_name_or_path", None)
    whole.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        whole.update(f"{file.name}:{size}".encode())
        with file.open("rb") as stream:
            for block in range(SAMPLE_BLOCKS):
                stream.seek(min(block * max(size // SAMPLE_BLOCKS, SAMPLE_BYTES), size), os.SEEK_SET)
                whole.update(stream.read(SAMPLE_BYTES))
    return whole.hexdigest()[:16]


def encode_images(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
    """Vision output of (B, 3, height, width) pixels: (B, patches + 1, vision hidden size).

    Frozen, the tower makes no graph: nothing that goes into it has a gradient until an adapter adds something.
    """
    output = model.vision_model(pixel_values=pixel_values, return_dict=True)
    return output.last_hidden_state  # type: ignore[no-any-return]


def forward(model: Any, batch: Batch) -> Forward:
    """Loss of a batch, its logits computed at label positions only.

    Args:
        model: the InstructBLIP, with adapters injected or without.
        batch: on the base's device, with pixels or vision outputs. If the base is spread over several devices, tensors
            are moved to each layer's, and the losses come back to the batch's.
    """
    layout = batch.layout or layout_of(model.config, batch)
    image_embeds = batch.image_embeds
    if image_embeds is None:
        assert batch.pixel_values is not None
        image_embeds = encode_images(model, batch.pixel_values).to(batch.qformer_ids.device)
    queries = query_images(model, image_embeds, layout).to(batch.labels.device)
    logits = label_logits(model, queries, layout)
    # float32 for the loss whatever the model's dtype: a sum over thousands of tokens overflows in float16.
    losses = F.cross_entropy(at_least_float32(logits), layout.label_ids.to(logits.device), reduction="none")
    return Forward(losses.to(queries.device), queries.unflatten(0, (len(batch), -1)))


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, unless it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def runs_on_rows(config: Any) -> bool:
    """Whether `trainer.model.forward` has the language model of an InstructBLIP of this config."""
    return config.text_config.model_type in FORWARDS


def label_logits(model: Any, queries: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Logits at the N label tokens, (N, vocabulary).

    Args:
        model: the InstructBLIP.
        queries: (B x Q, Q-Former's hidden size).
        layout: of the pass.
    """
    language = model.language_model
    with input_rows(layout.queries):
        projected = model.language_projection(queries)
    text = model.get_input_embeddings()(layout.text_ids)
    embeds = layout.text.join(projected.to(text), text)
    if not runs_on_rows(model.config):
        return _library_logits(model, embeds, layout)
    states = FORWARDS[model.config.text_config.model_type](language, embeds, layout)
    with input_rows(layout.labels):
        return model.get_output_embeddings()(states)  # type: ignore[no-any-return]


def _library_logits(model: Any, embeds: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Logits at the label tokens through the library's own forward, padded, for a language model not in `FORWARDS`."""
    rows, labels = layout.text.rows, layout.labels
    seen = rows.seen()
    mask = None if seen is None else seen[:, 0, 0].long().to(embeds.device)
    inputs = {}
    if layout.predicts is None:
        padded = labels.pad(layout.label_ids[:, None])[:, :, 0]
        inputs = {"decoder_input_ids": model.language_model.prepare_decoder_input_ids_from_labels(padded)}
    with _only_labels(model.get_output_embeddings(), layout), input_rows(labels):
        return model.language_model(  # type: ignore[no-any-return]
            inputs_embeds=rows.pad(embeds), attention_mask=mask, use_cache=False, **inputs
        ).logits


@contextmanager
def _only_labels(head: nn.Module, layout: Layout) -> Iterator[None]:
    """Within, the language-model head sees the states of label tokens only: (B, L, hidden) becomes (N, hidden).

    By a hook, so that everything before the head (T5's output scaling, for one) stays the library's own code.
    """

    def select(_: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if layout.predicts is None:
            return (layout.labels.unpad(args[0]), *args[1:])
        return (layout.predicts.take(layout.text.rows.unpad(args[0])), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
