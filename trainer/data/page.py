"""The audit of a data folder as one HTML page: no scripts, and nothing that is fetched from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from trainer.data.audit import MOST_SHOWN, Audit, Copies, spread, thumbnail
from trainer.data.dataset import Row

MOST_COPIES = 6
"""Pictures of one group that are shown."""
BINS = 24
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
h2 { margin-top: 2rem; border-bottom: 1px solid #ccc }
.counts { columns: 3 16rem; column-gap: 2.5rem }
.counts div { display: flex; justify-content: space-between; gap: 1rem }
.counts b { font-weight: 600; overflow-wrap: anywhere; text-align: right } .charts { display: flex; flex-wrap: wrap }
.charts > div { flex: 1 1 30rem }
.sheet { display: flex; flex-wrap: wrap; gap: .8rem } figure { margin: 0; width: 8.5rem; overflow-wrap: anywhere }
figcaption { font-size: 11px; line-height: 1.3 } img { max-width: 128px; max-height: 128px; display: block }
.group { border: 1px solid #ccc; border-radius: 4px; padding: .6rem; margin-bottom: .6rem }
.warning { color: #8a4b00 } .bad { color: #a00000 } svg text { font-size: 10px; fill: #444 }
"""


def page(found: Audit) -> str:
    """The whole page."""
    name = escape(_printable(found.name))
    verdict = "A search would refuse this folder." if found.refused else "A search would take this folder."
    parts = [
        f"<h1>{name}</h1><p class='{'bad' if found.refused else ''}'>{verdict}</p>",
        _table({key.replace("_", " "): value for key, value in found.counts().items()}),
        "".join(f"<p>{escape(_printable(line))}</p>" for line in found.split_lines()),
        _list("Look at", found.warnings(), "warning"),
        _list("Rows that cannot be used", found.examined.bad, "bad"),
    ]
    charts = [_histogram("Length of captions in tokens", found.text.lengths)] if found.text is not None else []
    if found.sizes:
        charts.append(_histogram("Width of images in pixels", [width for width, _ in found.sizes]))
    parts.append(f"<div class=charts>{''.join(f'<div>{chart}</div>' for chart in charts)}</div>")
    if found.copies:
        shown = "".join(_group(group) for group in found.copies[:MOST_SHOWN])
        parts.append(f"<h2>The same picture under several names ({len(found.copies)})</h2>{shown}")
    sheet = "".join(_figure(row) for row in spread(found.examined.rows))
    parts.append(f"<h2>Contact sheet</h2><div class=sheet>{sheet}</div>")
    head = f"<meta charset=utf-8><title>{name}</title><style>{STYLE}</style>"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang=en><head><meta http-equiv=Content-Security-Policy content="{policy}">{head}</head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(values: dict[str, int | float | str]) -> str:
    rows = "".join(f"<div>{escape(name)}<b>{escape(str(value))}</b></div>" for name, value in values.items())
    return f"<div class=counts>{rows}</div>"


def _list(title: str, items: Sequence[str], kind: str) -> str:
    if not items:
        return ""
    listed = "".join(f"<li>{escape(_printable(item))}</li>" for item in items[:200])
    return f"<h2>{title} ({len(items)})</h2><ul class={kind}>{listed}</ul>"


def _group(group: Copies) -> str:
    kind = "identical files" if group.identical else "copies"
    told = f"{len(group.rows)} rows, {kind}, {group.scenes} scenes, {group.sides}"
    return f"<div class=group>{told}<div class=sheet>{''.join(map(_figure, group.rows[:MOST_COPIES]))}</div></div>"


def _figure(row: Row) -> str:
    caption = escape(_printable(f"{row.image.name}: {row.caption}"[:160]))
    return f"<figure><img alt='' src='{thumbnail(row)}'><figcaption>{caption}</figcaption></figure>"


def _histogram(title: str, values: Sequence[int]) -> str:
    """Bars of the numbers of values in at most BINS ranges."""
    low, high = min(values), max(values)
    step = max(1, -(-(high - low + 1) // BINS))
    counts = [0] * ((high - low) // step + 1)
    for value in values:
        counts[(value - low) // step] += 1
    top = max(counts)
    bars = "".join(
        f"<rect x='{20 * i}' y='{100 - 90 * count / top:.1f}' width=18 height='{90 * count / top:.1f}' "
        f"fill='#4477aa'><title>{low + i * step} to {low + (i + 1) * step - 1}: {count}</title></rect>"
        for i, count in enumerate(counts)
    )
    labels = f"<text x=0 y=114>{low}</text><text x='{20 * len(counts)}' y=114 text-anchor=end>{high}</text>"
    return f"<h2>{title}</h2><svg width='{20 * len(counts) + 40}' height=120 role=img>{bars}{labels}</svg>"


def _printable(text: str) -> str:
    """The text without halves of surrogate pairs, which file names may hold and UTF-8 does not."""
    return text.encode("utf-8", "backslashreplace").decode()
