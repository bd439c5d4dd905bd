"""Shapes of curves: healthy, noisy, oscillating, diverging, overfitting, exploding, too slow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest

from search import records
from search.diagnosis import (
    Curve,
    diagnose,
    leaf,
    messages,
)
from search.records import StepRecord
from tests.search.diagnosis.curves import (
    FALLING,
    FALLING_VAL,
    Losses,
    curve,
    ids,
    only,
)


def test_a_falling_curve_is_healthy() -> None:
    finding = only(curve(FALLING, FALLING_VAL))
    assert (finding.id, finding.severity) == ("healthy", "info")
    assert leaf([finding]).name == "good"


@pytest.mark.parametrize("at", [3, 4, 5, 6, 7])
def test_one_noisy_epoch_is_healthy(at: int) -> None:
    val = [v * (1.012 if i == at else 1.0) for i, v in enumerate(FALLING_VAL)]
    assert ids(curve(FALLING, val)) == ["healthy"]


def test_a_late_new_best_after_two_flat_epochs_is_healthy() -> None:
    val = [1.7, 1.58, 1.53, 1.50, 1.502, 1.503, 1.495, 1.494]
    assert ids(curve(FALLING, val)) == ["healthy"]


def test_a_loss_that_jumps_and_comes_back_is_healthy_and_says_so() -> None:
    train = [1.9, 1.7, 1.62, 2.4, 1.58, 1.56, 1.555, 1.55]
    val = [1.7, 1.58, 1.53, 2.2, 1.50, 1.49, 1.488, 1.487]
    finding = only(curve(train, val))
    assert finding.id == "healthy"
    assert (finding.evidence["jump_epoch"], finding.evidence["back_epoch"]) == (4, 5)


def test_a_loss_that_keeps_jumping_oscillates() -> None:
    train = [1.9, 1.7, 1.8, 1.68, 1.79, 1.66, 1.65, 1.64]
    finding = only(curve(train, FALLING_VAL, rate=1e-3))
    assert (finding.id, finding.kind, finding.cause) == ("oscillating", "swinging_train", "high_rate")
    assert finding.evidence["times"] == 2


def test_a_validation_loss_that_keeps_jumping_oscillates() -> None:
    val = [1.7, 1.58, 1.66, 1.55, 1.64, 1.50, 1.49, 1.489]
    finding = only(curve(FALLING, val))
    assert (finding.id, finding.kind) == ("oscillating", "swinging_val")


def test_a_collapse_to_a_plateau_has_diverged() -> None:
    train = [1.9, 1.7, 1.62, 4.1, 4.12, 4.1, 4.11, 4.1]
    val = [1.7, 1.58, 1.53, 4.0, 4.01, 4.0, 4.0, 4.0]
    finding = only(curve(train, val))
    assert (finding.id, finding.kind, finding.epoch) == ("diverged", "plateau", 4)
    assert leaf([finding]).name == "unstable"


@pytest.mark.parametrize(
    ("train", "val"), [([1.8, 1.7], [1.6, 1.5]), ([1.8, 1.7], [1.5, 1.6]), ([1.7, 1.74], [1.5, 1.53]), ([1.8], [1.6])]
)
def test_two_epochs_are_not_enough_to_tell(train: Losses, val: Losses) -> None:
    finding = only(curve(train, val))
    assert finding.id == "inconclusive"
    assert finding.advice[0].after == 3
    assert leaf([finding]).name == "undecided"


@pytest.mark.parametrize("later", [[3.0], [1.801, 3.0]])
def test_two_epochs_are_enough_to_see_both_losses_explode(later: list[float]) -> None:
    """Such a run has gained nothing that it could give back."""
    finding = only(curve([1.8, *later], [1.6, *(value - 0.1 for value in later)]))
    assert (finding.id, finding.kind) == ("diverged", "jump_from_first")
    assert "rose above its first value, from 1.8 (epoch 1) to 3" in messages.sentence(finding)
    assert not any(
        "gain" in messages.sentence(finding, lang) or "100" in messages.sentence(finding, lang)
        for lang in messages.LANGS
    )


def test_no_epoch_at_all() -> None:
    finding = only(Curve(reason=records.OUT_OF_MEMORY))
    assert (finding.id, finding.kind) == ("inconclusive", "none")
    assert "it ended: out of memory" in messages.sentence(finding)


def test_missing_values_are_skipped() -> None:
    train = [None if i == 2 else t for i, t in enumerate(FALLING)]
    val = [None if i in (1, 7) else v for i, v in enumerate(FALLING_VAL)]
    assert ids(curve(train, val)) == ["healthy"]
    assert only(curve(FALLING)).kind == "falls_train"
    assert only(curve([None] * 8, FALLING_VAL)).id == "healthy"
    assert only(curve([None] * 6, [1.5, 1.4, 1.45, 1.5, 1.55, 1.6])).kind == "val_only"


def test_nan_in_a_curve_is_non_finite() -> None:
    finding = only(curve([1.9, 1.7, math.nan], [1.7, 1.6, math.nan], config={"torch_dtype": "float32"}))
    assert (finding.id, finding.epoch, finding.evidence["value"]) == ("non_finite", 3, "nan")
    assert [a.parameter for a in finding.advice] == ["learning_rate", "max_grad_norm"]


def test_validation_rises_while_training_falls() -> None:
    train = [1.9, 1.7, 1.5, 1.3, 1.1, 0.9]
    val = [1.7, 1.6, 1.62, 1.66, 1.71, 1.77]
    finding = only(curve(train, val))
    assert (finding.id, finding.epoch, finding.kind) == ("overfitting", 3, "falling")
    assert finding.advice[-1].after == 2


def test_a_slow_steady_rise_is_seen() -> None:
    val = [1.7, 1.6, *[1.6 * (1 + 0.003 * n) for n in range(1, 7)]]
    assert ids(curve([1.9 - 0.05 * n for n in range(8)], val)) == ["overfitting"]


def test_both_losses_up_is_divergence_not_overfitting() -> None:
    train = [1.9, 1.7, 1.65, 1.8, 1.95, 2.2]
    val = [1.7, 1.6, 1.58, 1.7, 1.85, 2.1]
    assert ids(curve(train, val)) == ["diverged"]


def test_a_small_rise_of_both_at_the_end_is_no_divergence() -> None:
    train = [1.7757, 1.6245, 1.5979, 1.5826, 1.5627, 1.5872]
    val = [1.5205, 1.4935, 1.4682, 1.4555, 1.4498, 1.4687]
    assert ids(curve(train, val, rate=8e-4)) == ["oscillating"]


@pytest.mark.parametrize(
    ("rate", "cause", "parameter", "after", "ends_in"),
    [
        (5e-6, None, "learning_rate", 2e-4, "not_falling"),
        (5e-3, "high_rate", "learning_rate", 2e-4, "rate_too_high"),
        (2e-4, None, "learning_rate", 4e-4, "not_falling"),
    ],
)
def test_never_falling(rate: float, cause: str | None, parameter: str, after: float, ends_in: str) -> None:
    flat = [2.300, 2.302, 2.299, 2.301, 2.298, 2.300]
    finding = only(curve(flat, flat, rate=rate))
    assert (finding.id, finding.cause) == ("not_learning", cause)
    assert (finding.advice[0].parameter, finding.advice[0].after) == (parameter, after)
    assert leaf([finding]).name == ends_in


def test_a_run_that_learned_all_in_its_first_epoch_is_not_called_unlearning() -> None:
    flat = [1.50, 1.501, 1.499, 1.5, 1.501, 1.5]
    losses = [max(1.5, 3.0 - 0.05 * n) + 0.05 * (-1) ** n for n in range(300)]
    steps = tuple(StepRecord(step=n + 1, loss=value) for n, value in enumerate(losses))
    assert ids(curve(flat, flat, steps=steps)) == ["healthy"]
    assert ids(curve(flat, flat)) == ["not_learning"]


@pytest.mark.parametrize("val", [[1.4] * 5, [1.4, 1.405, 1.408, 1.41, 1.412]])
def test_a_validation_loss_that_never_fell_is_not_said_to_have_fallen(val: list[float]) -> None:
    finding = only(curve([2.0, 1.4, 1.1, 0.9, 0.8], val))
    assert (finding.id, finding.kind) == ("healthy", "never_fell_val")
    sentence = messages.sentence(finding)
    assert sentence.startswith("the validation loss never fell below its first value, 1.4 at epoch 1; since then")
    assert "降到" not in messages.sentence(finding, "zh")
    finding = only(curve([2.0, 1.4, 1.1, 0.9, 0.895, 0.894, 0.893], [None] * 6 + val[:1]))
    assert messages.sentence(finding).startswith("only one validation loss was recorded, 1.4 at epoch 7")


def test_a_training_loss_that_never_fell_after_its_first_epoch_is_not_said_to_have_fallen() -> None:
    losses = [max(1.5, 3.0 - 0.05 * n) + 0.05 * (-1) ** n for n in range(300)]
    steps = tuple(StepRecord(step=n + 1, loss=value) for n, value in enumerate(losses))
    finding = only(curve([1.5, 1.501, 1.502, 1.501], steps=steps))
    assert messages.sentence(finding).startswith("the training loss never fell below its first value, 1.5 at epoch 1")


def test_a_run_that_is_told_to_train_longer_is_not_told_to_raise_its_rate() -> None:
    """Each advice has its own place in the tree, and one cause decides both."""
    val = [1.9, 1.7, 1.6, 1.54]
    longer, line = only(curve(val, val)), only(curve([2.3 - 0.05 * n for n in range(10)], rate=5e-6))
    for finding, place, parameter in ((longer, "longer", "num_epochs"), (line, "not_falling", "learning_rate")):
        assert leaf([finding]).name == place
        assert finding.advice[0].parameter == parameter
        assert ("num_epochs" in {a.parameter for a in finding.advice}) == (place == "longer")


def test_a_noisier_study_judges_by_its_own_noise() -> None:
    losses = ([0.45, 0.39, 0.36, 0.347, 0.342, 0.338], [0.41, 0.39, 0.379, 0.3705, 0.3707, 0.3815])
    assert ids(curve(*losses)) == ["overfitting"]
    assert ids(curve(*losses, val_noise=0.009)) == ["healthy"]


def test_a_straight_line_down_is_too_slow_however_little_it_gains() -> None:
    train = [2.3 - 0.005 * n for n in range(10)]
    assert ids(curve(train, train, rate=5e-6)) == ["too_slow"]


def test_a_run_cut_short_is_not_blamed_for_it() -> None:
    val = [1.9, 1.7, 1.6, 1.54]
    assert ids(curve(val, val)) == ["too_slow"]
    finding = only(curve(val, val, config={"num_epochs": 15}))
    assert finding.id == "healthy"
    assert finding.advice[0].action == "finish"


def stepped(norms: Sequence[float], bound: float = 1.0) -> Curve:
    steps = tuple(StepRecord(step=n + 1, loss=1.5, grad_norm=norm) for n, norm in enumerate(norms))
    return curve(FALLING, FALLING_VAL, steps=steps, config={"max_grad_norm": bound})


def test_a_gradient_norm_that_grows_by_orders_explodes() -> None:
    finding = only(stepped([0.5 * 1.05**n for n in range(100)]))
    assert (finding.id, finding.kind) == ("exploding_gradient", "steps")
    assert finding.evidence["clipped_fraction"] == pytest.approx(0.85)
    assert finding.evidence["growth"] > 10
    assert leaf([finding]).name == "unstable"


def test_what_was_high_at_first_and_settled_explodes_where_it_grows() -> None:
    finding = only(stepped([50.0] * 10 + [20.0] * 10 + [2.0] * 10 + [1.0] * 60 + [12.0] * 10))
    assert (finding.id, finding.step) == ("exploding_gradient", 91)


def test_constant_clipping_is_harmless_and_said() -> None:
    finding = only(stepped([3.0] * 100))
    assert (finding.id, finding.evidence["clipped_fraction"]) == ("healthy", 1.0)
    assert "100 % of the steps were clipped" in messages.sentence(finding)


def test_one_spike_of_the_gradient_is_no_explosion() -> None:
    assert ids(stepped([0.5] * 60 + [1e4] + [0.5] * 39)) == ["healthy"]


def test_growth_below_the_clipping_bound_is_no_explosion() -> None:
    assert ids(stepped([0.001 * 1.05**n for n in range(100)])) == ["healthy"]


def test_exploding_gradient_by_epoch_is_the_cause_of_the_divergence() -> None:
    found = curve([1.9, 1.7, 1.65, 2.4, 3.5], [1.7, 1.6, 1.58, 2.3, 3.4])
    norms = (0.5, 0.5, 0.6, 40.0, 300.0)
    rows = [replace(r, grad_norm_mean=n) for r, n in zip(found.epochs, norms, strict=True)]
    exploding, diverged = diagnose(replace(found, epochs=tuple(rows)))
    assert (exploding.id, exploding.kind, exploding.severity) == ("exploding_gradient", "epochs", "error")
    assert (diverged.id, diverged.cause) == ("diverged", "exploding_gradient")


def test_what_the_pruner_stopped_as_diverged_is_called_so() -> None:
    found = curve([1.9, 1.7, 1.8], [1.7, 1.6, 1.7], reason=records.DIVERGED)
    assert "diverged" in ids(found)
