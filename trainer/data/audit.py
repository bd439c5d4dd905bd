"""A data folder looked at as a whole: what training would take, and what its owner should see first."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from trainer.common.errors import DataError
from trainer.data import duplicates
from trainer.data.dataset import Examined, Row, examine
from trainer.data.images import IMAGE_ERRORS, content_of, decode, identity
from trainer.data.text import Text, captions_of, examine_text, words_of

THUMBNAIL = 128
"""Longest side of a picture on the page."""
MOST_SHOWN = 48
"""Pictures of the contact sheet, and groups of copies, that are shown."""
THREADS = 4


@dataclass(frozen=True)
class Copies:
    """Rows of one picture under several names."""

    rows: tuple[Row, ...]
    identical: bool
    """The files are the same, byte by byte."""

    @property
    def scenes(self) -> int:
        """Number of scenes; with more than one, a split by scenes may put copies on both sides."""
        return len({row.scene for row in self.rows})


@dataclass(frozen=True)
class Audit:
    """All findings on a data folder."""

    examined: Examined
    text: Text | None
    """None where the model's tokenizer is not at hand."""
    copies: tuple[Copies, ...]
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of each row's image."""

    @property
    def refused(self) -> bool:
        """Whether a search would not take this folder as it is."""
        return bool(self.examined.bad or len(self.examined.rows) < 2 or (self.text and self.text.problem()))

    def warnings(self) -> list[str]:
        """What to look at, a sentence each."""
        found = list(self.text.warnings()) if self.text else []
        problem = self.text.problem() if self.text else None
        if problem:
            found.insert(0, problem)
        if self.copies:
            rows = sum(len(group.rows) for group in self.copies)
            apart = sum(group.scenes > 1 for group in self.copies)
            found.append(
                f"{len(self.copies)} pictures have copies ({rows} rows; {apart} of them in several scenes, where a "
                f"split may put them on both sides): {', '.join(row.image.name for row in self.copies[0].rows[:3])}"
            )
        return found

    def counts(self) -> dict[str, int | float | str]:
        """The counts by name."""
        rows = self.examined.rows
        text = self.text
        return {
            "rows": len(rows),
            "bad_rows": len(self.examined.bad),
            "images": len({row.image for row in rows}),
            "scenes": len({row.scene for row in rows}),
            "prompts": len({row.prompt for row in rows}),
            "copied_pictures": len(self.copies),
            "rows_of_copied_pictures": sum(len(group.rows) for group in self.copies),
            "fingerprint": self.examined.fingerprint,
            **({} if text is None else {"unknown_text": round(text.unknown, 4), "captions_cut": text.cut}),
            **({} if text is None else {"captions_empty": text.empty, "captions_repeated": text.repeated}),
        }


def audit(data: str, model: str, max_target_length: int, progress: Callable[[int, int], None]) -> Audit:
    """Look at a data folder.

    Args:
        data: as the configuration's `data`.
        model: the checkpoint whose tokenizer reads the captions.
        max_target_length: as the configuration's.
        progress: called with (images looked at, all of them).

    Raises:
        UserError: the folder or the model cannot be read at all.
    """
    examined = examine(data)
    words = words_of(model)
    pictures: dict[object, duplicates.Picture] = {}
    images = list(dict.fromkeys(row.image for row in examined.rows))
    with ThreadPoolExecutor(THREADS) as pool:
        for image, seen in zip(images, pool.map(lambda path: _look(content_of(path)), images), strict=True):
            pictures[image] = seen
            progress(len(pictures), len(images))
    groups = duplicates.find([pictures[image] for image in images])
    by_image: dict[object, list[Row]] = {}
    for row in examined.rows:
        by_image.setdefault(row.image, []).append(row)
    captions = captions_of(examined.rows)
    return Audit(
        examined=examined,
        text=examine_text(captions, words, max_target_length) if words is not None and captions else None,
        copies=tuple(
            Copies(tuple(row for member in group.members for row in by_image[images[member]]), group.identical)
            for group in groups
        ),
        sizes=tuple((pictures[row.image].width, pictures[row.image].height) for row in examined.rows),
    )


def thumbnail(row: Row) -> str:
    """The row's image as a data URL, at most THUMBNAIL pixels wide and high."""
    image = decode(content_of(row.image)).image
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


def spread(rows: Sequence[Row]) -> list[Row]:
    """At most MOST_SHOWN rows, evenly from first to last."""
    step = max(1, -(-len(rows) // MOST_SHOWN))
    return list(rows[::step])


def _look(content: bytes) -> duplicates.Picture:
    try:
        decoded = decode(content)
    except IMAGE_ERRORS as error:
        raise DataError(f"an image was changed while the folder was looked at ({error})") from None
    image: Image.Image = decoded.image
    return duplicates.picture(image, identity(content, decoded))
