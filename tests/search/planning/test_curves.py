"""The model of curves: it learns what is shared, forecasts with honest intervals, and does not train on for luck."""

from __future__ import annotations

import math

import numpy as np
import pytest

from search.planning import thaw
from search.planning.curves import Curves, Points
from search.planning.prior import Prior
from search.planning.worth import Known, Outlook, expected_improvement

EPOCHS = 12


def curve(z: float, rng: np.random.Generator, noise: float = 0.004) -> tuple[float, ...]:
    """Losses of a made-up task: they fall towards a floor that is lowest at an effective rate of 10^-2.4."""
    floor = 0.36 * math.exp(0.05 * min((z + 2.4) ** 2, 4.0))
    return tuple(
        float(floor * (1 + 0.25 * math.exp(-0.5 * epoch)) * math.exp(noise * rng.standard_normal()))
        for epoch in range(1, EPOCHS + 1)
    )


def trials(seen: dict[float, int], seed: int = 0) -> list[Known]:
    """Trials by effective rate, each seen for so many epochs."""
    rng = np.random.default_rng(seed)
    return [Known(i, z, (), curve(z, rng)[:epochs], EPOCHS) for i, (z, epochs) in enumerate(seen.items())]


def test_a_forecast_from_the_first_epochs_is_within_its_interval() -> None:
    """80 % intervals of trials seen for three epochs hold what 64 to 96 % of them reach."""
    held = []
    for seed in range(12):
        known = trials({-3.4: 12, -2.9: 8, -2.5: 12, -2.0: 6, -1.6: 4, -2.7: 3, -2.2: 3, -3.1: 3}, seed)
        outlook = Outlook(known, Prior())
        for trial in known[5:]:
            (worth,) = outlook.of([trial])
            truth = 0.36 * math.exp(0.05 * (trial.z + 2.4) ** 2)
            held.append(worth.low <= truth <= worth.high)
    assert 0.64 <= np.mean(held) <= 1.0
    assert len(held) == 36


def test_neighbours_tell_where_a_configuration_that_has_not_begun_will_end() -> None:
    outlook = Outlook(trials({-3.6: 12, -3.0: 12, -2.4: 12, -1.8: 12, -1.2: 12}), Prior())
    good, bad = outlook.of([Known(-1, -2.5, (), (), EPOCHS), Known(-1, -3.5, (), (), EPOCHS)])
    assert good.final == pytest.approx(0.36, rel=0.03)
    assert bad.final == pytest.approx(0.36 * math.exp(0.05 * 1.1**2), rel=0.03)
    assert good.per_epoch > bad.per_epoch


def test_a_trial_that_still_falls_is_worth_more_than_one_that_has_arrived() -> None:
    known = trials({-3.0: 12, -2.5: 3, -3.4: 12, -1.8: 8})
    arrived, falling = Outlook(known, Prior()).of([Known(0, -3.0, (), known[0].losses, 20), known[1]])
    assert falling.per_epoch > 2 * arrived.per_epoch


def test_what_a_trial_may_already_have_is_no_gain() -> None:
    """A long flat curve with noise is worth nothing more, however noisy its evaluations are."""
    rng = np.random.default_rng(1)
    flat = tuple(0.37 * math.exp(0.01 * x) for x in rng.standard_normal(18))
    other = tuple(0.40 * math.exp(0.01 * x) for x in rng.standard_normal(18))
    (worth,) = Outlook([Known(0, -2.4, (), flat, 20), Known(1, -3.2, (), other, 20)], Prior()).of(
        [Known(0, -2.4, (), flat, 20)]
    )
    assert worth.total < 2e-3


@pytest.mark.parametrize(("rises_by", "goes_on"), [(0.01, True), (0.06, False)])
def test_what_all_trials_share_may_be_the_split_s(rises_by: float, goes_on: bool) -> None:
    """A few samples that validate may lie 2 % off, for all trials alike: no reason to stop. 10 % are overfitting."""
    rng = np.random.default_rng(5)

    def seen(z: float, epochs: int) -> tuple[float, ...]:
        rise = [rises_by * max(0, epoch - 5) / 4 for epoch in range(1, epochs + 1)]
        return tuple(loss * math.exp(up) for loss, up in zip(curve(z, rng)[:epochs], rise, strict=True))

    known = [Known(i, z, (), seen(z, 12), 20) for i, z in enumerate((-2.7, -2.55, -2.45, -2.3, -2.2))]
    (worth,) = Outlook(known, Prior()).of([known[1]])
    left = (20 - 12) / 20
    assert (worth.total > thaw.HOPELESS * left) is goes_on


def test_the_lowest_of_many_noisy_epochs_is_not_the_lowest_loss() -> None:
    rng = np.random.default_rng(2)
    flat = tuple(0.37 * math.exp(0.01 * x) for x in rng.standard_normal(20))
    outlook = Outlook([Known(0, -2.4, (), flat, 20)], Prior())
    assert min(flat) < 0.365 < outlook.lowest_loss < 0.38


def test_nan_counts_as_the_worst_and_breaks_nothing() -> None:
    known = [
        *trials({-2.4: 6, -2.9: 6}),
        Known(7, -1.0, (), (0.5, math.nan), EPOCHS),
        Known(8, -0.9, (), (math.nan,), EPOCHS),
    ]
    high, low = Outlook(known, Prior()).of([Known(-1, -0.95, (), (), EPOCHS), Known(-1, -2.5, (), (), EPOCHS)])
    assert high.final > 1.1 * low.final
    assert math.isfinite(high.per_epoch)


@pytest.mark.parametrize("losses", [(math.nan,), (math.inf, math.nan)])
def test_without_any_finite_loss_there_is_still_an_answer(losses: tuple[float, ...]) -> None:
    (worth,) = Outlook([Known(0, -2.4, (), losses, EPOCHS)], Prior()).of([Known(-1, -2.5, (), (), EPOCHS)])
    assert math.isfinite(worth.per_epoch)


def test_the_scale_of_the_losses_does_not_matter() -> None:
    """The model is of their logarithms: losses ten times as large are judged alike."""
    known = trials({-2.4: 8, -2.9: 4, -3.4: 4})
    tenfold = [Known(t.number, t.z, t.rest, tuple(10 * loss for loss in t.losses), t.num_epochs) for t in known]
    one, ten = Outlook(known, Prior()).of(known), Outlook(tenfold, Prior()).of(tenfold)
    for a, b in zip(one, ten, strict=True):
        assert b.per_epoch == pytest.approx(a.per_epoch, rel=1e-6, abs=1e-12)
        assert b.final == pytest.approx(10 * a.final)


def test_a_posterior_at_many_points_is_the_textbook_s() -> None:
    """The factored kernel gives what the kernel written point by point does."""
    rng = np.random.default_rng(3)
    at = Points(
        np.array([-2.5, -2.0, -3.0]),
        rng.uniform(size=(3, 2)),
        np.array([0, 1, 2]),
        np.array([0, 0, 1, 2, 2]),
        np.array([1.0, 3.0, 2.0, 1.0, 5.0]),
    )
    model = Curves(at, np.array([0.5, 0.4, 0.42, 0.6, 0.5]), centre=-2.6, width=0.5)
    whole = model._kernel(at, at)
    for i in range(5):
        for j in range(5):
            one, other = at.take(np.array([i])), at.take(np.array([j]))
            assert model._kernel(one, other)[0, 0] == pytest.approx(whole[i, j])
    assert np.all(np.linalg.eigvalsh(whole) > -1e-9)


def test_expected_improvement_is_the_mean_of_what_is_gained() -> None:
    x = np.random.default_rng(4).standard_normal(400_000)
    for gap, sd in ((0.1, 0.2), (-0.3, 0.2), (0.0, 0.05)):
        found = expected_improvement(np.array([gap]), np.array([sd]))[0]
        assert found == pytest.approx(np.maximum(gap + sd * x, 0).mean(), abs=5e-4)
