"""The diagnosis: a run's curves and configuration in, findings out. Pure; knows no storage and no clock.

curve      Curve, and how it is made from events or from a trial's records
recorded   curves of runs recorded elsewhere, from a JSON file
noise      how much a loss moves by chance, and all thresholds that follow from it
signals    what is seen on a curve: excursions, rises, first and last losses
faults     numbers that broke (non_finite, exploding_gradient), plans that cannot work (warmup, slow epochs)
unstable   losses that fall apart (diverged, oscillating, overfitting)
pace       how fast stable losses fall (not_learning, too_slow, healthy, inconclusive)
advise     what to try next, with values
finding    Finding and Advice, the plain values that come out
messages   the sentences, in English and Chinese; texts, tree_texts: their words
tree       the hand-run log's decision tree; every run ends in one of its leaves
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from search import records
from search.diagnosis import faults, pace, signals, unstable
from search.diagnosis.curve import Curve, NonFiniteFacts, curve_from_events, curve_from_record
from search.diagnosis.finding import IDS, Advice, Finding
from search.diagnosis.tree import TREE, Leaf, leaf

__all__ = [
    "IDS",
    "TREE",
    "Advice",
    "Curve",
    "Finding",
    "Leaf",
    "NonFiniteFacts",
    "curve_from_events",
    "curve_from_record",
    "diagnose",
    "leaf",
    "primary",
]


def diagnose(curve: Curve) -> tuple[Finding, ...]:
    """All findings of a run, in the order of `IDS`; at least one. The same curve, the same findings."""
    seen = signals.read(curve)
    exploding = faults.exploding_gradient(curve, unstable.diverged(seen) is not None)
    broken = faults.non_finite(curve, exploding is not None)
    judged = unstable.findings(seen)
    if exploding is not None:
        judged = unstable.with_cause(judged, "exploding_gradient")
    if not judged and broken is None and exploding is None:
        judged = (pace.finding(seen),)
    plan = (faults.warmup_exceeds_training(curve), faults.slow_epoch(curve))
    found = [f for f in (broken, exploding, *judged, *plan) if f is not None]
    if curve.reason in records.COMPARED:
        found = [replace(f, advice=tuple(a for a in f.advice if a.action != "finish")) for f in found]
    return tuple(sorted(found, key=lambda f: IDS.index(f.id)))


def primary(findings: Iterable[Finding]) -> Finding:
    """The main finding: the first in the log's order of work (see `IDS`)."""
    return min(findings, key=lambda f: IDS.index(f.id))
