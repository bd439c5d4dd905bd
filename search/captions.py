"""Captions that the trials of a study give the same few validation images: as values, and as a table, page and note.

Plain values, kept as attributes: the study has the images and the base's captions, each trial its own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

IMAGES = "caption_images"
"""User attribute of a study: the images as plain data, see `Pictured`."""
CAPTIONS = "captions"
"""User attribute of a trial: its captions of these images, a list of texts."""
SECONDS = "captions_s"
"""User attribute of a trial: how long they took."""
CUT = " …"
"""Ends a caption that was cut since the trial's time for captions was over."""
MOST = 16
"""Most images: more belong into `search.evaluate`."""

PAGE, TABLE = "captions.html", "captions.json"
"""Files of a trial's MLflow run."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse }
td, th { vertical-align: top; text-align: left; padding: .5rem; border: 1px solid #ccc }
img { display: block }
"""


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """The images that all trials of a study caption."""

    images: tuple[str, ...]
    """Paths, in the order of the captions."""
    labels: tuple[str | None, ...]
    """Class of each image."""
    references: tuple[str, ...]
    """The first caption that the data give each."""
    instruction: str
    """The same for all, so that they are one batch."""
    base: tuple[str, ...]
    """Captions by the base without an adapter."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> Pictured | None:
        """From the attributes of a study; None if it has none."""
        found = attrs.get(IMAGES)
        if not found:
            return None
        plain: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in found.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Captioned:
    """What one trial said."""

    pictured: Pictured
    captions: tuple[str, ...]
    seconds: float
    pictures: tuple[bytes, ...]
    """PNG of each image."""
    files: tuple[Path, ...]
    """The same as files."""
    sheet: bytes
    """PNG of all of them side by side."""


def table(pictured: Pictured, captions: Sequence[str], files: Sequence[str]) -> str:
    """The table as MLflow shows it in a run's artifacts and compares it between runs (`mlflow.log_table`'s format).

    Args:
        pictured: the images.
        captions: of the trial.
        files: the images' files among the run's artifacts.
    """
    columns = ["image", "class", "reference", "base", "trial"]
    images = [{"type": "image", "filepath": file, "compressed_filepath": file} for file in files]
    rows = zip(images, pictured.labels, pictured.references, pictured.base, captions, strict=True)
    return json.dumps({"columns": columns, "data": [list(row) for row in rows]}, ensure_ascii=False)


def page(pictured: Pictured, captions: Sequence[str], pictures: Sequence[bytes], title: str) -> str:
    """One HTML page with the pictures (PNG) inside; no scripts, nothing fetched."""
    rows = []
    for picture, name, reference, base, ours in zip(
        pictures, pictured.images, pictured.references, pictured.base, captions, strict=True
    ):
        source = base64.b64encode(picture).decode("ascii")
        cells = [f"<img alt='{escape(name.rpartition('/')[2], quote=True)}' src='data:image/png;base64,{source}'>"]
        cells += [escape(text) for text in (reference, base, ours)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "<tr><th>image</th><th>reference</th><th>base</th><th>this trial</th></tr>"
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html><html lang=en><head><meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<meta charset=utf-8><title>{escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<h1>{escape(title)}</h1><p>Asked of each: {escape(pictured.instruction)}</p>"
        f"<table>{head}{''.join(rows)}</table></body></html>\n"
    )
