"""The findings of a study's trials, judged together: by the study's own noise, and with causes that only several show.

A worker judges a trial alone, when it ends. What the whole study knows comes here, and everything the log says of a
trial (its title, mark, cause, advice, place in the decision tree) is read from these findings and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from search import records
from search.diagnosis import Advice, Finding, curve_from_record, diagnose
from search.diagnosis import finding as ids
from search.diagnosis.finding import Scalar
from search.diagnosis.noise import VAL_NOISE, relative, usable
from search.leaderboard import sample_key
from search.planning.coordinates import model_rate
from search.records import TrialRecord
from search.report.measured_noise import Noise

PLAN = (ids.WARMUP_EXCEEDS_TRAINING, ids.SLOW_EPOCH)
"""Findings about the plan; a worker knows more of them than the records (what comparable runs took)."""
TIMES_HIGHER = 3.0
"""How much higher an effective rate must be for a trial to say that another's is too low."""
WITNESSES = 2
"""Fewest trials that must say it."""
ALIKE = 2.0
"""A trial whose effective rate is at most so much higher, and which is as low as any, speaks against it."""


def findings(trials: Sequence[TrialRecord], noise: Noise) -> dict[int, tuple[Finding, ...]]:
    """The findings of each trial by number; none for one that has not ended, or failed."""
    alone = {trial.number: _alone(trial, noise) for trial in trials}
    runs = _Runs([run for trial in trials if (run := _Run.of(trial)) is not None])
    by_number = {run.number: run for run in runs.all}
    return {
        number: tuple(_explained(finding, found, by_number.get(number), runs, noise) for finding in found)
        for number, found in alone.items()
    }


def rate_of(config: Mapping[str, Any]) -> float | None:
    """log10 of a configuration's effective rate at the usual batch and rank; None where a part is missing."""
    try:
        found = model_rate({"gradient_accumulation_steps": 1, **config})
    except (ArithmeticError, KeyError, TypeError, ValueError):
        return None
    return found if math.isfinite(found) else None


def _alone(trial: TrialRecord, noise: Noise) -> tuple[Finding, ...]:
    recorded = [Finding.from_dict(data) for data in trial.attrs.get(records.FINDINGS) or ()]
    if not recorded and trial.state not in ("COMPLETE", "PRUNED"):
        return ()
    if any(f.id in (ids.NON_FINITE, ids.EXPLODING_GRADIENT) for f in recorded) or (recorded and not trial.epochs):
        return tuple(recorded)  # only the events knew all of it
    fresh = diagnose(curve_from_record(trial, max(VAL_NOISE, noise.deviation)))
    plan = [f for f in (recorded or fresh) if f.id in PLAN]
    judged = [f for f in fresh if f.id not in PLAN]
    return tuple(sorted((*judged, *plan), key=lambda f: ids.IDS.index(f.id)))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one trial says about effective rates."""

    number: int
    learning_rate: float
    """As configured."""
    rate: float
    """log10 of the effective rate."""
    samples: tuple[Any, ...]
    losses: tuple[tuple[int, float], ...]
    """(epoch, validation loss)."""

    @classmethod
    def of(cls, trial: TrialRecord) -> _Run | None:
        rate = rate_of(trial.config)
        losses = tuple((e.epoch, e.val_loss) for e in trial.epochs if e.val_loss is not None and usable(e.val_loss))
        if rate is None or not losses or trial.violated:
            return None
        return cls(
            number=trial.number,
            learning_rate=trial.config["learning_rate"],
            rate=rate,
            samples=sample_key(trial),
            losses=losses,
        )

    def by(self, epoch: int) -> float | None:
        """The lowest loss up to an epoch; None for a run that had none by then."""
        return min((loss for at, loss in self.losses if at <= epoch), default=None)


class _Runs:
    """The runs of a study; how low each had come by an epoch is worked out once, not for each run that asks."""

    def __init__(self, runs: Sequence[_Run]) -> None:
        self.all = runs
        self._by: dict[tuple[tuple[Any, ...], int], list[tuple[_Run, float]]] = {}

    def by(self, samples: tuple[Any, ...], epoch: int) -> list[tuple[_Run, float]]:
        """Those on these samples that had a loss by an epoch, each with its lowest until then."""
        if (samples, epoch) not in self._by:
            self._by[samples, epoch] = [
                (run, low) for run in self.all if run.samples == samples and (low := run.by(epoch)) is not None
            ]
        return self._by[samples, epoch]


def _explained(finding: Finding, all_of_it: Sequence[Finding], own: _Run | None, runs: _Runs, noise: Noise) -> Finding:
    """A slow run's finding with the cause that the other trials show: too low an effective rate, or none."""
    slow = finding.id == ids.TOO_SLOW or (finding.id == ids.NOT_LEARNING and finding.kind != "high_rate")
    held_back = finding.cause == "long_warmup" or any(f.id == ids.WARMUP_EXCEEDS_TRAINING for f in all_of_it)
    if not slow or held_back or own is None:
        return finding
    epoch, mine = own.losses[-1][0], min(loss for _, loss in own.losses)
    every = runs.by(own.samples, epoch)
    others = [(r, low) for r, low in every if r.number != own.number]
    lowest = min((low for _, low in others), default=mine)
    near = own.rate + math.log10(ALIKE)
    if any(r.rate <= near and relative(low, lowest) <= noise.difference for r, low in every):
        known = finding.cause == "straight" and len(others) >= WITNESSES
        return _to_train_longer(finding, epoch) if known else finding
    higher = [(r, low) for r, low in others if r.rate >= own.rate + math.log10(TIMES_HIGHER)]
    shown = [(r, low) for r, low in higher if relative(mine, low) > noise.difference]
    line = finding.cause == "straight"
    if len(shown) < WITNESSES:
        # A line by itself might be a rate that is too low; trials at higher rates that came no lower say it is not.
        return _to_train_longer(finding, epoch) if line and len(higher) >= WITNESSES else finding
    best, _ = min(shown, key=lambda each: (each[1], each[0].number))
    evidence: dict[str, Scalar] = {
        "witnesses": ", ".join(str(r.number) for r, _ in shown[:5]) + (", …" if len(shown) > 5 else ""),
        "rate_times": 10 ** (min(r.rate for r, _ in shown) - own.rate),
        "lower_by": min(relative(mine, low) for _, low in shown),
    }
    after = float(f"{own.learning_rate * 10 ** (best.rate - own.rate):.2g}")
    advice = Advice(action="raise", parameter="learning_rate", before=own.learning_rate, after=after)
    return replace(finding, cause="low_rate", evidence={**finding.evidence, **evidence}, advice=(advice,))


def _to_train_longer(finding: Finding, epochs: int) -> Finding:
    """The finding of a slow run whose rate the other trials clear."""
    advice = Advice(action="raise", parameter="num_epochs", before=epochs, after=2 * epochs)
    return replace(finding, cause=None, advice=(advice,))
