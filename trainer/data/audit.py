"""A data folder looked at as a whole: what training would take, and what its owner should see first."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data.dataset import Examined, Row, Split, split, survey
from trainer.data.images import content_of, decode
from trainer.data.text import Text, text_of

BOTH = "both sides"
THUMBNAIL = 128
"""Longest side of a picture on the page."""
MOST_SHOWN = 48
"""Pictures of the contact sheet, and groups of copies, that are shown."""


@dataclass(frozen=True)
class Copies:
    """Rows of one picture under several names."""

    rows: tuple[Row, ...]
    identical: bool
    """The files are the same, byte by byte."""
    sides: str
    """The side of the split that all of them are on, `BOTH`, or `not used`."""

    @property
    def scenes(self) -> int:
        """Number of scenes."""
        return len({row.scene for row in self.rows})


@dataclass(frozen=True)
class Audit:
    """All findings on a data folder."""

    examined: Examined
    parts: Split | None
    """How a search would split it; None if it cannot be split, see `problems`."""
    problems: tuple[str, ...]
    """Why a search would not take this folder, but for single rows."""
    text: Text | None
    """None where the model's tokenizer is not at hand."""
    copies: tuple[Copies, ...]
    on_both: int
    """Image files that are in training and in validation."""
    sizes: tuple[tuple[int, int], ...]
    """(width, height) of each row's image."""
    skip_bad_rows: bool = False

    @property
    def name(self) -> str:
        """The folder's own name, without the path that leads to it on this machine."""
        return Path(self.examined.folder).resolve().name

    @property
    def refused(self) -> bool:
        """Whether a search would not take this folder as it is."""
        return bool(self.problems or (self.examined.bad and not self.skip_bad_rows))

    def warnings(self) -> list[str]:
        """What to look at, a sentence each."""
        found = list(self.problems)
        found += self.text.warnings() if self.text else []
        found += self.parts.facts.warnings if self.parts else ()
        return found

    def split_lines(self) -> list[str]:
        """How a search would split the rows, without what `warnings` has."""
        return self.parts.facts.facts() if self.parts else []

    def counts(self) -> dict[str, int | float | str]:
        """The counts by name."""
        rows = self.examined.rows
        facts = self.parts.facts if self.parts else None
        split_counts: dict[str, int | float | str] = {}
        if facts is not None:
            known = {"scenes": facts.scenes, "classes": facts.classes}
            split_counts = {
                "split_by": facts.rule,
                "rows_used": facts.rows,
                "rows_that_train": facts.train,
                "rows_that_validate": facts.val,
                **{name: count or "none known" for name, count in known.items()},
                **({"scenes_that_validate": facts.val_scenes} if facts.scenes else {}),
                **({"classes_that_validate": facts.val_classes} if facts.classes else {}),
            }
        return {
            "layout": self.examined.layout,
            "rows": len(rows),
            "bad_rows": len(self.examined.bad),
            "test_rows_left_alone": self.examined.test_rows,
            "images": len({row.image for row in rows}),
            **split_counts,
            "prompts": len({row.prompt for row in rows}),
            **(self.text.counts() if self.text else {}),
            "copied_pictures": len(self.copies),
            "rows_of_copied_pictures": sum(len(group.rows) for group in self.copies),
            "copied_pictures_on_both_sides": sum(group.sides == BOTH for group in self.copies),
            "images_on_both_sides": self.on_both,
            "images_of_one_colour": len(self.examined.plain),
            "fingerprint": self.examined.fingerprint,
        }


def audit(config: TrainConfig, progress: Callable[[int, int], None]) -> Audit:
    """Look at a data folder as a search with this configuration would; every image is decoded once.

    Args:
        config: its `data`, the `model` whose tokenizers read the text, and what decides the split.
        progress: called with (images looked at, all of them).

    Raises:
        UserError: the folder or the model cannot be read at all.
    """
    surveyed = survey(config.data, progress)
    examined, pictures = surveyed.examined, surveyed.pictures
    problems = []
    text = text_of(examined.rows, config.model, config.max_target_length)
    problem = text.problem() if text is not None else None
    if problem is not None:
        problems.append(problem)
    parts = None
    try:
        parts = split(examined, config.model_copy(update={"skip_bad_rows": True}))
    except DataError as error:
        problems.append(str(error))
    rows_of: dict[Path, list[Row]] = {}
    for row in examined.rows:
        rows_of.setdefault(row.image, []).append(row)
    sides: defaultdict[Path, set[str]] = defaultdict(set)
    for name, rows_there in (("training", parts.train), ("validation", parts.val)) if parts is not None else ():
        for row in rows_there:
            sides[row.image].add(name)
    copies = []
    for paths in examined.copies:
        on = {side for path in paths for side in sides.get(path, ())}
        rows = tuple(row for path in paths for row in rows_of[path])
        side = BOTH if len(on) > 1 else on.pop() if on else "not used"
        copies.append(Copies(rows, len({pictures[path].digest for path in paths}) == 1, side))
    return Audit(
        examined=examined,
        parts=parts,
        problems=tuple(problems),
        text=text,
        copies=tuple(copies),
        on_both=sum(len(there) > 1 for there in sides.values()),
        sizes=tuple((pictures[row.image].width, pictures[row.image].height) for row in examined.rows),
        skip_bad_rows=config.skip_bad_rows,
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
