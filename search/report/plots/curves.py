"""Plots over time: loss curves, gradient norms, the timeline of the trials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from search.report.experiment import Experiment
from search.report.facts import Facts
from search.report.plots.canvas import BEST, CLIP, GROUPS, MOST_NAMED, alpha_of, group, key, new, outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_curves(facts: Facts) -> Figure | None:
    """Validation loss by epoch of every trial, the best one in front with its training loss."""
    drawn = [e for e in facts.experiments if any(row.val_loss is not None for row in e.rows)]
    if not drawn:
        return None
    figure, axes = new()
    best = facts.best.best if facts.best else None
    handles: dict[str, Any] = {}
    for e in drawn:
        if best is not None and e.number == best.number:
            continue
        kind = group(e, facts)
        marker, colour, line, _ = GROUPS[kind]
        points = [(row.epoch, row.val_loss) for row in e.rows if row.val_loss is not None]
        x, y = zip(*points, strict=True)
        (artist,) = axes.plot(x, y, line, color=colour, linewidth=1.1, alpha=alpha_of(drawn))
        axes.plot(x[-1], y[-1], marker, color=colour, markersize=5)
        handles.setdefault(f"val_loss, {kind}", artist)
    if best is not None:
        val = [(row.epoch, row.val_loss) for row in best.rows if row.val_loss is not None]
        train = [(row.epoch, row.train_loss) for row in best.rows if row.train_loss is not None]
        if train:
            (artist,) = axes.plot(*zip(*train, strict=True), "--", color="black", linewidth=1.2)
            handles["train_loss, best"] = artist
        (artist,) = axes.plot(*zip(*val, strict=True), "-o", color=BEST, linewidth=2.6, markersize=5, zorder=5)
        handles[f"val_loss, trial {best.number} (best)"] = artist
        axes.plot(
            best.record.best_epoch, best.value, "*", color=BEST, markersize=17, markeredgecolor="black", zorder=6
        )
    _limit_losses(axes, [row.val_loss for e in drawn for row in e.rows if row.val_loss is not None], best)
    axes.set(xlabel="epoch", ylabel="loss")
    axes.xaxis.get_major_locator().set_params(integer=True)
    key(axes, handles)
    return figure


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
    """Gradient norm before clipping, step by step where recorded, with the clipping bound."""
    curves = []
    for e in facts.experiments:
        points = [(s.step, s.grad_norm_max or s.grad_norm) for s in e.record.steps if s.grad_norm]
        points = [(x, y) for x, y in points if y is not None and y > 0]
        if points:
            curves.append((e, points))
    if not curves:
        return None
    figure, axes = new()
    best = facts.best.best.number if facts.best else None
    handles: dict[str, Any] = {}
    for e, points in curves:
        kind = outcome(e)
        marker, colour, line, _ = GROUPS[kind]
        front = e.number == best
        (artist,) = axes.plot(
            *zip(*points, strict=True),
            "-" if front else line,
            color=BEST if front else colour,
            linewidth=1.8 if front else 0.9,
            alpha=1.0 if front else alpha_of(curves),
            zorder=5 if front else 2,
        )
        handles.setdefault(f"trial {e.number} (best)" if front else kind, artist)
        if kind == "broken":
            axes.plot(*points[-1], marker, color=colour, markersize=9, markeredgecolor="#333333", zorder=6)
    bounds = {float(e.record.config["max_grad_norm"]) for e, _ in curves if e.record.config.get("max_grad_norm")}
    for bound in sorted(bounds):
        handles[f"max_grad_norm = {bound:g}"] = axes.axhline(
            bound, color=CLIP, linewidth=1.8, linestyle=(0, (6, 2)), zorder=4
        )
    axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="gradient norm before clipping")
    _plain_logs(axes)
    key(axes, handles)
    return figure


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
