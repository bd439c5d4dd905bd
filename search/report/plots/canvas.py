"""Shared parts of the plots: colours and shapes by outcome, a canvas, a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from search.report.experiment import UNFINISHED, Experiment
from search.report.facts import Facts
from search.report.parameters import BROKEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BEST, OTHER, ENDED, BROKE, CLIP, GOOD = "#0072B2", "#8a8a8a", "#E69F00", "#D55E00", "#CC79A7", "#009E73"
"""Okabe and Ito's colours (2008), distinguishable with colour blindness."""
GROUPS = {
    # outcome: (marker, colour, line, hatch)
    "complete": ("o", OTHER, "-", ""),
    "stopped": ("s", ENDED, "--", "//"),
    "broken": ("X", BROKE, ":", "xx"),
    "open": ("D", "#56B4E9", "-", ".."),
    "other samples": ("v", "#bbbbbb", "-.", ""),
}
MOST_NAMED = 24
"""Most trials that a timeline names one by one; more names would overlap."""


def group(experiment: Experiment, facts: Facts) -> str:
    """The outcome, or `other samples` where the loss does not compare with the others."""
    kind = outcome(experiment)
    return "other samples" if kind != "broken" and experiment.samples != facts.main_samples else kind


def outcome(experiment: Experiment) -> str:
    """One of complete, stopped (on purpose), broken (no usable result) or open (not ended)."""
    state = experiment.record.state
    if state in UNFINISHED:
        return "open"
    if state == "FAIL" or experiment.record.violated or experiment.has(*BROKEN):
        return "broken"
    return "stopped" if state == "PRUNED" or experiment.record.stopped_early else "complete"


def new(width: float = 8, height: float = 4.2) -> tuple[Figure, Axes]:
    """A canvas of this size in inches."""
    # Without pyplot, which keeps a list of figures for all threads: the log is written from a thread of its own.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def key(axes: Axes, handles: dict[str, Any]) -> None:
    """Draw a legend above the plot, where it covers nothing."""
    axes.legend(
        list(handles.values()),
        list(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncol=min(4, len(handles)) if sum(map(len, handles)) < 70 else 3,
        borderaxespad=0.3,
        handlelength=2.2,
        columnspacing=1.4,
    )


def alpha_of(drawn: Sequence[object]) -> float:
    """Opacity of a line: many lines are more transparent."""
    return 0.75 if len(drawn) <= MOST_NAMED else 0.3
