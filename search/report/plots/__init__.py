"""The plots of the tuning log, as PNG. Texts on them are field names, the same in every language.

Each plot is a function of the facts; the same facts give the same bytes. Matplotlib is imported when the first is
drawn. What a colour says is said by a shape, dash or hatch as well.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.report.facts import Facts
from search.report.plots import by_parameter, curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(__file__).parent.parent / "log.mplstyle"

PLOTS: dict[str, Callable[[Facts], Any]] = {
    "loss-curves": curves.loss_curves,
    "learning-rate": by_parameter.rate_against_loss,
    "rank-alpha": by_parameter.rank_by_alpha,
    "gradient-norms": curves.gradient_norms,
    "parallel-coordinates": by_parameter.parallel_coordinates,
    "timeline": curves.timeline,
}
"""File name, without its ending, and plot."""


def draw(facts: Facts) -> dict[str, bytes]:
    """File name and PNG of every plot that the facts have something for."""
    from matplotlib import style

    found = {}
    with style.context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(facts)
            if figure is not None:
                found[f"{name}.png"] = _png(figure)
    return found


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without metadata: Matplotlib would name its version, and other tools the time.
    figure.savefig(buffer, format="png", metadata={"Software": None}, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()
