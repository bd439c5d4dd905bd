"""The plots of the tuning log, as SVG: sharp at any size, some kilobytes each.

Their texts are field names, the same in every language. Each plot is a function of the facts: the same facts, the same
bytes. Matplotlib is imported when the first plot is drawn. What a colour says, a shape, dash or hatch says too.
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
    "effective-rate": by_parameter.effective_rate_against_loss,
    "rank-alpha": by_parameter.rank_by_alpha,
    "gradient-norms": curves.gradient_norms,
    "parallel-coordinates": by_parameter.parallel_coordinates,
    "timeline": curves.timeline,
}
"""The plots by file name without suffix."""


def draw(facts: Facts) -> dict[str, bytes]:
    """SVG by file name of every plot for which there are facts."""
    from matplotlib import style

    found = {}
    with style.context(STYLE):
        for name, plot in PLOTS.items():
            figure = plot(facts)
            if figure is not None:
                found[f"{name}.svg"] = _svg(figure)
    return found


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without metadata: Matplotlib would name its version and the time.
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, bbox_inches="tight", pad_inches=0.12)
    return buffer.getvalue()
