"""Sizes that are filled up to few values, so that few kinds of passes are recorded (`trainer.model.graphs`)."""

from __future__ import annotations

from collections.abc import Iterable

STEP = 32
"""The longest caption is filled up to a multiple of this, and the label tokens too where they are few."""
FINENESS = 8
"""Where they are many, to a multiple of the power of two below an eighth of them: at most an eighth is added."""


def filled_up(number: int) -> int:
    """The number of label tokens to which as many are filled up."""
    step = STEP
    while step * 2 * FINENESS <= number:
        step *= 2
    return -(-number // step) * step


def filled_longest(number: int) -> int:
    """The length to which that of the longest caption is filled up."""
    return -(-number // STEP) * STEP


def filled_rank(ranks: Iterable[int]) -> int:
    """The rank to which those of a pack are filled up: the power of two that holds all."""
    return 1 << (max(ranks) - 1).bit_length()
