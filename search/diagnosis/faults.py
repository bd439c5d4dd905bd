"""Findings that need no judgement of the loss curve: numbers that broke, and plans that cannot work."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

from search import records
from search.diagnosis import advise
from search.diagnosis.curve import Curve, facts_as_evidence
from search.diagnosis.finding import (
    EXPLODING_GRADIENT,
    NON_FINITE,
    SLOW_EPOCH,
    WARMUP_EXCEEDS_TRAINING,
    Advice,
    Finding,
    Scalar,
)
from search.diagnosis.noise import usable
from trainer.data.loading import takes_vision_from_disk

GROWTH = 10.0
"""The gradient norm explodes when its median grows by an order of magnitude. Medians over a tenth of the run: a single
spike, which clipping handles, does not count. No recorded run has gradient norms, so this is the meaning of the word,
not a measurement."""
WINDOWS = 10
FEWEST_STEPS = 20
"""Steps needed for windows of at least two."""
WAIT_SHARE = 1 / 3
"""Waiting for data counts from a third of the training time: without it an epoch would be half as fast again."""
EVAL_SHARE = 1 / 2
"""Evaluation counts if it takes longer than all else. With a fifth of the rows and no backward pass it normally takes
a tenth."""
PEER_RATIO = 3.0
"""Times the seconds per sample of comparable runs. Recorded runs of full size lie within a factor of 1.4 of each
other."""
LEAST_EXCESS_S = 30.0
"""Seconds that an epoch must lose against comparable runs to be mentioned: starting up makes every tiny run slow."""


def clipped_fraction(curve: Curve) -> float | None:
    """Share of the steps whose gradient was clipped.

    This is not a fault: AdamW divides the gradient by its own size, so clipping every step by about the same factor
    changes little.
    """
    bound = curve.number("max_grad_norm")
    norms = [s.grad_norm for s in curve.steps if s.grad_norm is not None and usable(s.grad_norm)]
    if bound is None or not norms:
        return None
    return sum(norm > bound for norm in norms) / len(norms)


def non_finite(curve: Curve, exploding: bool) -> Finding | None:
    """Loss, gradients or parameters were not finite, from the trainer's facts, the curve or the trial's reason."""
    facts = curve.nonfinite
    if facts is not None:
        cause = _cause(curve, exploding)
        return Finding(
            id=NON_FINITE,
            kind="update" if facts.after_update else "pass",
            severity="error" if facts.ended else "warning",
            epoch=facts.epoch,
            step=facts.step,
            evidence={k: _plain(v) for k, v in facts_as_evidence(facts).items()} | _dtype_evidence(curve),
            cause=cause,
            advice=_non_finite_advice(curve, cause),
        )
    cause = "exploding_gradient" if exploding else None
    for record in curve.epochs:
        for name, value in (("train", record.train_loss), ("val", record.val_loss)):
            if value is not None and not usable(value):
                evidence: dict[str, Scalar] = {"epoch": record.epoch, "value": _plain(value)}
                return Finding(
                    id=NON_FINITE,
                    kind=f"epoch_{name}",
                    severity="error",
                    epoch=record.epoch,
                    evidence=evidence | _dtype_evidence(curve),
                    cause=cause or _dtype_cause(curve),
                    advice=_non_finite_advice(curve, cause),
                )
    if curve.reason != records.NON_FINITE:
        return None
    evidence = {"measured": curve.detail} if curve.detail else {}
    return Finding(
        id=NON_FINITE,
        kind="unknown",
        severity="error",
        evidence=evidence | _dtype_evidence(curve),
        cause=cause or _dtype_cause(curve),
        advice=_non_finite_advice(curve, cause),
    )


def _plain(value: Any) -> Scalar:
    """The value as JSON can hold it: NaN and infinities as words."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)


def _in_float16(value: float) -> float:
    """The value as float16 rounds it (IEEE 754 binary16; below 3e-8 that is 0)."""
    try:
        return float(struct.unpack("e", struct.pack("e", value))[0])
    except OverflowError:
        return math.inf


def _dtype_evidence(curve: Curve) -> dict[str, Scalar]:
    dtype, eps = curve.config.get("torch_dtype"), curve.number("adam_epsilon")
    if not isinstance(dtype, str):
        return {}
    evidence: dict[str, Scalar] = {"torch_dtype": dtype}
    if dtype == "float16" and eps is not None:
        evidence |= {"adam_epsilon": eps, "adam_epsilon_rounded": _plain(_in_float16(eps))}
    return evidence


def _dtype_cause(curve: Curve) -> str | None:
    return "float16_range" if curve.config.get("torch_dtype") == "float16" else None


def _cause(curve: Curve, exploding: bool) -> str | None:
    """The mechanism, if the run shows it: which tensor, after what, and what the trainer found in AdamW's state."""
    facts, eps = curve.nonfinite, curve.number("adam_epsilon")
    assert facts is not None
    half = curve.config.get("torch_dtype") == "float16"
    if half and facts.after_update and eps is not None and _in_float16(eps) == 0.0:
        if "lora_A" in facts.tensor and "exactly 0" in facts.measured:
            return "zero_over_zero"
        if "underflowed" in facts.measured:
            return "square_underflow"
    return "exploding_gradient" if exploding else _dtype_cause(curve)


def _non_finite_advice(curve: Curve, cause: str | None) -> tuple[Advice, ...]:
    if curve.config.get("torch_dtype") != "float16":
        clip = curve.number("max_grad_norm")
        tighter = clip / 2 if clip is not None and clip > 0 else None
        return (
            *advise.lower_rate(curve),
            Advice(action="lower", parameter="max_grad_norm", before=clip, after=tighter),
        )
    moves = [
        Advice(action="set", parameter="torch_dtype", before="float16", after="float32"),
        Advice(action="adapters_float32", parameter="torch_dtype", before="float16"),
    ]
    if cause in ("zero_over_zero", "square_underflow"):
        eps = curve.number("adam_epsilon")
        moves.append(Advice(action="raise", parameter="adam_epsilon", before=eps, after=advise.FLOAT16_EPSILON))
    return tuple(moves)


def exploding_gradient(curve: Curve, diverged: bool) -> Finding | None:
    """The gradient norm ends an order of magnitude above its lowest earlier level, and above the clipping bound."""
    growth = _growth(curve)
    bound = curve.number("max_grad_norm")
    if growth is None or (bound is not None and growth[1] <= bound):
        return None
    low, high, step, epoch = growth
    if high < GROWTH * max(low, 1e-12):
        return None
    clipped = clipped_fraction(curve)
    evidence: dict[str, Scalar] = {"grad_norm_before": low, "grad_norm_after": high, "growth": high / max(low, 1e-12)}
    if bound is not None:
        evidence["max_grad_norm"] = bound
    if clipped is not None:
        evidence["clipped_fraction"] = clipped
    rate = curve.peak_rate
    high_rate = rate is not None and rate >= advise.HIGH_RATE
    return Finding(
        id=EXPLODING_GRADIENT,
        kind="steps" if step is not None else "epochs",
        severity="error" if diverged or curve.nonfinite is not None else "warning",
        epoch=epoch,
        step=step,
        evidence=evidence,
        cause="high_rate" if high_rate else None,
        advice=(
            *advise.lower_rate(curve),
            Advice(
                action="lower",
                parameter="max_grad_norm",
                before=bound,
                after=bound / 2 if bound is not None and bound > 0 else None,
            ),
        ),
    )


def _growth(curve: Curve) -> tuple[float, float, int | None, int | None] | None:
    """(lowest earlier level, last level, step, epoch) of the gradient norm."""
    norms = [(s.step, s.grad_norm) for s in curve.steps if s.grad_norm is not None and usable(s.grad_norm)]
    if len(norms) >= FEWEST_STEPS:
        cuts = [round(i * len(norms) / WINDOWS) for i in range(WINDOWS + 1)]
        windows = [norms[a:b] for a, b in pairwise(cuts)]
        levels = [median(norm for _, norm in window) for window in windows]
        low = min(levels[:-1])
        lowest = max(i for i, level in enumerate(levels[:-1]) if level == low)  # what was high before it has settled
        first = next(i for i in range(lowest + 1, WINDOWS) if levels[i] >= GROWTH * low or i == WINDOWS - 1)
        return low, levels[-1], windows[first][0][0], None
    means = [(r.epoch, r.grad_norm_mean) for r in curve.epochs if r.grad_norm_mean is not None]
    seen = [(epoch, norm) for epoch, norm in means if usable(norm)]
    if len(seen) < 3:
        return None
    # A mean follows a single spike; two epochs in a row do not.
    return min(norm for _, norm in seen[:-2]), min(seen[-1][1], seen[-2][1]), None, seen[-2][0]


def warmup_exceeds_training(curve: Curve) -> Finding | None:
    """The warmup is as long as the whole training: the configured rate is never reached."""
    warmup, planned, rate = curve.number("warmup_steps"), curve.planned_steps, curve.number("learning_rate")
    if warmup is None or planned is None or warmup <= 0 or warmup < planned[0]:
        return None
    total, source = planned
    evidence: dict[str, Scalar] = {"warmup_steps": int(warmup), "total_steps": total, "steps_from": source}
    if rate is not None and rate > 0:
        # The last step is the total-th, and the first of a warmup has rate 0 (trainer.schedule).
        evidence |= {"learning_rate": rate, "highest_rate": rate * max(total - 1, 0) / warmup}
    epochs = curve.number("num_epochs")
    # A tenth of the steps, as the log's recommended 100 are of the 1,200 that its 400 samples make in 12 epochs of
    # batch 4.
    moves = [Advice(action="lower", parameter="warmup_steps", before=int(warmup), after=total // 10)]
    if epochs is not None and total > 0 and epochs < 1e6:
        needed = math.ceil(epochs * 2 * warmup / total)
        moves.append(Advice(action="raise", parameter="num_epochs", before=int(epochs), after=needed))
    return Finding(id=WARMUP_EXCEEDS_TRAINING, kind=source, severity="warning", evidence=evidence, advice=tuple(moves))


def slow_epoch(curve: Curve) -> Finding | None:
    """Epochs take long: by the clock, against comparable runs, or because the device waits."""
    seconds = _median([r.epoch_seconds for r in curve.epochs])
    if seconds is None or seconds <= 0:
        return None
    evidence: dict[str, Scalar] = {"epoch_seconds": seconds}
    wait, evaluation = _shares(curve, seconds, evidence)
    kind = None
    samples = curve.num_samples or curve.number("max_samples")
    if samples and curve.peer_seconds_per_sample:
        expected = curve.peer_seconds_per_sample * samples
        # An infinite ratio comes from an expectation that no clock has measured.
        ratio = seconds / expected if expected > 0 else math.inf
        if PEER_RATIO < ratio < math.inf and seconds - expected > LEAST_EXCESS_S:
            kind = "peers"
            evidence |= {"expected_seconds": expected, "ratio": ratio, "samples": int(samples)}
    if seconds > curve.slow_epoch_s:
        kind, evidence["limit_seconds"] = "clock", curve.slow_epoch_s
    if kind is None and wait is not None and wait > WAIT_SHARE:
        kind = "waiting"
    if kind is None and evaluation is not None and evaluation > EVAL_SHARE:
        kind = "evaluating"
    if kind is None:
        return None
    cause = _where_time_went(wait, evaluation)
    return Finding(
        id=SLOW_EPOCH,
        kind=kind,
        severity="warning" if seconds > 60 else "info",
        evidence=evidence,
        cause=cause,
        advice=_faster(curve, cause),
    )


def _shares(curve: Curve, seconds: float, evidence: dict[str, Scalar]) -> tuple[float | None, float | None]:
    """(waiting share of the training time, evaluation share of the epoch); adds them and the rest to the evidence."""
    wait = _median([r.data_wait_fraction for r in curve.epochs])
    evaluation = _median([r.eval_seconds for r in curve.epochs])
    eval_share = None if evaluation is None else min(max(evaluation / seconds, 0.0), 1.0)
    if eval_share is not None:
        evidence["eval_share"] = eval_share
    if wait is None:
        return None, eval_share
    wait = min(max(wait, 0.0), 1.0)
    training = 1.0 - (eval_share or 0.0)
    evidence |= {"wait_share": wait * training, "compute_share": (1.0 - wait) * training}
    return wait, eval_share


def _where_time_went(wait: float | None, evaluation: float | None) -> str | None:
    if wait is not None and wait > WAIT_SHARE:
        return "waits_for_data"
    if evaluation is not None and evaluation > EVAL_SHARE:
        return "evaluation"
    return None if wait is None else "computes"


def _faster(curve: Curve, cause: str | None) -> tuple[Advice, ...]:
    """Experiment 5b's two moves, a larger batch and parallel loading, in the order suggested by measured shares."""
    workers, batch, share = curve.number("num_workers"), curve.number("batch_size"), curve.number("val_fraction")
    load = None
    if not workers and not _has_no_workers(curve):
        load = Advice(action="raise", parameter="num_workers", before=workers, after=4)
    fewer = None
    if batch is not None and 1 <= batch < 16:
        fewer = Advice(action="raise", parameter="batch_size", before=int(batch), after=min(16, 2 * int(batch)))
    if cause == "computes":
        moves: Sequence[Advice | None] = (fewer,)  # workers would not help: the device does not wait
    elif cause == "evaluation" and share is not None and 0 < share < 1:
        moves = (Advice(action="lower", parameter="val_fraction", before=share, after=round(share / 2, 3)),)
    elif cause is None:
        moves = (fewer, load)  # nothing is known of waiting, and a larger batch helps either way
    else:
        moves = (load, fewer)
    return tuple(move for move in moves if move is not None)


def _has_no_workers(curve: Curve) -> bool:
    """Whether `num_workers` has no effect; False if the configuration does not say what it depends on."""
    targets = curve.config.get("target_modules", ())
    if curve.config.get("cache_features") is not True or not isinstance(targets, list | tuple):
        return False
    return takes_vision_from_disk(True, map(str, targets))


def _median(values: Sequence[float | None]) -> float | None:
    """Median over the epochs: the first one often includes the start of workers and kernels."""
    known = [value for value in values if value is not None and usable(value)]
    return median(known) if known else None
