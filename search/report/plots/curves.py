"""Plots over time: loss curves, gradient norms, the timeline of the trials."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from search.report.experiment import Experiment, by_loss
from search.report.facts import Facts
from search.report.plots.canvas import (
    BEST,
    CLIP,
    ENDED,
    GOOD,
    GROUPS,
    MOST_NAMED,
    OTHER,
    alpha_of,
    group,
    key,
    new,
    outcome,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAME_HEIGHT = 0.038
"""Of a name at a curve's end, as a share of the plot's height."""
Ending = tuple[float, float, str, str, bool]
"""(epoch, loss, name, colour, whether in front) of a curve's end."""


def loss_curves(facts: Facts) -> Figure | None:
    """Validation loss by epoch of every trial, each named at its end: the best in front with its training loss, the
    two next to it in colours, the others grey."""
    drawn = [e for e in facts.experiments if any(row.val_loss is not None for row in e.rows)]
    if not drawn:
        return None
    figure, axes = new()
    best = facts.best.best if facts.best else None
    near = sorted((e for e in drawn if e.judged and e is not best and e.samples == facts.main_samples), key=by_loss)
    colours = {e.number: colour for e, colour in zip(near[:2], (GOOD, ENDED), strict=False)} if best else {}
    handles: dict[str, Any] = {}
    ends: list[Ending] = []
    for e in drawn:
        if best is not None and e.number == best.number:
            continue
        kind = group(e, facts)
        marker, own, line, _ = GROUPS[kind]
        front = e.number in colours
        colour = colours.get(e.number, own if kind == "broken" else OTHER)
        points = [(row.epoch, row.val_loss) for row in e.rows if row.val_loss is not None]
        x, y = zip(*points, strict=True)
        width, alpha = (1.9, 1.0) if front else (1.1, alpha_of(drawn))
        (artist,) = axes.plot(x, y, line, color=colour, linewidth=width, alpha=alpha, zorder=4 if front else 2)
        axes.plot(x[-1], y[-1], marker, color=colour, markersize=5, zorder=4 if front else 2)
        handles.setdefault(f"val_loss, trial {e.number}" if front else f"val_loss, {kind}", artist)
        ends.append((x[-1], y[-1], str(e.number), colour, front or kind == "broken"))
    val = [] if best is None else [(row.epoch, row.val_loss) for row in best.rows if row.val_loss is not None]
    if best is not None and val:
        train = [(row.epoch, row.train_loss) for row in best.rows if row.train_loss is not None]
        if train:
            (artist,) = axes.plot(*zip(*train, strict=True), "--", color="black", linewidth=1.2)
            handles["train_loss, best"] = artist
        (artist,) = axes.plot(*zip(*val, strict=True), "-o", color=BEST, linewidth=2.6, markersize=5, zorder=5)
        handles[f"val_loss, trial {best.number} (best)"] = artist
        axes.plot(
            best.record.best_epoch, best.value, "*", color=BEST, markersize=17, markeredgecolor="black", zorder=6
        )
        ends.append((*val[-1], f"{best.number} (best)", BEST, True))
    _limit_losses(axes, [row.val_loss for e in drawn for row in e.rows if row.val_loss is not None], best)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _name_ends(axes, ends if len(ends) <= MOST_NAMED else [end for end in ends if end[-1]])
    key(axes, handles)
    return figure


def _name_ends(axes: Axes, ends: Sequence[Ending]) -> None:
    """Write each curve's name right of its end; names that would cover one another move apart, those below first."""
    low, high = axes.get_ylim()
    apart = (high - low) * NAME_HEIGHT
    placed: dict[float, float] = {}
    for x, y, name, colour, front in sorted(ends, key=lambda end: (end[0], end[1])):
        if not low <= y <= high:
            continue
        at = max(y, placed.get(x, low) + apart) if x in placed else y
        placed[x] = at
        weight = "bold" if front else "normal"
        shift = {"xytext": (7, 0), "textcoords": "offset points", "va": "center", "annotation_clip": False}
        axes.annotate(name, (x, at), color=colour if front else "#555555", fontsize=8.5, fontweight=weight, **shift)


def _limit_losses(axes: Axes, losses: list[float], best: Experiment | None) -> None:
    """Cut the axis off far above the middle half of the losses: one diverged trial must not flatten the others."""
    ordered = sorted(losses)
    lower, upper = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    shown = [row.train_loss for row in best.rows if row.train_loss is not None] if best else []
    top = max([upper + 3 * (upper - lower), ordered[len(ordered) // 2] * 1.02, *shown])
    cut = sum(loss > top for loss in losses)
    if cut:
        low = min([ordered[0], *shown])
        axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
        axes.text(
            0.995,
            0.98,
            f"{cut} value(s) above {top:.3g}, up to {max(losses):.3g}",
            ha="right",
            va="top",
            transform=axes.transAxes,
            fontsize=9,
            color="#444444",
        )


def gradient_norms(facts: Facts) -> Figure | None:
    """Gradient norms before clipping, by epoch: a band over the trials, the best one's own band, and each broken trial
    as a line to its end; with the clipping bound."""
    curves = [(e, spread) for e in facts.experiments if (spread := _norms_by_epoch(e))]
    if not curves:
        return None
    figure, axes = new()
    best = facts.best.best.number if facts.best else None
    handles: dict[str, Any] = {}
    others = [spread for e, spread in curves if e.number != best and outcome(e) != "broken"]
    if others:
        epochs = sorted({epoch for spread in others for epoch in spread})
        norms = {epoch: [spread[epoch] for spread in others if epoch in spread] for epoch in epochs}
        lows = [min(low for low, _, _ in norms[epoch]) for epoch in epochs]
        highs = [max(high for _, _, high in norms[epoch]) for epoch in epochs]
        means = [sorted(mean for _, mean, _ in norms[epoch]) for epoch in epochs]
        handles["others, lowest to highest"] = _band(axes, epochs, lows, highs, OTHER, 0.18)
        quarters = [(each[len(each) // 4], each[(3 * len(each)) // 4]) for each in means]
        inner = _band(axes, epochs, [low for low, _ in quarters], [high for _, high in quarters], OTHER, 0.45)
        handles["others, middle half of means"] = inner
    for e, spread in curves:
        epochs = sorted(spread)
        if e.number == best:
            _band(axes, epochs, [spread[x][0] for x in epochs], [spread[x][2] for x in epochs], BEST, 0.22)
            (artist,) = axes.plot(epochs, [spread[x][1] for x in epochs], "-o", color=BEST, linewidth=2, markersize=4)
            handles[f"trial {e.number} (best), mean and range"] = artist
        elif outcome(e) == "broken":
            marker, colour, line, _ = GROUPS["broken"]
            highs = [spread[x][2] for x in epochs]
            (artist,) = axes.plot(epochs, highs, line, color=colour, linewidth=1.4, zorder=5)
            axes.plot(epochs[-1], highs[-1], marker, color=colour, markersize=9, markeredgecolor="#333333", zorder=6)
            shift = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(str(e.number), (epochs[-1], highs[-1]), color=colour, fontsize=8.5, **shift)
            handles.setdefault("broken, highest", artist)
    bounds = {float(e.record.config["max_grad_norm"]) for e, _ in curves if e.record.config.get("max_grad_norm")}
    for bound in sorted(bounds):
        handles[f"max_grad_norm = {bound:g}"] = axes.axhline(
            bound, color=CLIP, linewidth=1.8, linestyle=(0, (6, 2)), zorder=4
        )
    axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="gradient norm before clipping")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain_logs(axes)
    key(axes, handles)
    return figure


def _norms_by_epoch(e: Experiment) -> dict[int, tuple[float, float, float]]:
    """(lowest, mean, highest) gradient norm of each epoch; steps of an epoch that was not finished are one, too.

    By epoch, because an epoch has as many steps as its trial's batches are small.
    """
    steps = [s for s in e.record.steps if s.grad_norm is not None and s.grad_norm > 0]
    per_epoch = e.tag("steps_per_epoch") or max(1, max((s.step for s in steps), default=1) // max(1, len(e.rows)))
    found: dict[int, list[tuple[float, float]]] = {}
    for step in steps:
        mean = step.grad_norm or 0.0
        found.setdefault(1 + (step.step - 1) // per_epoch, []).append((mean, step.grad_norm_max or mean))
    return {
        epoch: (min(mean for mean, _ in each), fmean(mean for mean, _ in each), max(high for _, high in each))
        for epoch, each in found.items()
    }


def _band(axes: Axes, x: list[int], low: list[float], high: list[float], colour: str, alpha: float) -> Any:
    """An area between two curves; of a single epoch a short one, which can be seen."""
    if len(x) == 1:
        return axes.fill_between([x[0] - 0.1, x[0] + 0.1], low * 2, high * 2, color=colour, alpha=alpha, linewidth=0)
    return axes.fill_between(x, low, high, color=colour, alpha=alpha, linewidth=0)


def _plain_logs(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    if high / low < 300:
        axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def timeline(facts: Facts) -> Figure | None:
    """When each trial ran, and how it ended."""
    ran = [e for e in facts.experiments if e.record.start_s is not None]
    if not ran:
        return None
    start = min(e.record.start_s or 0.0 for e in ran)
    last = max(e.record.end_s or e.record.start_s or 0.0 for e in ran)
    unit, name = (3600.0, "h") if last - start > 7200 else (60.0, "min") if last - start > 120 else (1.0, "s")
    few = len(ran) <= MOST_NAMED
    figure, axes = new(8, min(6.0, 1.2 + 0.27 * len(ran)) if few else 6.0)
    handles: dict[str, Any] = {}
    least = (last - start) / unit * 0.004
    for place, e in enumerate(ran):
        kind = outcome(e)
        marker, colour, _, hatch = GROUPS[kind]
        left = ((e.record.start_s or 0.0) - start) / unit
        width = max(((e.record.end_s or last) - start) / unit - left, least)
        best = facts.best is not None and e.number == facts.best.best.number
        colour = BEST if best else colour
        edge = {"edgecolor": "white" if few else "none", "linewidth": 0.5}
        (bar,) = axes.barh(place, width, left=left, height=0.72, color=colour, hatch=hatch, **edge)
        (end,) = axes.plot(left + width, place, "*" if best else marker, color=colour)
        end.set(markersize=(11 if best else 6) if few else 4, markeredgecolor="#333333", markeredgewidth=0.6)
        handles.setdefault("best" if best else kind, bar)
    if few:
        axes.set_yticks(range(len(ran)), [str(e.number) for e in ran])
    axes.set_ylim(len(ran) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    axes.set(xlabel=f"time since the first trial began ({name})", ylabel="trial")
    key(axes, handles)
    return figure
