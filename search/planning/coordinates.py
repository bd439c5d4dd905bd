"""Coordinates of configurations in which a search has one steep direction and several flat ones.

The steep one is the **effective rate**, z = learning_rate x lora_alpha / sqrt(batch size). One step of AdamW moves a
weight of an adapter by about the learning rate, which reaches the model times alpha / r over a sum of r such products,
and the noise of the gradient falls with the square root of the batch. On the 256 random configurations of the table
`aerial` a cubic in log z explains 85 % of the variance of log(best loss) after 20 epochs, in the log of the learning
rate 47 % (docs/search-quality.md, `python -m tests.benchmarks.effective_rate aerial mixed`).

What others say of rank and alpha: Chen et al. 2026 (arXiv 2602.06204) derive that the best learning rate is about the
same at all ranks or falls with 1 / r, by initialization and scaling factor; Zhang et al. 2026 (arXiv 2606.12883) that
the best alpha grows with the square root of the rank, and that a higher alpha brings what a higher learning rate alone
does not: then their product is not all there is to it. The powers of batch and rank here are fitted to the tables: at
one learning rate the best alpha grows with r^0.25, and at alpha = k r the best learning rate falls with r^0.75.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from search.planning.curves import Array
from search.space import Choice, Float, Int, Multiple, Param, Space

RATE_FIELDS = ("learning_rate", "lora_alpha", "lora_r", "batch_size", "gradient_accumulation_steps")
"""Fields that the rates below are made of; `lr_scheduler_type`, a text, beside them."""
DECAYING = ("linear", "cosine")
"""Schedules whose rate falls to nothing after the warmup."""


def effective_rate(config: Mapping[str, Any]) -> float:
    """log10 of z = learning_rate x lora_alpha / sqrt(samples of an optimizer step).

    Args:
        config: A resolved configuration's values by field.
    """
    samples = config["batch_size"] * config["gradient_accumulation_steps"]
    rate, alpha = config["learning_rate"], config["lora_alpha"]
    product = rate * alpha
    if not 0 < product < math.inf and rate > 0 and alpha > 0:  # an alpha of 1e-320
        return math.log10(rate) + math.log10(alpha) - 0.5 * math.log10(samples)
    return math.log10(product) - 0.5 * math.log10(samples)


USUAL = {"batch_size": 4, "lora_r": 8}
"""Where the model's rate is the effective rate itself: the hand-run log's recommended start."""
LARGER_BATCH, HIGHER_RANK = 0.25, 0.25
"""Powers by which the model's rate falls with batch and rank beside what z says. For a fixed number of epochs a larger
batch also makes fewer steps (its power in all is between 0.5, a random walk, and 1, a straight path), and a higher
rank has more products to sum. On 114 runs of the embedded model powers of 0.75 and 0.25 make recorded curves e^55
times more probable than 0.5 and 0, and the best of nine combinations (docs/search-quality.md)."""
FALLS = math.log10(2)
"""Decades by which the model's rate of a schedule that falls lies below that of a constant one: its mean is half as
high. The embedded model's losses are lowest 0.30 (cosine) and 0.34 (linear) decades higher in 6 epochs, 0.41 and 0.54
in 20 (`python -m tests.benchmarks.schedules`; docs/search-quality.md, "Schedules and epochs")."""


def model_rate(config: Mapping[str, Any]) -> float:
    """log10 of the rate by which the model tells configurations apart: the effective rate at the usual batch and rank,
    and of a constant rate that is as high in the mean.

    Args:
        config: A resolved configuration's values by field.
    """
    samples = config["batch_size"] * config["gradient_accumulation_steps"]
    return (
        effective_rate(config)
        - LARGER_BATCH * math.log10(samples / USUAL["batch_size"])
        - HIGHER_RANK * math.log10(config["lora_r"] / USUAL["lora_r"])
        - FALLS * (config.get("lr_scheduler_type") in DECAYING)
    )


class Coordinates:
    """Where configurations of a space lie: the model's rate, and the other searched fields scaled to [0, 1].

    Args:
        space: The study's space.
    """

    def __init__(self, space: Space) -> None:
        # The rate is in z; an alpha that is a multiple of the rank says what z does not: alpha / r.
        self._fields = {name: param for name, param in space.items() if name != "learning_rate"}

    def of(self, config: Mapping[str, Any]) -> tuple[float, Array]:
        """(log10 of the model's rate, (d,) other coordinates) of a configuration's values by field."""
        rest: list[float] = []
        for name, param in self._fields.items():
            rest += _scaled(config, name, param)
        return model_rate(config), np.array(rest)


def _scaled(config: Mapping[str, Any], name: str, param: Param) -> list[float]:
    value = config[name]
    match param:
        case Float(low=low, high=high, log=log) | Int(low=low, high=high, log=log):
            return [_between(value, low, high, log)]
        case Multiple(of=of, factors=factors):
            whole = config[of]
            return [_between(value / whole if whole else 0.0, min(factors), max(factors), log=min(factors) > 0)]
        case Choice(values=values):
            numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
            if len(numbers) == len(values):
                return [_between(value, min(numbers), max(numbers), log=min(numbers) > 0)]
            return [0.7 * (value == each) for each in values]  # two different ones are one range apart
    raise TypeError(param)


def _between(value: float, low: float, high: float, log: bool) -> float:
    """Where a value lies in its range, 0 to 1."""
    if high <= low:
        return 0.0
    if log and low > 0 and value > 0:
        return math.log(value / low) / math.log(high / low)
    return (value - low) / (high - low)
