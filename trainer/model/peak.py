"""The memory that a training step takes at its peak, by a model's config.json and the lengths of texts. No torch.

What autograd keeps is counted operation by operation, as `trainer.model.forward` makes them: the test sums the tensors
that it really keeps (tests/trainer/model/test_peak.py). Lengths are means, so that a single batch may take more.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.config import TrainConfig
from trainer.model import memory
from trainer.model.locate import locate
from trainer.model.rounding import filled_longest, filled_rank

CONTEXT = 600 * 2**20
"""Bytes that CUDA and cuBLAS take for themselves on a GPU. An assumption: it differs between drivers."""
MOMENTS = 4
"""An adapter's weights, gradients and AdamW's two moments."""
PLACE = 4
"""Bytes of an index into a stack of adapters."""
FLOAT = 4
"""Bytes of float32, of adapters and of what is kept for losses."""


class Tokens(Protocol):
    """A sample's token ids."""

    @property
    def qformer(self) -> Sequence[int]: ...
    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def target(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class Lengths:
    """Mean numbers of tokens of a sample, and the longest of each."""

    instruction: float
    prompt: float
    labels: float
    longest_prompt: float = 0
    longest_labels: float = 0

    @classmethod
    def of(cls, samples: Sequence[Tokens]) -> Lengths:
        """Of these samples. Without the longest, attention to padding is left out: on RSICap a sixth of a step in
        bfloat16 and a fifth in float32.
        """
        lengths = [(len(each.qformer), len(each.prompt), len(each.target)) for each in samples]
        instruction, prompt, labels = (sum(column) / len(column) for column in zip(*lengths, strict=True))
        longest = [max(column) for column in zip(*lengths, strict=True)]
        return cls(instruction, prompt, labels, longest_prompt=longest[1], longest_labels=longest[2])


TYPICAL = Lengths(instruction=12, prompt=12, labels=90, longest_prompt=12, longest_labels=120)
"""Of RSICap's captions under FlanT5's tokenizer, where the data have not been looked at."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of an InstructBLIP that decide what a step keeps."""

    queries: int
    patches: int
    """Of an image, the class token included."""
    vision: int
    """Width of the vision tower."""
    vision_inner: int
    vision_layers: int
    width: int
    """Of the Q-Former."""
    inner: int
    layers: int
    heads: int
    frequency: int
    """Every so many of its layers attend to the image."""
    decoder_only: bool
    text_width: int
    attention: int
    """Heads times their size, of the language model."""
    text_heads: int
    text_inner: int
    encoder_layers: int
    decoder_layers: int
    vocabulary: int
    gated: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Sizes | None:
        """From config.json as plain data; None for a language model that is neither T5 nor Llama.

        Raises:
            KeyError: it lacks a size.
        """
        text, qformer, vision = config["text_config"], config["qformer_config"], config["vision_config"]
        kind = text.get("model_type", "t5")
        if kind not in ("t5", "llama"):
            return None
        t5 = kind == "t5"
        heads = text["num_heads" if t5 else "num_attention_heads"]
        width = text["d_model" if t5 else "hidden_size"]
        layers = text["num_layers" if t5 else "num_hidden_layers"]
        return cls(
            queries=config.get("num_query_tokens", 32),
            patches=(vision["image_size"] // vision["patch_size"]) ** 2 + 1,
            vision=vision["hidden_size"],
            vision_inner=vision["intermediate_size"],
            vision_layers=vision["num_hidden_layers"],
            width=qformer["hidden_size"],
            inner=qformer["intermediate_size"],
            layers=qformer["num_hidden_layers"],
            heads=qformer["num_attention_heads"],
            frequency=qformer.get("cross_attention_frequency", 2),
            decoder_only=not t5,
            text_width=width,
            attention=heads * (text["d_kv"] if t5 else text.get("head_dim") or width // heads),
            text_heads=heads,
            text_inner=text["d_ff" if t5 else "intermediate_size"],
            encoder_layers=layers if t5 else 0,
            decoder_layers=(text.get("num_decoder_layers") or layers) if t5 else layers,
            vocabulary=text["vocab_size"],
            gated=not t5 or "gated" in text.get("feed_forward_proj", "gated-gelu"),
        )

    @property
    def adapted(self) -> dict[str, tuple[int, int]]:
        """(number of modules, their inputs and outputs together) by the last part of the name, of the Q-Former."""
        cross = -(-self.layers // self.frequency)
        d, f = self.width, self.inner
        both = dict.fromkeys(("query", "key", "value"), (self.layers + cross, self.layers * 2 * d))
        both["query"] = (self.layers + cross, (self.layers + cross) * 2 * d)
        for name in ("key", "value"):
            both[name] = (self.layers + cross, self.layers * 2 * d + cross * (self.vision + d))
        # Outputs of attention, and two feed-forwards of two products each.
        both["dense"] = (5 * self.layers + cross, (self.layers + cross) * 2 * d + 4 * self.layers * (d + f))
        return both


@dataclass(frozen=True)
class Peak:
    """Bytes of a training step at its peak."""

    weights: int
    """Of the frozen base, the vision tower included."""
    store: int
    """Vision outputs that lie on the device."""
    adapters: int
    """With their gradients and moments, of all runs of the pack."""
    kept: int
    """By autograd for the backward pass."""
    passing: int
    """Largest of what lives for a moment: logits and their gradients, a layer that is computed again, or the logits of
    an evaluation, as far as they are more than what a step keeps."""

    @property
    def total(self) -> int:
        """All of it, without what CUDA takes for itself."""
        return self.weights + self.store + self.adapters + self.kept + self.passing

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "vision store": self.store,
            "adapters": self.adapters,
            "activations": self.kept,
            "passing": self.passing,
        }
        listed = ", ".join(f"{name} {memory.shown(size)}" for name, size in parts.items() if size)
        return f"{memory.shown(self.total)} ({listed})"


def sizes_of(model: str) -> Sizes | None:
    """The sizes of a model that is on this machine; None if it is not, or its sizes are not known here."""
    file = Path(locate(model)) / "config.json"
    try:
        return Sizes.of(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def estimate(
    sizes: Sizes,
    configs: Sequence[TrainConfig],
    lengths: Lengths,
    *,
    weights: int,
    stored: int = 0,
    on_cpu: bool = False,
) -> Peak:
    """The peak of a step of these runs in one pass, all with the base of the first.

    Args:
        sizes: of the model.
        configs: of the runs.
        lengths: of their texts.
        weights: bytes of the base.
        stored: images whose vision outputs lie on the device.
        on_cpu: what the CPU's own kernels keep, instead of a GPU's.
    """
    base = memory.BYTES[configs[0].dtype_of_base]
    adapter = memory.BYTES[configs[0].torch_dtype]
    again = _again(configs)
    # A kernel without scores is taken in a lower dtype, on a GPU also where sums may come in any order.
    fused = base < FLOAT or not (on_cpu or configs[0].deterministic)
    kept = language = recomputed = 0.0
    # The graph of one micro-batch at a time, its logits as well as its activations.
    at_once = [min(config.micro_batch_size or config.batch_size, config.batch_size) for config in configs]
    for config, samples in zip(configs, at_once, strict=True):
        dropout = adapter if config.lora_dropout else 0
        kept += samples * _qformer(sizes, lengths, base, dropout, config, fused)
        states, layer = _language(sizes, lengths, base, again, fused, on_cpu)
        language += samples * states
        recomputed += samples * layer
    logits = sum(at_once) * lengths.labels * sizes.vocabulary
    evaluated = sum(config.eval_batch_size for config in configs) * lengths.labels * sizes.vocabulary
    upcast = FLOAT if base < FLOAT else 0
    return Peak(
        weights=weights,
        store=int(stored * sizes.patches * sizes.vision * base),
        adapters=sum(MOMENTS * memory.BYTES[c.torch_dtype] * adapter_weights(sizes, c) for c in configs)
        + (0 if on_cpu else _stack(sizes, configs)),
        kept=int(kept + language + logits * FLOAT),
        # Of the loss, while the gradients go back: its own and that of the softmax.
        passing=int(max(logits * 2 * FLOAT, recomputed, evaluated * (base + upcast + FLOAT) - kept - language)),
    )


def _stack(sizes: Sizes, configs: Sequence[TrainConfig]) -> int:
    """Bytes of the runs' adapters in one stack (`trainer.model.stacked`): weights, gradients, scales and places."""
    rank = filled_rank(config.lora_r for config in configs)
    own = sum(adapter_weights(sizes, config) for config in configs)
    filled = sum(adapter_weights(sizes, config) // config.lora_r * rank for config in configs)
    return filled * (3 * memory.BYTES[configs[0].torch_dtype] + PLACE) + own * PLACE


def adapter_weights(sizes: Sizes, config: TrainConfig) -> int:
    """Weights of a run's adapter, as far as they are the Q-Former's."""
    return config.lora_r * sum(sizes.adapted[name][1] for name in config.target_modules if name in sizes.adapted)


def _again(configs: Sequence[TrainConfig]) -> bool:
    return any(config.gradient_checkpointing == "always" for config in configs)


def _qformer(sizes: Sizes, lengths: Lengths, base: int, dropout: int, config: TrainConfig, fused: bool) -> float:
    """Bytes that the Q-Former keeps for a sample: of its adapted modules the inputs and masks, norms, attention."""
    d, f, heads, queries = sizes.width, sizes.inner, sizes.heads, sizes.queries
    rows, text = queries + lengths.instruction, lengths.instruction
    adapted = set(config.target_modules)
    attention = len(adapted & {"query", "key", "value"})
    dense = int("dense" in adapted)
    kept = masks = attended = 0.0
    for layer in range(sizes.layers):
        last = layer == sizes.layers - 1
        out = queries if last else rows
        # Self-attention: the input; the output's input, the norm's.
        kept += rows * d * (attention > 0) + out * d * (dense + 1)
        attended += _attention(out, rows, d, heads, base, fused)
        masks += rows * d * len(adapted & {"key", "value"}) + out * d * (int("query" in adapted) + dense)
        if layer % sizes.frequency == 0:
            kept += queries * d * (int("query" in adapted) + dense + 1)
            attended += _attention(queries, sizes.patches, d, heads, base, fused)
            masks += sizes.patches * sizes.vision * len(adapted & {"key", "value"})
            masks += queries * d * (int("query" in adapted) + dense)
        # Feed-forward: the input, what goes into GELU, what comes out, the norm's input.
        through = queries if last else queries + text
        kept += through * (d * (dense + 1) + f * (dense + 1))
        masks += through * (d + f) * dense
    images = sizes.patches * sizes.vision
    return (kept + images) * base + attended + masks * dropout


def _attention(queries: float, keys: float, width: int, heads: int, base: int, fused: bool) -> float:
    """Bytes that attention keeps: queries, keys, values and shares.

    A fused kernel keeps the output and a number for each query in place of the shares.
    """
    if fused:
        return base * (2 * queries + 2 * keys) * width + FLOAT * heads * queries
    return base * ((queries + 2 * keys) * width + heads * queries * keys)


def _language(
    sizes: Sizes, lengths: Lengths, base: int, again: bool, fused: bool, on_cpu: bool
) -> tuple[float, float]:
    """Bytes that the language model keeps for a sample, and those of a layer while it is computed again."""
    text = sizes.queries + lengths.prompt
    labels = lengths.labels
    # Attention is padded to the longest caption, on a GPU to a multiple of some tokens.
    longest = max(labels, lengths.longest_labels if on_cpu else filled_longest(int(lengths.longest_labels)))
    if sizes.decoder_only:
        padded, text = text + longest, text + labels
        layer = _layer(sizes, text, ((padded, padded),), base, fused, on_cpu)
        states = base * sizes.text_width * sizes.decoder_layers * text
        return (states, layer) if again else (sizes.decoder_layers * layer, 0.0)
    encoder = _layer(sizes, text, ((text, text),), base, fused, on_cpu)
    decoder = _layer(sizes, labels, ((longest, longest), (longest, text)), base, fused, on_cpu)
    if again:  # of each layer the input stays
        return base * sizes.text_width * (sizes.encoder_layers * text + sizes.decoder_layers * labels), decoder
    return sizes.encoder_layers * encoder + sizes.decoder_layers * decoder, 0.0


def _layer(
    sizes: Sizes, rows: float, attentions: Sequence[tuple[float, float]], base: int, fused: bool, on_cpu: bool
) -> float:
    """Bytes that a layer keeps: norms' inputs; queries, keys, values and shares; the feed-forward's products."""
    norms = (len(attentions) + 1) * rows * sizes.text_width
    # On a CPU, in a lower dtype, the norm is the library's, which keeps its input in float32 too.
    kept = norms * (base + FLOAT if on_cpu and base < FLOAT else base)
    for queries, keys in attentions:
        kept += _attention(queries, keys, sizes.attention, sizes.text_heads, base, fused)
    if sizes.gated:
        # The GELU's input (on a CPU its gate too), and the two that are multiplied.
        kept += base * rows * sizes.text_inner * (4 if on_cpu and base == FLOAT else 3)
    else:
        kept += base * rows * sizes.text_inner
    return kept
