"""What is to be captioned: files, globs, folders of images, data folders in a known layout."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.common.errors import DataError, shown
from trainer.data import dataset
from trainer.data.layouts.find import holds_captions

SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".jp2"}
"""Names of image files in a folder; a file that is named itself may have any."""


@dataclass(frozen=True)
class Item:
    """One image to caption."""

    image: Path
    instruction: str | None = None
    """The data's own; None for the adapter's."""
    references: tuple[str, ...] = ()


def items_of(arguments: Sequence[str]) -> tuple[list[Item], list[str]]:
    """(images in order, each once for an instruction, with all its references; problems of data folders' rows).

    Raises:
        DataError: an argument that names nothing, in one message with all others.
    """
    items: dict[tuple[Path, str | None], Item] = {}
    problems: list[str] = []
    wrong: list[str] = []
    for argument in arguments:
        try:
            found, bad = _one(argument)
        except DataError as error:
            wrong.append(str(error))
            continue
        for item in found:  # a data folder may have a row for each caption of an image
            before = items.get((item.image, item.instruction), item)
            references = tuple(dict.fromkeys((*before.references, *item.references)))
            items[item.image, item.instruction] = replace(before, references=references)
        problems += bad
    if wrong:
        raise DataError("\n".join(wrong))
    return list(items.values()), problems


def _one(argument: str) -> tuple[list[Item], list[str]]:
    path = dataset.resolve_folder(argument) if argument == "mini" else Path(argument).expanduser()
    if os.path.lexists(path) and not path.is_dir():
        return [Item(path)], []
    if not path.is_dir():
        matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207 - absolute or not
        files = [match for match in matches if not match.is_dir()]
        if not files:
            kind = "no file matches" if glob.has_magic(str(path)) else "there is no image, folder or pattern"
            raise DataError(f"{kind} {shown(argument)}")
        return [Item(file) for file in files], []
    if holds_captions(path):
        examined = dataset.examine(str(path), part="all")
        rows = [Item(row.image, row.prompt if row.asked else None, row.captions) for row in examined.rows]
        return rows, list(examined.bad)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise DataError(f"the folder {shown(argument)} has no images ({', '.join(sorted(SUFFIXES))}) and no captions")
    return [Item(file) for file in files], []
