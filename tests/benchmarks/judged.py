"""What replayed studies show: epochs until the best is reached, regret by epochs, how often the named winner is one.

All of it is judged by the expected test loss: the noise of one run would make the luckiest of many draws "the best".
The best is that of the table's configurations, so regret can be negative. Intervals are of the bootstrap over the
seeds, 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.replaying import Replay

WITHIN = (0.02, 0.01, 0.003)
RESAMPLES = 1000


@dataclass(frozen=True)
class Study:
    """One replayed study, as plain values."""

    seed: int
    spent: int
    trials: int
    steps: tuple[tuple[int, float, float], ...]
    """(epochs spent, regret by expected test loss, regret by the checkpoint's own) whenever the incumbent changed."""
    behind: float
    """How much worse the named winner is than the best configuration that the study began: a share, 0 if it is it."""

    def regret(self, spent: int) -> float:
        """Of the incumbent after so many epochs; infinite while there is none."""
        known = [regret for at, regret, _ in self.steps if at <= spent]
        return known[-1] if known else math.inf

    def reached(self, within: float) -> float:
        """Epochs until the incumbent is first within this of the best; infinite if never."""
        return next((float(at) for at, regret, _ in self.steps if regret <= within), math.inf)


def judge(found: Replay, best: float, seed: int) -> Study:
    """A replayed study against the best expected test loss of its world."""
    steps = tuple((s.spent, s.expected / best - 1, s.test / best - 1) for s in found.steps)
    worths = {number: run.curve.worth for number, run in found.runs.items() if run.done}
    behind = math.inf
    if found.winner is not None:
        behind = worths[found.winner[0]] / min(worths.values()) - 1
    return Study(seed, found.spent, len(found.runs), steps, behind)


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def text(self, form: Callable[[float], str]) -> str:
        """As `value (low to high)`."""
        return f"{form(self.value)} ({form(self.low)}–{form(self.high)})"


def interval(values: Sequence[float], figure: Callable[..., Any], seed: int = 0) -> Interval:
    """The figure of the values; `figure` takes an array and `axis`. Infinite values are "more than was spent"."""
    data = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(data), size=(RESAMPLES, len(data)))
    again = figure(data[draws], axis=1)
    low, high = np.quantile(again, [0.025, 0.975], method="closest_observation")
    return Interval(float(figure(data, axis=0)), float(low), float(high))


def median(values: NDArray[np.float64], axis: int) -> Any:
    """The median, which an infinite value among others does not turn into NaN."""
    return np.quantile(values, 0.5, axis=axis, method="closest_observation")


def most(values: NDArray[np.float64], axis: int) -> Any:
    """The 90 % quantile, likewise."""
    return np.quantile(values, 0.9, axis=axis, method="closest_observation")


def summary(studies: Sequence[Study], marks: Sequence[int], tie: float) -> dict[str, Any]:
    """All figures of one strategy as plain data."""
    reached = {w: [study.reached(w) for study in studies] for w in WITHIN}
    regret = {mark: [study.regret(mark) for study in studies] for mark in marks}
    right = [float(study.behind <= tie) for study in studies]
    return {
        "seeds": len(studies),
        "trials": float(np.median([study.trials for study in studies])),
        "spent": float(np.median([study.spent for study in studies])),
        "epochs_median": {w: asdict(interval(found, median)) for w, found in reached.items()},
        "epochs_90": {w: asdict(interval(found, most)) for w, found in reached.items()},
        "regret_median": {mark: asdict(interval(found, median)) for mark, found in regret.items()},
        "regret_90": {mark: asdict(interval(found, most)) for mark, found in regret.items()},
        "right_winner": asdict(interval(right, np.mean)),
        "exactly_best": float(np.mean([study.behind == 0 for study in studies])),
    }


def marks_of(budget: int, epochs: int) -> list[int]:
    """The budgets at which regret is shown: 1, 2, 4 ... full trainings, and all of it."""
    found = [epochs]
    while found[-1] * 2 < budget:
        found.append(found[-1] * 2)
    return [*found, budget]


def as_text(figures: Mapping[str, Mapping[str, Any]], marks: Sequence[int], tie: float) -> list[str]:
    """The figures by strategy as Markdown tables."""
    shares = [f"{w:.1%}".replace(".0%", "%").replace("%", " %") for w in WITHIN]
    lines = ["", "Epochs until the incumbent is within so much of the best test loss: median (95 % interval); 90 %"]
    lines += ["", *_row("strategy", *shares, "trials", "seeds"), _rule(len(shares) + 3)]
    for name, each in figures.items():
        cells = [
            f"{_interval(each['epochs_median'][w], _epochs)}; {_epochs(each['epochs_90'][w]['value'])}" for w in WITHIN
        ]
        lines += _row(name, *cells, f"{each['trials']:.0f}", str(each["seeds"]))
    lines += ["", "Regret (expected test loss over the best) after so many epochs: median (95 % interval)"]
    lines += ["", *_row("strategy", *map(str, marks)), _rule(len(marks) + 1)]
    for name, each in figures.items():
        lines += _row(name, *(_interval(each["regret_median"][mark], _share) for mark in marks))
    lines += ["", f"Named winner: the best of the study's configurations, or tied with it (within {tie:.2%})"]
    lines += ["", *_row("strategy", "best or tied", "exactly the best"), _rule(3)]
    for name, each in figures.items():
        lines += _row(name, _interval(each["right_winner"], _percent), _percent(each["exactly_best"]))
    return lines


def plot(figures: Mapping[str, Sequence[Study]], budget: int, title: str, path: Path) -> None:
    """Median regret by epochs as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    at = np.unique(np.geomspace(1, budget, 120).astype(int))
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, (name, studies) in enumerate(figures.items()):
        regret = np.array([[study.regret(int(spent)) for spent in at] for study in studies])
        style = ("-", "--", ":")[number // 10 % 3]
        axes.plot(at, 100 * np.maximum(median(regret, axis=0), 1e-4), style, label=name, linewidth=1.6)
    axes.set(xscale="log", yscale="log", xlabel="epochs spent", ylabel="median regret, % of the best test loss")
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _rule(columns: int) -> str:
    return "|" + "---|" * columns


def _interval(found: Mapping[str, float], form: Callable[[float], str]) -> str:
    return Interval(**found).text(form)


def _epochs(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else "never"


def _share(value: float) -> str:
    return f"{value:.2%}" if math.isfinite(value) else "none"


def _percent(value: float) -> str:
    return f"{value:.0%}"
