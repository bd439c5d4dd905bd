"""What holds of any curve."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from search.diagnosis import (
    IDS,
    Curve,
    Finding,
    diagnose,
    leaf,
    messages,
)
from search.diagnosis.noise import VAL_NOISE, limit
from search.diagnosis.tree import LEAVES
from search.records import EpochRecord, StepRecord
from tests.search.diagnosis.curves import (
    FACTS,
    curve,
    ids,
)
from trainer.config import TrainConfig

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


@pytest.mark.long
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
