"""Intervals of test losses, and what they are compared with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from search.evaluation.held_out import judged
from search.evaluation.rows import Chosen
from search.verdict.race import Verdict
from search.verdict.tested import ATTRIBUTE, TestLosses
from trainer.data.dataset import Row

IMAGES = 200


def rows(per_scene: int) -> Chosen:
    """Rows in scenes of so many."""
    made = [
        Row(image=Path(f"{n}.png"), prompt="?", caption="a", scene=f"P{n // per_scene}", where=str(n))
        for n in range(IMAGES)
    ]
    return Chosen(name="test", where="200 test rows", rows=tuple(made), fingerprint="f")


def sums(mean: float, noise: float, seed: int) -> np.ndarray:
    chance = np.random.default_rng(seed)
    tokens = chance.integers(5, 30, IMAGES)
    hardness = np.random.default_rng(0).normal(0, 0.3, IMAGES)  # of an image, for every adapter
    return np.stack([tokens * (mean * (1 + hardness) + chance.normal(0, noise, IMAGES)), tokens], axis=1)


def test_the_mean_is_over_tokens_and_the_difference_is_paired() -> None:
    first, other = sums(0.40, 0.002, 1), sums(0.404, 0.002, 1)
    found = judged(rows(1), {7: 3, 2: 5}, {7: first, 2: other})
    one, two = found.losses
    assert (one.trial, one.epoch, one.above, two.trial) == (7, 3, None, 2)
    assert one.loss == pytest.approx(first[:, 0].sum() / first[:, 1].sum())
    assert two.above is not None and two.above[0] == pytest.approx(two.loss / one.loss - 1)
    width = two.above[2] - two.above[1]
    assert width < 0.1 * (one.high - one.low) / one.loss, "images that are hard for both do not count"
    assert two.above[1] > 0 and found.lower == ()
    turned = judged(rows(1), {2: 5, 7: 3}, {7: first, 2: other})
    assert turned.lower == (7,)


def test_scenes_make_intervals_wider() -> None:
    values = sums(0.4, 0.0, 1)
    values[:, 0] += values[:, 1] * np.repeat(np.random.default_rng(3).normal(0, 0.2, IMAGES // 20), 20)
    alone, together = (judged(rows(n), {0: 1}, {0: values}) for n in (1, 20))
    assert (alone.scenes, together.scenes) == (False, True)
    assert together.losses[0].high - together.losses[0].low > 1.5 * (alone.losses[0].high - alone.losses[0].low)


def test_it_is_read_as_it_was_written() -> None:
    found = judged(rows(1), {7: 3, 2: 5}, {7: sums(0.4, 0.01, 1), 2: sums(0.41, 0.01, 2)})
    stored = json.loads(json.dumps(found.to_dict()))
    assert TestLosses.of({ATTRIBUTE: stored}, Verdict(kind="tied", choice=7)) == found
    assert TestLosses.of({ATTRIBUTE: stored}, Verdict(kind="winner", choice=2)) is None, "of an earlier verdict"
    assert TestLosses.of({ATTRIBUTE: stored}, None) is None
    assert "trial 2 0.4" in replace(found, rows="unused").sentence()
