"""Coordinates of configurations, and the candidates that are drawn by them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.planning.candidates import Candidates, key
from search.planning.coordinates import Coordinates, effective_rate, model_rate
from search.planning.prior import LEAST_WIDTH, Prior, combined, from_runs
from search.space import Choice, Float, Int, Space, contains, param_name
from search.study import Study
from studies.rsicap import STUDY as RSICAP
from trainer.config import TrainConfig

BASE = TrainConfig().model_dump()

SPACES: list[Space] = [
    dict(RSICAP.space),
    {"learning_rate": Float(1e-5, 1e-3)},
    {"lora_r": Choice((4, 8, 16)), "lora_alpha": Choice((16, 32))},
    {"lora_alpha": Int(8, 64, log=True), "learning_rate": Float(1e-5, 1e-3, log=True), "num_epochs": Int(2, 6)},
    {"lr_scheduler_type": Choice(("linear", "cosine")), "learning_rate": Float(1e-4, 1e-4)},
    {"gradient_accumulation_steps": Int(1, 4), "batch_size": Choice((2, 4, 8))},
]


def test_the_effective_rate_is_the_issue_s() -> None:
    """z = learning_rate x alpha / sqrt(batch): the hand-run log's recommended start lies at -2.80."""
    recommended = {**BASE, "learning_rate": 2e-4, "lora_alpha": 16, "batch_size": 4}
    assert effective_rate(recommended) == pytest.approx(-2.796, abs=1e-3)
    assert model_rate(recommended) == pytest.approx(effective_rate(recommended))
    # Four micro-batches of one are a batch of four.
    again = {**recommended, "batch_size": 1, "gradient_accumulation_steps": 4}
    assert effective_rate(again) == pytest.approx(effective_rate(recommended))


def test_a_rate_that_falls_is_begun_twice_as_high() -> None:
    """Its mean is half of a constant one's; the effective rate is that of the highest."""
    constant = {**BASE, "learning_rate": 2e-4, "lr_scheduler_type": "constant_with_warmup"}
    space: Space = {"learning_rate": Float(1e-6, 1e-1, log=True)}
    for falling in ("linear", "cosine"):
        config = {**constant, "lr_scheduler_type": falling}
        assert effective_rate(config) == effective_rate(constant)
        assert model_rate(config) == pytest.approx(model_rate(constant) - math.log10(2))
        rates = [
            Candidates(space, c).sound_at(np.random.default_rng(0), -2.6)["learning_rate"] for c in (constant, config)
        ]
        assert rates[1] == pytest.approx(2 * rates[0])


@pytest.mark.parametrize("space", SPACES, ids=lambda space: "-".join(space))
@given(seed=st.integers(0, 2**32 - 1), centre=st.floats(-8, 2), width=st.floats(0.05, 2))
def test_candidates_lie_in_the_space_and_can_be_run(space: Space, seed: int, centre: float, width: float) -> None:
    drawn = Candidates(space, BASE).draw(np.random.default_rng(seed), Prior(centre, width), [])
    assert drawn
    assert len({key(params) for params in drawn}) == len(drawn)
    study = Study(name="s", description="", space=space, n_trials=1)
    for params in drawn[:: max(1, len(drawn) // 6)]:
        assert params.keys() == {param_name(field, param) for field, param in space.items()}
        assert all(contains(param, params[param_name(field, param)]) for field, param in space.items())
        config = study.config(params).model_dump()
        z, rest = Coordinates(space).of(config)
        assert math.isfinite(z)
        assert np.all((rest > -1e-9) & (rest < 1 + 1e-9))


def test_the_ladder_covers_the_prior_at_a_sound_rank() -> None:
    candidates = Candidates(RSICAP.space, RSICAP.base_config().model_dump())
    drawn = [candidates.config(p) for p in candidates.draw(np.random.default_rng(0), Prior(-2.6, 0.5), [])]
    ladder = sorted(model_rate(c) for c in drawn if (c["lora_r"], c["lora_alpha"], c["batch_size"]) == (8, 16, 4))
    assert ladder[0] == pytest.approx(-3.6, abs=0.05)
    assert ladder[-1] == pytest.approx(math.log10(1e-3 * 16 / 2))  # the study's range of rates ends there
    assert len(ladder) >= 10


def test_candidates_near_good_trials_are_near_them() -> None:
    candidates = Candidates(RSICAP.space, RSICAP.base_config().model_dump())
    good = candidates.draw(np.random.default_rng(0), Prior(), [])[3]
    near = candidates.draw(np.random.default_rng(1), Prior(), [good])[-12:]
    where = Coordinates(RSICAP.space)
    (z, _), places = where.of(candidates.config(good)), [where.of(candidates.config(p))[0] for p in near]
    assert np.median(np.abs(np.array(places) - z)) < 0.5


def test_the_prior_of_runs_is_where_the_best_of_them_are() -> None:
    prior = from_runs([(-3.5, 1.60), (-2.9, 1.43), (-2.6, 1.42), (-2.0, 1.55)])
    assert prior is not None
    assert -2.9 < prior.centre < -2.5
    assert prior.width >= LEAST_WIDTH
    assert from_runs([(-2.0, math.nan)]) is None


def test_priors_that_agree_make_a_narrower_one() -> None:
    both = combined([Prior(-2.4, 0.6), Prior(-2.8, 0.6)])
    assert both.centre == pytest.approx(-2.6)
    assert LEAST_WIDTH <= both.width < 0.6
