"""The world between the runs of a table, and what one coordinate of it explains."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.benchmarks import effective_rate
from tests.benchmarks.world import World
from tests.benchmarks.world_error import describe, left_out
from tests.support.toy_table import BEST_Z, EPOCHS, toy_table


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return toy_table()


@pytest.fixture(scope="module")
def world(table: dict[str, Any]) -> World:
    return World(table)


def values(**changed: Any) -> dict[str, Any]:
    """A configuration whose effective rate is the best one, unless changed."""
    found = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "batch_size": 4, "warmup_steps": 5, **changed}
    rate = 10**BEST_Z * math.sqrt(found["batch_size"]) / found["lora_alpha"]
    return {"learning_rate": rate, **found}


def test_a_world_gives_the_runs_of_its_table(world: World, table: dict[str, Any]) -> None:
    for run in table["runs"]:
        curve = world.curve(run)
        assert curve.diverged == run["diverged"]
        if not run["diverged"]:
            assert curve.val == pytest.approx(run["val"])
        assert len(curve.val) == len(run["val"])


def test_a_world_knows_where_the_optimum_is_and_what_it_does_not_know(world: World) -> None:
    at = [world.curve(values(learning_rate=values()["learning_rate"] * 10**step)).worth for step in (-1, 0, 0.8)]
    assert at[1] < min(at[0], at[2])
    assert world.best == pytest.approx(0.9 * (0.4 + 0.2 / EPOCHS), rel=0.01)
    assert world.optimum == pytest.approx(world.best, rel=0.01)
    assert world.named == pytest.approx(world.best, rel=0.01)
    for error in left_out(world):
        assert error.relative < 0.01
        assert error.rank > 0.9
    assert "left out" in describe(world)[-1]


def test_the_split_of_another_seed_is_not_taken_for_the_configurations_merit(world: World) -> None:
    first, third = (world.curve(values(seed=seed)).val.mean() for seed in (42, 44))
    assert third / first == pytest.approx(math.exp(0.04), rel=0.01)
    # The test loss of the toy has the same offset; the noise is what remains: 0.1 % of a run, 0.2 % of an epoch.
    assert 0.001 < world.noise_of["test"] < 0.004
    assert world.tie() == pytest.approx(math.sqrt(2) * world.noise_of["test"])


def test_luck_differs_by_study_and_not_by_call(world: World) -> None:
    once, again, other = (world.curve(values(), draw) for draw in (1, 1, 2))
    assert np.array_equal(once.val, again.val)
    others = [world.curve(values(), draw).val for draw in range(2, 12)]
    assert any(not np.array_equal(once.val, each) for each in others)
    assert once.worth == other.worth


def test_test_losses_that_were_not_taken_are_imputed(world: World) -> None:
    assert 0 < world.imputed < 1
    bad = world.curve(values(learning_rate=1e-5))
    assert bad.test == pytest.approx(bad.val * 0.9, rel=0.02)


def test_runs_next_to_diverged_ones_diverge(world: World) -> None:
    curve = world.curve(values(learning_rate=3e-3, lora_r=32, lora_alpha=128, batch_size=2))
    assert curve.diverged
    assert len(curve.val) == 2


def test_a_world_needs_some_runs(table: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs 4 runs"):
        World({**table, "runs": table["runs"][:1]})


# One coordinate.


def test_the_coordinate_that_decides_explains_the_variance(table: dict[str, Any]) -> None:
    runs = [run for run in table["runs"] if run["seed"] == 42]
    by_z = effective_rate.explained(runs, effective_rate.COORDINATES["z = rate x alpha / sqrt(batch)"], EPOCHS)
    by_rate = effective_rate.explained(runs, effective_rate.COORDINATES["rate"], EPOCHS)
    assert by_z.share > 0.9 > by_rate.share
    assert by_z.best == pytest.approx(BEST_Z, abs=0.3)
    assert by_z.low <= by_z.best <= by_z.high


def test_coordinates_are_printed_by_epoch_and_by_rank(
    table: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    figures = effective_rate.report(table)
    assert set(figures["rate"]["by_epoch"]) == {1, 3, EPOCHS}
    assert len(figures["rate"]["by_rank"]) == 2
    assert "40 configurations, 6 epochs" in capsys.readouterr().out
