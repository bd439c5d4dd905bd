"""What a training step computes, by a model's sizes, and how long a card takes for it by its data sheet. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.model.peak import Lengths, Sizes


@dataclass(frozen=True)
class Card:
    """Peak TFLOPS of a GPU without sparsity, by its maker's data sheet."""

    name: str
    float32: float
    tf32: float
    bfloat16: float

    def of(self, config: TrainConfig) -> float:
        """TFLOPS in the precision of a configuration."""
        if config.dtype_of_base != "float32":
            return self.bfloat16
        return self.tf32 if config.matmul_precision == "high" else self.float32


CARDS = (
    Card("H200", 67, 495, 989),
    Card("H100", 67, 495, 989),
    Card("A100", 19.5, 156, 312),
    Card("L40S", 91.6, 183, 362),
    Card("A6000", 38.7, 77, 155),
    Card("4090", 82.6, 82.6, 165),
    Card("A10", 31.2, 62.5, 125),
    Card("L4", 30.3, 60, 121),
    Card("T4", 8.1, 8.1, 8.1),
)
"""By a word of the name that nvidia-smi gives. H100 and H200 as SXM."""
LESSER = {"Laptop", "D", "MIG"}
"""Words of a name that make another of a card: the RTX 4090 Laptop GPU and the 4090 D, and a part of one."""


def card_of(name: str) -> Card | None:
    """The data sheet of a GPU of this name, `A100-SXM4-40GB` say; None for one that is not known, as `RTX A1000`."""
    words = set(re.split(r"[\s-]+", name))
    return None if words & LESSER else next((card for card in CARDS if card.name in words), None)


def step_flops(sizes: Sizes, lengths: Lengths, *, vision_kept: bool = True) -> float:
    """Floating point operations of a step for a sample: products of matrices, forward and for the gradient of inputs.

    With a frozen base a step costs two forward passes; the adapters' own products, some hundredths, are not counted.
    """
    text = sizes.queries + lengths.prompt
    rows = sizes.queries + lengths.instruction
    cross = -(-sizes.layers // sizes.frequency)
    d = sizes.width
    qformer = sizes.layers * (rows * (4 * d * d + 2 * d * sizes.inner) + 2 * rows * rows * d)
    qformer += cross * (
        2 * sizes.queries * d * d + 2 * sizes.patches * sizes.vision * d + 2 * sizes.queries * sizes.patches * d
    )
    block = (4 * sizes.attention + (3 if sizes.gated else 2) * sizes.text_inner) * sizes.text_width
    labels = lengths.labels
    if sizes.decoder_only:
        text += labels
        language = sizes.decoder_layers * (text * block + 2 * text * text * sizes.attention)
    else:
        language = sizes.encoder_layers * (text * block + 2 * text * text * sizes.attention)
        across = 2 * (labels + text) * sizes.attention * sizes.text_width + 2 * labels * text * sizes.attention
        language += sizes.decoder_layers * (labels * block + 2 * labels * labels * sizes.attention + across)
    head = labels * sizes.text_width * sizes.vocabulary
    forward = 2 * (qformer + language + head)
    return 2 * forward + (0 if vision_kept else vision_flops(sizes))


def vision_flops(sizes: Sizes) -> float:
    """Floating point operations of the tower's forward pass on an image."""
    per_layer = sizes.patches * (4 * sizes.vision**2 + 2 * sizes.vision * sizes.vision_inner)
    return 2 * sizes.vision_layers * (per_layer + 2 * sizes.patches**2 * sizes.vision)
