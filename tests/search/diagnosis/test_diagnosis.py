"""The diagnosis against the hand-run log's readings, curves of every shape, and properties that must always hold."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search import records
from search.diagnosis import (
    IDS,
    TREE,
    Curve,
    Finding,
    NonFiniteFacts,
    curve_from_events,
    curve_from_record,
    diagnose,
    leaf,
    messages,
    primary,
    texts,
    tree_texts,
)
from search.diagnosis.noise import VAL_NOISE, limit, log_gain, series
from search.diagnosis.recorded import curves, read_runs
from search.diagnosis.tree import LEAVES
from search.records import EpochRecord, StepRecord, TrialRecord
from trainer.config import TrainConfig
from trainer.events import (
    Diverged,
    EpochEnded,
    EpochTiming,
    Event,
    NonFinite,
    OutOfMemory,
    RunStarted,
    StepEnded,
    StepTiming,
)

RECORDED = Path(__file__).parents[2] / "data" / "recorded-runs.json"
Losses = Sequence[float | None]


def curve(train: Losses, val: Losses = (), *, rate: float = 2e-4, epochs: Sequence[int] = (), **more: Any) -> Curve:
    """A curve of these losses; the configuration is the log's experiment 4 unless `config` says otherwise."""
    numbers = epochs or range(1, len(train) + 1)
    values = [*val, *[None] * (len(train) - len(val))]
    config = {"learning_rate": rate, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "num_epochs": len(train)}
    config |= more.pop("config", {})
    rows = zip(numbers, train, values, strict=True)
    return Curve(
        config=config, epochs=tuple(EpochRecord(epoch=e, train_loss=t, val_loss=v) for e, t, v in rows), **more
    )


def ids(found: Curve) -> list[str]:
    return [finding.id for finding in diagnose(found)]


def only(found: Curve) -> Finding:
    (finding,) = diagnose(found)
    return finding


def moves(finding: Finding) -> list[tuple[str, Any, Any]]:
    return [(a.parameter, a.before, a.after) for a in finding.advice]


FALLING = [1.9, 1.7, 1.62, 1.58, 1.56, 1.55, 1.545, 1.54]
FALLING_VAL = [1.7, 1.58, 1.53, 1.50, 1.49, 1.485, 1.483, 1.482]


# --- the hand-run log's experiments -------------------------------------------------------------------------------


def test_experiment_1_names_the_mechanism() -> None:
    config = TrainConfig(learning_rate=5e-6, lora_r=4, lora_alpha=8, torch_dtype="float16", batch_size=2)
    cause = NonFinite(
        tensor="param: qformer.query.lora_A.default.weight",
        value="nan",
        after_update=True,
        detail="the gradient there was exactly 0 (both moments are 0); eps 1e-08 is 0 in float16",
    )
    events: list[Event] = [step(1, 2.386719), *(step(n, math.nan, nonfinite=cause) for n in (2, 3, 4))]
    events.append(Diverged(step=4, epoch=1, first_bad_step=2, cause=cause))
    finding = only(curve_from_events(config, events))
    assert (finding.id, finding.severity, finding.step) == ("non_finite", "error", 2)
    assert finding.cause == "zero_over_zero"
    assert finding.evidence["last_finite_step"] == 1
    assert finding.evidence["last_finite_loss"] == 2.386719
    assert finding.evidence["adam_epsilon_rounded"] == 0.0
    assert finding.evidence["bad_steps"] == 3
    assert "step 1 was still good, loss 2.3867" in messages.sentence(finding)
    assert messages.advices(finding.advice) == (
        "set torch_dtype: float16 → float32",
        "or keep only the adapters in float32",
        "raise adam_epsilon: 1e-8 → 1e-4",
    )
    assert leaf([finding]).name == "non_finite"


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"detail": "the gradient's square underflowed to 0"}, "square_underflow"),
        ({"detail": "nothing measured"}, "float16_range"),
        ({"after_update": False, "tensor": "loss"}, "float16_range"),
    ],
)
def test_a_mechanism_is_only_named_where_it_was_measured(changes: dict[str, Any], cause: str) -> None:
    values = {
        "tensor": "param: a.lora_A.weight",
        "value": "nan",
        "after_update": True,
        "detail": "exactly 0",
    } | changes
    bad = NonFinite(**values)
    events = [step(1, 2.4), step(2, math.nan, nonfinite=bad), Diverged(step=2, epoch=1, first_bad_step=2, cause=bad)]
    finding = only(curve_from_events(TrainConfig(torch_dtype="float16"), events))
    assert finding.cause == cause


def test_a_larger_eps_is_not_called_zero() -> None:
    bad = NonFinite(tensor="param: a.lora_A.weight", value="nan", after_update=True, detail="exactly 0")
    config = TrainConfig(torch_dtype="float16", adam_epsilon=1e-4)
    finding = only(curve_from_events(config, [Diverged(step=2, epoch=1, first_bad_step=2, cause=bad)]))
    assert finding.cause == "float16_range"


def test_experiment_2_is_stable_and_too_slow() -> None:
    config = {"num_epochs": 10, "lora_r": 8, "lora_alpha": 16, "warmup_steps": 0}
    found = curve([2.06, 1.78, 1.55], [1.74, 1.61, 1.50], epochs=[1, 2, 10], rate=5e-6, config=config)
    finding = only(found)
    # One run alone does not show that its rate is too low: a study's other trials do (search.report.judged).
    assert (finding.id, finding.cause) == ("too_slow", None)
    assert moves(finding) == [("num_epochs", 10, 20)]
    assert leaf([finding]).path == (("nan", False), ("enough", True), ("falling", False), ("enough_rate", True))
    assert leaf([finding]).name == "longer"
    shown = replace(finding, cause="low_rate")
    assert (leaf([shown]).name, leaf([shown]).path[-1]) == ("not_falling", ("rate", False))


def test_experiment_3_overfits_from_epoch_3_and_diverges_at_4() -> None:
    found = curve([1.89, 1.71, 1.69, 1.87], [1.63, 1.57, 1.60], rate=1e-3, config={"num_epochs": 15})
    (diverged,) = diagnose(found)
    assert (diverged.id, diverged.epoch, diverged.cause) == ("diverged", 4, "high_rate")
    assert diverged.evidence["given_back"] == pytest.approx(0.9)
    assert "; the validation loss left its best, 1.57 (epoch 2), at epoch 3" in messages.sentence(diverged)
    # The log's order: lower rate (experiment 4 took 2e-4), smaller rank, more dropout.
    assert moves(diverged) == [
        ("learning_rate", 1e-3, 2e-4),
        ("lora_r", 16, 8),
        ("lora_alpha", 32, 16),
        ("lora_dropout", 0.05, 0.1),
        ("num_epochs", None, 2),
    ]
    assert leaf([diverged]).findings == ("diverged",)
    # Without the fourth epoch it is what its third showed.
    (before,) = diagnose(curve([1.89, 1.71, 1.69], [1.63, 1.57, 1.60], rate=1e-3, config={"num_epochs": 15}))
    assert (before.id, before.epoch, before.kind) == ("overfitting", 3, "falling")
    assert primary([before, diverged]) == diverged


def timed(seconds: float, wait: float, evaluation: float, **more: Any) -> Curve:
    found = curve(FALLING, FALLING_VAL, **more)
    rows = [
        replace(r, epoch_seconds=seconds, data_wait_fraction=wait, eval_seconds=evaluation * seconds)
        for r in found.epochs
    ]
    return replace(found, epochs=tuple(rows))


def test_experiment_5_is_slow_and_says_where_the_time_went() -> None:
    config = {"batch_size": 8, "num_workers": 0, "warmup_steps": 200, "num_epochs": 15}
    found = diagnose(replace(timed(1200.0, 0.6, 0.1, config=config), total_steps=150))
    by_id = {finding.id: finding for finding in found}
    slow = by_id["slow_epoch"]
    assert (slow.kind, slow.cause) == ("clock", "waits_for_data")
    assert slow.evidence["wait_share"] == pytest.approx(0.54)
    assert slow.evidence["compute_share"] == pytest.approx(0.36)
    assert slow.evidence["eval_share"] == pytest.approx(0.1)
    assert moves(slow) == [("num_workers", 0, 4), ("batch_size", 8, 16)]  # what experiment 5b changed
    warmup = by_id["warmup_exceeds_training"]
    assert warmup.evidence["total_steps"] == 150
    assert warmup.evidence["highest_rate"] == pytest.approx(2e-4 * 149 / 200)
    assert leaf(found).name == "good"  # both are faults of the plan, not of the curve


@pytest.mark.parametrize(
    ("wait", "evaluation", "cause", "first"),
    [(0.02, 0.1, "computes", "batch_size"), (0.1, 0.6, "evaluation", "val_fraction")],
)
def test_advice_against_slow_epochs_follows_the_shares(wait: float, evaluation: float, cause: str, first: str) -> None:
    config = {"batch_size": 8, "num_workers": 0, "val_fraction": 0.2}
    slow = diagnose(timed(1200.0, wait, evaluation, config=config))[-1]
    assert (slow.cause, slow.advice[0].parameter) == (cause, first)
    assert "num_workers" not in [a.parameter for a in slow.advice]  # nothing waits: workers would not help


def test_an_epoch_as_long_as_5b_aimed_at_is_not_slow() -> None:
    assert ids(timed(600.0, 0.1, 0.1)) == ["healthy"]


def test_a_short_epoch_that_waits_is_worth_a_word_only() -> None:
    assert [(f.id, f.severity) for f in diagnose(timed(3.0, 0.5, 0.1))][-1] == ("slow_epoch", "info")


@pytest.mark.parametrize(("peers", "slow"), [(0.07, True), (0.5, False), (1e-313, False), (0.0, False)])
def test_slow_against_comparable_runs(peers: float, slow: bool) -> None:
    found = timed(130.0, 0.0, 0.1, config={"max_samples": 200}, peer_seconds_per_sample=peers)
    assert ("slow_epoch" in ids(found)) is slow


def test_tiny_runs_are_not_slow_for_starting_up() -> None:
    found = timed(2.3, 0.0, 0.1, config={"max_samples": 10}, peer_seconds_per_sample=0.07)
    assert "slow_epoch" not in ids(found)


def test_warmup_from_the_configuration_alone() -> None:
    config = {"max_samples": 100, "batch_size": 8, "num_epochs": 15, "warmup_steps": 200, "val_fraction": 0.2}
    warmup = diagnose(curve(FALLING, FALLING_VAL, config=config))[-1]
    # 80 training samples are 10 batches. (The log counts 187 steps: all 100 samples, the last batch in part.)
    assert (warmup.id, warmup.kind, warmup.evidence["total_steps"]) == (
        "warmup_exceeds_training",
        "configuration",
        150,
    )
    assert ids(curve(FALLING, FALLING_VAL, config=config | {"warmup_steps": 149})) == ["healthy"]


# --- shapes -------------------------------------------------------------------------------------------------------


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


def test_two_epochs_are_enough_to_see_both_losses_explode() -> None:
    assert ids(curve([1.8, 3.0], [1.6, 2.9])) == ["diverged"]


def test_no_epoch_at_all() -> None:
    finding = only(Curve(reason=records.OUT_OF_MEMORY))
    assert (finding.id, finding.kind) == ("inconclusive", "none")
    assert "out_of_memory" in messages.sentence(finding)


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


# --- the recorded real runs ---------------------------------------------------------------------------------------


RECORDED_FINDINGS = {
    "grid_v1_large_batch_high_lr_SKIPPED": ["oscillating"],
    "grid_v2_medium_batch_high_rank": ["healthy"],
    "grid_v3_ultra_batch_conservative_SKIPPED": ["too_slow"],
    "grid_v6_exp1_r16_a64_d05_cosine_augmented": ["too_slow"],
    "grid_v6_exp2_r16_a32_d10_linear": ["healthy"],
    "grid_v6_exp2_r16_a48_d10_linear_augmented": ["too_slow"],
    "grid_v6_exp4_r24_a48_d05_cosine_augmented": ["too_slow"],
    "lora_r8_alpha16": ["too_slow", "slow_epoch"],
    "quick_test_epoch0": ["inconclusive"],
    "ultra_conservative_lora_instructblip": ["too_slow"],
}


def test_the_recorded_runs() -> None:
    assert {name: ids(found) for name, found in curves(read_runs(RECORDED))} == RECORDED_FINDINGS


def test_the_noise_is_what_was_measured() -> None:
    """Second differences of validation loss over all recorded runs, as docs/diagnosis.md says."""
    left = []
    for _, found in curves(read_runs(RECORDED)):
        v = [r.val_loss for r in found.epochs if r.val_loss is not None]
        bends = [(v[i - 1] - 2 * v[i] + v[i + 1]) / v[i] for i in range(1, len(v) - 1)]
        left += bends[1:] if len(v) < 8 else bends[2:]
    measured = math.sqrt(sum(d * d for d in left) / len(left) / 6)
    assert len(left) == 61
    assert measured == pytest.approx(VAL_NOISE, rel=0.1)


def test_the_log_law_foretells_the_recorded_gains() -> None:
    """From a prefix, the gain of half as many epochs again; a straight line would promise nearly twice as much."""
    foretold, came = [], []
    for _, found in curves(read_runs(RECORDED)):
        points = series((r.epoch, r.val_loss) for r in found.epochs)
        for n in range(4, len(points)):
            until = round(1.5 * n)
            if until > len(points):
                break
            foretold.append(log_gain(points[:n]) * math.log(until / n))
            came.append(1 - points[until - 1][1] / points[n - 1][1])
    assert len(came) == 36
    assert sum(foretold) / len(came) == pytest.approx(sum(came) / len(came), rel=0.15)


# --- values, adapters, texts --------------------------------------------------------------------------------------


def step(number: int, loss: float, nonfinite: NonFinite | None = None, norm: float = 0.5) -> StepEnded:
    return StepEnded(
        step=number,
        epoch=1,
        loss=loss,
        grad_norm=norm,
        learning_rate=5e-6,
        num_samples=2,
        num_tokens=100,
        nonfinite=nonfinite,
        timing=StepTiming(step_s=1.0, data_wait_s=0.1),
    )


def started() -> RunStarted:
    return RunStarted(
        num_train_samples=80,
        num_val_samples=20,
        steps_per_epoch=10,
        total_steps=30,
        warmup_steps=200,
        trainable_parameters=1,
        adapted_modules=("a",),
        skipped_rows=(),
        data_fingerprint="d",
        model_fingerprint="m",
        device="cpu",
        num_threads=1,
        resumed_from_epoch=0,
    )


def ended(epoch: int, train: float, val: float) -> EpochEnded:
    timing = EpochTiming(
        epoch_s=100, train_s=80, data_wait_s=40, eval_s=15, checkpoint_s=5, samples_per_s=1, peak_memory_gib=1
    )
    return EpochEnded(
        epoch=epoch,
        step=10 * epoch,
        train_loss=train,
        val_loss=val,
        learning_rate=1e-4,
        grad_norm_mean=0.5,
        grad_norm_max=0.9,
        nonfinite_steps=0,
        timing=timing,
    )


def test_a_curve_from_events() -> None:
    config = TrainConfig(num_epochs=3, warmup_steps=200)
    events = [started(), step(1, 2.0), *(ended(n, 2.0 - 0.2 * n, 1.9 - 0.2 * n) for n in (1, 2, 3))]
    found = curve_from_events(config, events)
    assert (found.num_samples, found.total_steps, len(found.epochs), len(found.steps)) == (100, 30, 3, 1)
    assert found.epochs[0].data_wait_fraction == 0.5
    by_id = {f.id: f for f in diagnose(found)}
    assert by_id["warmup_exceeds_training"].kind == "run"
    assert by_id["slow_epoch"].evidence["wait_share"] == pytest.approx(0.5 * 0.85)


def test_one_bad_step_that_was_skipped_is_a_warning() -> None:
    bad = NonFinite(tensor="grad: a", value="inf", after_update=False, detail="the loss 1.95 was finite")
    events = [step(1, 2.0), step(2, 1.95, nonfinite=bad), step(3, 1.9)]
    finding = diagnose(curve_from_events(TrainConfig(), events))[0]
    assert (finding.id, finding.severity, finding.evidence["ended"]) == ("non_finite", "warning", False)
    assert (finding.evidence["last_finite_step"], finding.evidence["last_finite_loss"]) == (1, 2.0)


def test_out_of_memory_is_the_reason() -> None:
    found = curve_from_events(TrainConfig(), [OutOfMemory(step=1, detail="2 GiB asked for")])
    assert found.reason == records.OUT_OF_MEMORY


FACTS = NonFiniteFacts(
    step=2,
    epoch=1,
    tensor="param: a.lora_A.weight",
    value="nan",
    after_update=True,
    measured="the gradient there was exactly 0",
    bad_steps=3,
    ended=True,
    last_finite_step=1,
    last_finite_loss=2.38,
)


def trial(attrs: dict[str, Any], **more: Any) -> TrialRecord:
    values: dict[str, Any] = {"state": "PRUNED", "value": None, "params": {}, "reason": None, "detail": None}
    values |= {"best_epoch": None, "stopped_early": False, "violated": (), "start_s": None, "end_s": None}
    values |= {"run_id": None, "config": TrainConfig(torch_dtype="float16").model_dump(mode="json")} | more
    return TrialRecord(number=0, attrs=attrs, **values)


def test_a_record_says_the_same_as_the_events_did() -> None:
    config = TrainConfig(torch_dtype="float16").model_dump(mode="json")
    before = diagnose(Curve(config=config, nonfinite=FACTS, reason=records.NON_FINITE))
    stored = json.loads(json.dumps([finding.to_dict() for finding in before]))
    record = trial({records.FINDINGS: stored}, reason=records.NON_FINITE)
    assert diagnose(curve_from_record(record)) == before
    assert before[0].cause == "zero_over_zero"


@pytest.mark.parametrize("findings", [None, "x", [], [1], [{"id": "non_finite"}], [{"id": "healthy", "evidence": {}}]])
def test_a_record_without_facts_still_has_its_reason(findings: Any) -> None:
    record = trial({records.FINDINGS: findings}, reason=records.NON_FINITE, detail="3 steps in a row")
    finding = only(curve_from_record(record))
    assert (finding.id, finding.kind, finding.evidence["measured"]) == ("non_finite", "unknown", "3 steps in a row")


def test_unknown_ids_and_severities_are_refused() -> None:
    with pytest.raises(ValueError, match="'fine'"):
        Finding(id="fine", kind="x", severity="info")
    with pytest.raises(ValueError, match="'bad'"):
        Finding(id="healthy", kind="x", severity="bad")  # type: ignore[arg-type]


def test_every_text_exists_in_both_languages() -> None:
    assert set(texts.TITLES) == {*IDS, messages.STILL_FALLING}
    assert {key.split(".")[0] for key in texts.SENTENCES} == set(IDS)
    assert set(tree_texts.QUESTIONS) == {node.name for node in TREE}
    assert set(tree_texts.LEAVES) == set(LEAVES)
    words = (texts.TITLES, texts.SENTENCES, texts.CAUSES, texts.ACTIONS, tree_texts.QUESTIONS, tree_texts.LEAVES)
    for table in words:
        for english, chinese in table.values():
            assert english.isascii() and english
            assert not chinese.isascii()


def test_the_tree_is_closed() -> None:
    names = {node.name for node in TREE}
    ends = {end for node in TREE for end in (node.yes, node.no)} - names
    assert ends == set(LEAVES)
    assert leaf([]).name == "undecided"


@pytest.mark.parametrize(
    ("value", "text"), [(2e-4, "2e-4"), (5e-6, "5e-6"), (1e-3, "1e-3"), (5.57e-5, "5.57e-5"), (0.01, "0.01"), (0, "0")]
)
def test_rates_read_as_in_the_log(value: float, text: str) -> None:
    assert messages.rate(value) == text


def test_chinese_reads_the_same_facts() -> None:
    found = curve([1.89, 1.71, 1.69, 1.87], [1.63, 1.57, 1.60], rate=1e-3)
    text = messages.sentence(diagnose(found)[0], "zh")
    assert "；验证 loss 在 epoch 2 达到最佳 1.57，从 epoch 3 起上升" in text
    assert messages.advice(diagnose(found)[0].advice[0], "zh") == "降低 learning_rate：1e-3 → 2e-4"


# --- properties ---------------------------------------------------------------------------------------------------

anything = st.none() | st.floats()
plausible = st.none() | st.floats(0.1, 10) | st.just(math.nan)


@st.composite
def any_curve(draw: st.DrawFn) -> Curve:
    value = draw(st.sampled_from([anything, plausible]))
    rows = draw(st.lists(st.tuples(st.integers(-1, 30), *[value] * 8), max_size=12))
    steps = draw(st.lists(st.tuples(st.integers(0, 500), value, value, value), max_size=60))
    names = sorted({*TrainConfig.model_fields, "other"})
    settings_ = draw(st.dictionaries(st.sampled_from(names), anything | st.integers() | st.text() | st.booleans()))
    fields = ("train_loss", "val_loss", "learning_rate", "grad_norm_mean", "epoch_seconds", "eval_seconds")
    reasons = (None, "finished", "rising", "diverged", "non_finite", "out_of_memory", "lost", "else")
    return Curve(
        config=settings_,
        epochs=tuple(EpochRecord(epoch=row[0], **dict(zip(fields, row[1:7], strict=True))) for row in rows),
        steps=tuple(StepRecord(step=n, loss=x, grad_norm=g, learning_rate=r) for n, x, g, r in steps),
        nonfinite=draw(st.none() | st.just(FACTS)),
        reason=draw(st.sampled_from(reasons)),
        num_samples=draw(st.none() | st.integers(0, 10**9)),
        total_steps=draw(st.none() | st.integers(0, 10**9)),
        peer_seconds_per_sample=draw(st.none() | st.floats(0, 1e6)),
    )


CURVE_IDS = set(IDS) - {"healthy", "inconclusive", "warmup_exceeds_training", "slow_epoch"}


@settings(max_examples=400, deadline=None)
@given(any_curve())
def test_any_curve_is_diagnosed(found: Curve) -> None:
    findings = diagnose(found)
    names = [f.id for f in findings]
    assert findings == diagnose(found)
    assert names == sorted(set(names), key=IDS.index)
    assert ("healthy" in names) + ("inconclusive" in names) + bool(CURVE_IDS & set(names)) == 1
    assert leaf(findings).name in LEAVES
    assert ("healthy" in names) == (leaf(findings).name == "good")
    for finding in findings:
        plain = json.loads(json.dumps(finding.to_dict(), allow_nan=False))
        assert Finding.from_dict(plain) == finding
        for lang in messages.LANGS:
            assert messages.sentence(finding, lang)
            assert "\n" not in messages.sentence(finding, lang) and "\t" not in messages.sentence(finding, lang)
            assert messages.cause(finding, lang) != ""
            assert all(messages.advices(finding.advice, lang))


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(4, 20),
    first=st.floats(1.2, 4),
    share=st.floats(0.05, 0.4),
    noise=st.lists(st.floats(-1, 1), min_size=40, max_size=40),
)
def test_noise_below_the_threshold_never_makes_a_falling_curve_overfit(
    n: int, first: float, share: float, noise: list[float]
) -> None:
    smooth = [first * (1 - share * math.log(e) / math.log(n)) for e in range(1, n + 1)]
    train = [v * (1 + 0.002 * e) for v, e in zip(smooth, noise, strict=False)]
    val = [0.95 * v * (1 + VAL_NOISE * e) for v, e in zip(smooth, noise[20:], strict=False)]
    assert {"overfitting", "diverged", "oscillating"}.isdisjoint(ids(curve(train, val)))


@given(st.floats(1e-3, 1e3), st.lists(st.floats(0.5, 4), min_size=3, max_size=10))
def test_the_scale_of_the_loss_does_not_matter(scale: float, losses: list[float]) -> None:
    """Thresholds are shares of the loss: a per-token loss of another vocabulary is judged the same."""
    close = any(
        abs(abs(a / b - 1) - limit(noise, n)) < 1e-6
        for a in losses
        for b in losses
        for noise in (0.002, VAL_NOISE)
        for n in range(1, 10)
    )
    if not close and len(set(losses)) == len(losses):
        assert ids(curve([scale * v for v in losses])) == ids(curve(losses))


def test_a_line_that_falls_by_less_than_noise_at_every_epoch_is_too_slow() -> None:
    """The embedded model at 5e-6: ten epochs, each a little lower, 1.2 % in all; training loss is dropout's noise."""
    val = [0.4803, 0.4797, 0.4790, 0.4783, 0.4777, 0.4770, 0.4764, 0.4758, 0.4751, 0.4745]
    train = [0.5317, 0.5441, 0.5433, 0.5509, 0.5437, 0.5324, 0.5579, 0.5574, 0.5464, 0.5459]
    config = {"learning_rate": 5e-6, "num_epochs": 10, "max_samples": 100}
    epochs = tuple(
        EpochRecord(epoch=i + 1, train_loss=t, val_loss=v) for i, (t, v) in enumerate(zip(train, val, strict=True))
    )
    (found,) = diagnose(Curve(config=config, epochs=epochs))
    assert (found.id, found.cause, leaf([found]).name) == ("too_slow", "straight", "not_falling")
    assert "learning_rate" in {advice.parameter for advice in found.advice}
    shuffled = tuple(
        replace(e, val_loss=v) for e, v in zip(epochs, [val[i] for i in (3, 1, 8, 0, 9, 2, 6, 4, 7, 5)], strict=True)
    )
    assert diagnose(Curve(config=config, epochs=shuffled))[0].id == "not_learning"
