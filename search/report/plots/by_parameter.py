"""Plots over the search space: learning rate, rank by alpha, parallel coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

from search.diagnosis.messages import rate
from search.leaderboard import show_value
from search.planning.coordinates import USUAL
from search.report.experiment import Experiment, by_loss
from search.report.facts import Facts
from search.report.judged import rate_of
from search.report.plots.canvas import BEST, BROKE, GOOD, GROUPS, OTHER, group, key, new, outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cells = dict[tuple[float, float], float | None]
"""Lowest validation loss by (rank, alpha)."""

LABEL_SPACE = (0.35, 0.3)
"""Smallest distance between two labels of the rank by alpha map, in powers of two along each axis."""

Span = tuple[float, float, bool]
"""(lowest, highest, whether on a log scale) of an axis."""


def rate_against_loss(facts: Facts) -> Figure | None:
    """Learning rate against lowest validation loss; trials without a loss lie on a line above."""
    return _against_loss(facts, lambda config: config.get("learning_rate"), "learning_rate")


def effective_rate_against_loss(facts: Facts) -> Figure | None:
    """The same for the effective rate, a search's one steep direction (`search.planning.coordinates`).

    In the unit of the table of parameters beside it: one name for two rates would be read as one.
    """
    batch, rank = USUAL["batch_size"], USUAL["lora_r"]
    label = f"effective rate: learning_rate x lora_alpha / sqrt(batch_size), at batch {batch} and rank {rank}"
    return _against_loss(facts, _effective, label)


def _effective(config: Mapping[str, Any]) -> float | None:
    """The effective rate of a configuration; None for records that lack a part of it."""
    found = rate_of(config)
    return None if found is None else float(10.0**found)


def _against_loss(facts: Facts, read: Callable[[Mapping[str, Any]], float | None], label: str) -> Figure | None:
    points = [(x, e) for e in facts.experiments if (x := read(e.record.config))]
    points = [(x, e) for x, e in points if outcome(e) != "open"]
    valued = [(x, e.value, e) for x, e in points if e.value is not None and not e.record.violated]
    if not valued:
        return None
    figure, axes = new()
    losses = [value for _, value, _ in valued]
    low, middle = min(losses), median(losses)
    top = min(max(losses), middle + 10 * max(middle - low, 1e-2 * abs(middle)))
    step = 0.12 * max(top - low, 1e-3 * abs(low))
    handles: dict[str, Any] = {}
    best = facts.best.best if facts.best else None
    if best is not None and best.value is not None:
        edge = best.value * (1 + facts.noise.difference)
        handles["within noise of the best"] = axes.axhspan(best.value, edge, color=BEST, alpha=0.12, linewidth=0)
    beyond = top + step
    for x, e in points:
        marker, colour, _, _ = GROUPS[group(e, facts)]
        known = e.value is not None and not e.record.violated and e.value <= top
        y = e.value if known and e.value is not None else beyond
        (artist,) = axes.plot(x, y, marker, color=colour, markersize=8, markeredgecolor="#333333", markeredgewidth=0.6)
        handles.setdefault(group(e, facts), artist)
    if best is not None and (at := read(best.record.config)):
        (artist,) = axes.plot(at, best.value, "*", color=BEST, markersize=17, markeredgecolor="black", zorder=6)
        handles[f"trial {best.number} (best)"] = artist
    if any(e.value is None or e.record.violated or e.value > top for _, e in points):
        axes.axhline(top + step / 2, color="#444444", linewidth=0.8, linestyle=(0, (4, 3)))
        where = axes.get_yaxis_transform()
        axes.text(
            0.995,
            beyond + step,
            f"none, or above {top:.3g}",
            transform=where,
            ha="right",
            va="center",
            fontsize=9,
            color="#444444",
        )
        axes.set_ylim(top=beyond + 1.6 * step)
    axes.set_xscale("log")
    axes.set(xlabel=label, ylabel="lowest val_loss")
    _rates_on(axes)
    key(axes, handles)
    return figure


def _rates_on(axes: Axes) -> None:
    """Label the axis with rates as the log writes them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: rate(x)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def rank_by_alpha(facts: Facts) -> Figure | None:
    """Rank by alpha, coloured and labelled with the lowest validation loss at each pair."""
    cells: dict[tuple[float, float], list[Experiment]] = {}
    for e in facts.experiments:
        rank, alpha = e.record.config.get("lora_r"), e.record.config.get("lora_alpha")
        if rank and alpha and outcome(e) != "open":
            cells.setdefault((rank, alpha), []).append(e)
    best = {key: _lowest(es, facts) for key, es in cells.items()}
    losses = [value for value in best.values() if value is not None]
    if not losses:
        return None
    figure, axes = new(8, 4.8)
    known = [(key, value) for key, value in best.items() if value is not None]
    norm, ticks = _near_the_best(losses, facts.noise.difference)
    shown = axes.scatter(
        [rank for (rank, _), _ in known],
        [alpha for (_, alpha), _ in known],
        c=[value for _, value in known],
        cmap="cividis",
        norm=norm,
        s=190,
        edgecolors="#333333",
        linewidths=0.7,
        zorder=3,
    )
    for (rank, alpha), value in best.items():
        if value is None:
            axes.plot(rank, alpha, "X", color=BROKE, markersize=11, markeredgecolor="#333333", zorder=4)
        elif value == min(losses):
            axes.plot(rank, alpha, "*", color="white", markersize=10, markeredgecolor="black", zorder=5)
    _label(axes, best, {key: len(members) for key, members in cells.items()})
    _ratio_lines(axes, [key[0] for key in cells], [key[1] for key in cells])
    bar = figure.colorbar(shown, ax=axes, label="lowest val_loss", pad=0.02, ticks=ticks)
    bar.ax.set_yticklabels([f"{tick:.4g}" for tick in ticks])
    bar.ax.minorticks_off()
    axes.set(xlabel="lora_r", ylabel="lora_alpha")
    return figure


def _near_the_best(losses: Sequence[float], noise: float) -> tuple[Any, list[float]]:
    """(a scale of colours, its ticks): even in the logarithm of the distance to the best, from the noise upwards.

    On an even scale one high loss makes all others look alike, and cut off, those above it: 0.388 like 0.476.
    """
    from matplotlib.colors import FuncNorm

    low, high = min(losses), max(losses)
    unit = max(noise * abs(low), 1e-3 * abs(low), 1e-9)
    high = max(high, low + unit)
    top = math.log1p((high - low) / unit)

    def forward(values: Any) -> Any:
        import numpy as np

        return np.log1p(np.maximum(np.asarray(values, dtype=float) - low, 0.0) / unit)

    def inverse(values: Any) -> Any:
        import numpy as np

        return low + unit * np.expm1(np.asarray(values, dtype=float))

    ticks = [low + unit * math.expm1(top * part / 5) for part in range(6)]
    return FuncNorm((forward, inverse), vmin=low, vmax=high), ticks


def _label(axes: Axes, best: Cells, counts: dict[tuple[float, float], int]) -> None:
    """Write loss and number of trials above each cell, lowest loss first, without labels that would cover another."""
    placed: list[tuple[float, float]] = []
    for (rank, alpha), value in sorted(best.items(), key=lambda cell: (cell[1] is None, cell[1] or 0.0, cell[0])):
        x, y = math.log2(rank), math.log2(alpha)
        if any(abs(x - a) < LABEL_SPACE[0] and abs(y - b) < LABEL_SPACE[1] for a, b in placed):
            continue
        several = f" ({counts[rank, alpha]})" if counts[rank, alpha] > 1 else ""
        text = "no loss" if value is None else f"{value:.3f}{several}"
        style = {"ha": "center", "fontsize": 9, "fontweight": "normal" if placed else "bold"}
        axes.annotate(text, (rank, alpha), xytext=(0, 11), textcoords="offset points", **style)
        placed.append((x, y))


def _lowest(experiments: Sequence[Experiment], facts: Facts) -> float | None:
    """The lowest of the losses that compare with one another."""
    values = [e.value for e in experiments if e.judged and e.samples == facts.main_samples and e.value is not None]
    return min(values, default=None)


def _ratio_lines(axes: Axes, ranks: list[float], alphas: list[float]) -> None:
    """Scale both axes in powers of two and draw the lines of equal alpha / r."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    low, high = min(ranks) / 1.35, max(ranks) * 1.35
    bottom, top = min(alphas) / 1.5, max(alphas) * 1.6
    for ratio, line in ((1, ":"), (2, "--"), (4, "-.")):
        axes.plot((low, high), (ratio * low, ratio * high), line, color="#999999", linewidth=0.9, zorder=1)
        end = min(high, top / ratio) / 1.06
        if ratio * end >= bottom:
            axes.text(end, ratio * end, f"×{ratio}", fontsize=9, color="#555555", ha="right", va="bottom")
    for axis, scale, ends in (
        (axes.xaxis, axes.set_xscale, (low, high)),
        (axes.yaxis, axes.set_yscale, (bottom, top)),
    ):
        scale("log", base=2)
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.set_minor_formatter(NullFormatter())
        (axes.set_xlim if axis is axes.xaxis else axes.set_ylim)(*ends)


def parallel_coordinates(facts: Facts) -> Figure | None:
    """Every trial as a line through its values of the searched fields to its loss, the best quarter in front."""
    names = list(facts.record.definition.get("space", {}))
    drawn = [e for e in facts.experiments if e.judged and all(_number(e, n) is not None for n in names)]
    names = [n for n in names if len({_number(e, n) for e in drawn}) > 1]
    if len(drawn) < 2 or not names:
        return None
    figure, axes = new(8, 4.4)
    spans = [
        _span([_number(e, n) or 0.0 for e in drawn], facts.record.definition["space"][n].get("log")) for n in names
    ]
    losses = [e.value or 0.0 for e in drawn]
    order = sorted(drawn, key=by_loss, reverse=True)
    quarter = {e.number for e in order[-max(1, len(order) // 4) :]}
    handles: dict[str, Any] = {}
    loss_span = _span(losses, False)
    for e in order:
        y = [_place(_number(e, n) or 0.0, span) for n, span in zip(names, spans, strict=True)]
        y.append(_place(e.value or 0.0, loss_span))
        best, good = e.number == order[-1].number, e.number in quarter
        colour = BEST if best else GOOD if good else OTHER
        (artist,) = axes.plot(range(len(y)), y, "-" if good else ":", color=colour, alpha=1.0 if good else 0.7)
        artist.set(linewidth=2.8 if best else 1.6 if good else 0.9, zorder=4 if best else 3 if good else 2)
        artist.set(marker="*" if best else "o" if good else "", markersize=12 if best else 4)
        handles.setdefault(f"trial {e.number} (best)" if best else "best quarter" if good else "others", artist)
    _axes_of(axes, names, [*spans, loss_span])
    key(axes, handles)
    return figure


def _number(e: Experiment, name: str) -> float | None:
    value = e.record.config.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _span(values: list[float], log: bool | None) -> Span:
    return min(values), max(values), bool(log) and min(values) > 0


def _place(value: float, span: Span) -> float:
    low, high, log = span
    if high <= low:
        return 0.5
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _axes_of(axes: Axes, names: list[str], spans: list[Span]) -> None:
    """Draw a vertical line for each field, with the lowest and highest value at its ends."""
    axes.set_xlim(-0.35, len(names) + 0.35)
    axes.set_ylim(-0.16, 1.12)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_yticks([])
    shown = [name.replace("_", "_\n", 1) if len(name) > 10 else name for name in [*names, "val_loss"]]
    axes.set_xticks(range(len(shown)), shown, fontsize=9.5)
    axes.tick_params(axis="x", length=0)
    for i, (name, (low, high, _)) in enumerate(zip([*names, "val_loss"], spans, strict=True)):
        axes.axvline(i, ymin=0.16 / 1.28, ymax=1.16 / 1.28, color="#444444", linewidth=1, zorder=1)
        texts = (
            (f"{low:.4g}", f"{high:.4g}") if name == "val_loss" else (show_value(name, low), show_value(name, high))
        )
        axes.text(i, -0.05, texts[0], ha="center", va="top", fontsize=9)
        axes.text(i, 1.05, texts[1], ha="center", va="bottom", fontsize=9)
