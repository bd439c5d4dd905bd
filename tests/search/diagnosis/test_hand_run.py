"""The hand-run log's experiments: the diagnosis says of each what its author found."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from search.diagnosis import (
    Curve,
    curve_from_events,
    diagnose,
    leaf,
    messages,
    primary,
)
from tests.search.diagnosis.curves import (
    FALLING,
    FALLING_VAL,
    curve,
    ids,
    moves,
    only,
    step,
)
from trainer.config import TrainConfig
from trainer.events import (
    Diverged,
    Event,
    NonFinite,
)


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


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ["batch_size"]),
        ({"cache_features": False}, ["num_workers", "batch_size"]),
        ({"target_modules": ("query", "self_attn.qkv")}, ["num_workers", "batch_size"]),
    ],
)
def test_workers_are_advised_where_a_run_has_any(fields: dict[str, Any], expected: list[str]) -> None:
    """With vision outputs kept the trainer has none, whatever `num_workers` says (trainer.member)."""
    config = TrainConfig(batch_size=8, num_workers=0, **fields).model_dump(mode="json")
    slow = next(f for f in diagnose(timed(1200.0, 0.6, 0.1, config=config)) if f.id == "slow_epoch")
    assert [advice.parameter for advice in slow.advice] == expected
    unmeasured = curve(FALLING, FALLING_VAL, config=config)
    rows = tuple(replace(record, epoch_seconds=1200.0) for record in unmeasured.epochs)
    slow = next(f for f in diagnose(replace(unmeasured, epochs=rows)) if f.id == "slow_epoch")
    assert [advice.parameter for advice in slow.advice] == sorted(expected), "the one that helps either way first"


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
