"""Where a search has not looked: edges at which its best trial lies, ranges and values without a trial."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from search.report.epochs import UNSTABLE
from search.report.experiment import Experiment
from search.space import Choice, Float, Int, Multiple, Space

NEAR_EDGE = 0.05
"""Share of a range, on its own scale, within which a value lies at the edge."""
WIDE_GAP = 0.35
"""Share of a range without a trial from which it is called untested. A batch size tried at 2, 4, 8 and 16 leaves gaps
of a third."""

ROUNDING = 1e-9
"""Of a value that was put into its range's scale and back."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The best trial lies at the edge of a parameter's range."""

    name: str
    value: float
    edge: float
    is_low: bool


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The widest part of a parameter's range in which no trial lies."""

    name: str
    low: float
    high: float
    share: float


def _position(param: Float | Int, value: float) -> float:
    """Where a value lies in its range, 0 to 1, on the range's own scale."""
    if param.high == param.low:
        return 0.5
    if param.log:
        return math.log(value / param.low) / math.log(param.high / param.low)
    return float((value - param.low) / (param.high - param.low))


def _value(param: Float | Int, position: float) -> float:
    """The inverse of `_position`."""
    if param.log:
        return float(param.low * (param.high / param.low) ** position)
    return float(param.low + position * (param.high - param.low))


def edges(space: Space, best: Experiment | None) -> tuple[Edge, ...]:
    """Parameters for which the best trial lies at the end of the searched range."""
    found = []
    for name, param in space.items():
        if best is None:
            break
        value = best.record.config.get(name)
        if isinstance(param, Multiple):
            partner = best.record.config.get(param.of)
            low, high = min(param.factors), max(param.factors)
            if value and partner and len(param.factors) > 2 and value / partner in (low, high):
                factor = value / partner
                found.append(Edge(name=f"{name}/{param.of}", value=factor, edge=factor, is_low=factor == low))
        elif isinstance(param, Float | Int) and isinstance(value, int | float) and param.high > param.low:
            position = _position(param, value) if value > 0 or not param.log else 0.0
            # Zero dropout or warmup is not an edge that could be moved.
            if position <= NEAR_EDGE and param.low > 0:
                found.append(Edge(name=name, value=value, edge=param.low, is_low=True))
            elif position >= 1 - NEAR_EDGE:
                found.append(Edge(name=name, value=value, edge=param.high, is_low=False))
    return tuple(found)


def gaps(space: Space, finished: Sequence[Experiment]) -> tuple[Gap, ...]:
    """The widest part without a trial of each range, where it is wide and beyond no rate that was wrong already."""
    found = []
    for name, param in space.items():
        if not isinstance(param, Float | Int) or param.high <= param.low:
            continue
        values = [e.record.config[name] for e in finished if name in e.record.config]
        inside = sorted({_position(param, v) for v in values if param.low <= v <= param.high})
        points = [0.0, *inside, 1.0]
        for width, start in sorted(((b - a, a) for a, b in pairwise(points)), key=lambda item: (-item[0], item[1])):
            low, high = _value(param, start), _value(param, start + width)
            if width > WIDE_GAP and not (name == "learning_rate" and _is_beyond(low, high, finished)):
                found.append(Gap(name=name, low=low, high=high, share=width))
                break
    return tuple(found)


def _is_beyond(low: float, high: float, finished: Sequence[Experiment]) -> bool:
    """Whether all trials below a range of rates and at its upper end were shown to be too low, or all above it and at
    its lower end too high: then nothing is to be found in it."""
    rates = [(e.record.config["learning_rate"], e) for e in finished if "learning_rate" in e.record.config]
    below = [e for rate, e in rates if rate <= high * (1 + ROUNDING)]
    above = [e for rate, e in rates if rate >= low * (1 - ROUNDING)]
    return (bool(below) and all(map(_is_too_low, below))) or (bool(above) and all(map(_is_too_high, above)))


def _is_too_low(e: Experiment) -> bool:
    """By its findings, or behind a trial with a clearly higher effective rate."""
    return any(f.cause == "low_rate" for f in e.findings) or _behind(e) < 1


def _is_too_high(e: Experiment) -> bool:
    """By its findings, or behind a trial with a clearly lower effective rate."""
    return e.has(*UNSTABLE) or _behind(e) > 1


def _behind(e: Experiment) -> float:
    """How many times as high its effective rate was as that of the trial that it lies behind by more than noise; 1
    where it does not, or the rates are about the same."""
    told = {item.kind: item.values for item in e.learnt}
    rate = told.get("changed", {}).get("rate")
    return float(rate) if rate and ("worse" in told or "stopped_behind" in told) else 1.0


def untried(space: Space, finished: Sequence[Experiment]) -> tuple[tuple[str, tuple[Any, ...]], ...]:
    """(parameter, its values that no trial had), for parameters with a few values."""
    found: list[tuple[str, tuple[Any, ...]]] = []
    for name, param in space.items():
        if isinstance(param, Choice):
            tried = {e.record.config.get(name) for e in finished}
            found.append((name, tuple(v for v in param.values if v not in tried)))
        elif isinstance(param, Multiple):
            configs = [e.record.config for e in finished if e.record.config.get(param.of)]
            ratios = {c[name] / c[param.of] for c in configs if name in c}
            found.append((f"{name}/{param.of}", tuple(v for v in param.factors if v not in ratios)))
    return tuple((name, missing) for name, missing in found if missing)
