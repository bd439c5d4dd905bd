"""Test losses with their intervals: see `search.verdict.tested` for what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING

import numpy as np

from search.evaluation.compare import estimate_of_sums
from search.verdict.tested import TestLoss, TestLosses

if TYPE_CHECKING:
    from search.evaluation.rows import Chosen


def judged(rows: Chosen, epochs: Mapping[int, int], sums: Mapping[int, np.ndarray]) -> TestLosses:
    """The losses with intervals, from resampling the images, or the scenes where they are known.

    Args:
        rows: that they are of.
        epochs: by trial, that whose adapter was used. The first trial is the one that others are compared with.
        sums: by trial, see `trainer.held_out.loss_sums`.
    """
    scenes = rows.scenes()
    first = next(iter(epochs))

    def estimate(number: int) -> TestLoss:
        loss = estimate_of_sums(sums[number], _mean, scenes)
        above = None
        if number != first:
            paired = np.concatenate([sums[number], sums[first]], axis=1)
            above = astuple(estimate_of_sums(paired, _above, scenes))
        return TestLoss(trial=number, epoch=epochs[number], loss=loss.value, low=loss.low, high=loss.high, above=above)

    return TestLosses(
        rows=rows.name,
        images=len(rows.rows),
        scenes=scenes is not None,
        fingerprint=rows.fingerprint,
        losses=tuple(map(estimate, epochs)),
    )


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[:, 0] / sums[:, 1]  # type: ignore[no-any-return]


def _above(sums: np.ndarray) -> np.ndarray:
    return _mean(sums[:, :2]) / _mean(sums[:, 2:]) - 1  # type: ignore[no-any-return]
