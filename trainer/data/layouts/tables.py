"""Tables, a row an image or a caption: Hugging Face image folders, and JSONL, JSON lists and CSV files.

Image folders: https://huggingface.co/docs/datasets/image_dataset#imagefolder (`metadata.jsonl` or `metadata.csv`, the
column `file_name`). Others have the column names in use: `image,caption` (Flickr8k's CSV), `filename`, `filepath`
(OpenCLIP's CSV files, https://github.com/mlfoundations/open_clip#sample-single-process-running-code).
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from trainer.data.layouts.entry import Entry, Layout, have, not_an_object, objects

NAMES = ("file_name", "filename", "image", "file", "path", "filepath", "image_path", "image_file", "img", "image_name")
"""Columns that name the image, the first that is there counts."""
CAPTIONS = ("text", "caption", "sentence", "captions", "sentences", "texts", "description", "title", "raw")
"""Columns that hold the caption, or a list of captions; `caption_1`, `caption_2` and so on go with `caption`,
and `caption.1`, as pandas has them."""
SPLITS = ("split", "subset", "partition")
LABELS = ("class", "label", "category")


class Lines(list[Any]):
    """The rows of a table with the line of each, for messages."""

    def __init__(self, rows: list[tuple[int, Any]], unit: str = "line") -> None:
        super().__init__(row for _, row in rows)
        self.lines = [line for line, _ in rows]
        self.unit = unit


class Bad(str):
    """In the place of a row: why the line cannot be read."""


def _first(item: Mapping[str, Any], keys: tuple[str, ...]) -> str | None:
    return next((key for key in keys if key in item), None)


def caption_columns(item: Mapping[str, Any]) -> list[str]:
    """The columns of a row that hold captions: `caption`, or `caption_1`, `caption_2`, ..., or both."""
    plain = _first(item, CAPTIONS)
    for key in [plain] if plain else CAPTIONS:
        numbered = [name for name in item if re.fullmatch(rf"{key}[_ .-]?\d+", name)]
        if plain or numbered:
            return [*([plain] if plain else []), *numbered]
    return []


def _listed(value: Any) -> Any:
    """The list of texts that a cell holds as text, in JSON as Flickr30k's CSV or as Python writes it, as such."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return value
    for read in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = read(value)
            if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
                return found
    return value


def _captions(item: Mapping[str, Any], columns: list[str]) -> tuple[tuple[str, Any], ...]:
    found: list[tuple[str, Any]] = []
    for column in columns:
        value = _listed(item.get(column))
        if isinstance(value, list) and value:
            found += [(column, part.get("raw") if isinstance(part, dict) else part) for part in value]
        else:
            found.append((column, value))
    # A table has empty cells where an image has fewer captions than others.
    said = [(key, value) for key, value in found if value is not None and value != ""]
    return tuple(said or found[:1])


def _entry(item: Any, where: str, names: tuple[str, ...], *, one_column: bool) -> Entry:
    if isinstance(item, Bad):
        return Entry(where, problem=str(item))
    if not isinstance(item, dict):
        return not_an_object(where, item)
    columns = caption_columns(item)
    if one_column and columns[:1] and columns[0] in ("text", "caption"):
        columns = columns[:1]
    name = _first(item, names) or names[0]
    split, label = _first(item, SPLITS), _first(item, LABELS)
    return Entry(
        where=where,
        name_key=name,
        name=item.get(name),
        captions=_captions(item, columns) or ((CAPTIONS[0], None),),
        prompt=("prompt", item["prompt"]) if "prompt" in item and item["prompt"] != "" else None,
        scene=None if item.get("scene") == "" else item.get("scene"),
        split=item[split] if split else None,
        label=item[label] if label else None,
    )


def _entries(content: Any, file: str, names: tuple[str, ...], *, one_column: bool) -> Iterator[Entry]:
    lines = content.lines if isinstance(content, Lines) else range(len(content))
    unit = content.unit if isinstance(content, Lines) else "item"
    for line, item in zip(lines, content, strict=True):
        yield _entry(item, f"{file}, {unit} {line}", names, one_column=one_column)


def _read_folder(content: Any, file: str) -> Iterator[Entry]:
    """As before there were several captions: `text` or `caption` alone, a row for each line."""
    return _entries(content, file, NAMES[:1], one_column=True)


def _read_table(content: Any, file: str) -> Iterator[Entry]:
    return _entries(content, file, NAMES, one_column=False)


def _is_table(content: Any) -> bool:
    first = objects(content)
    return any(have(first, name) for name in NAMES) and any(caption_columns(item) for item in first)


IMAGE_FOLDER = Layout(
    name="image folder",
    source="https://huggingface.co/docs/datasets/image_dataset",
    form="metadata.jsonl or metadata.csv: file_name, text or caption, optionally prompt, scene, split",
    tiles="likely",
    matches=lambda content: isinstance(content, Lines),
    read=_read_folder,
)
IMAGE_FOLDER_CSV = Layout(
    name="image folder",
    source=IMAGE_FOLDER.source,
    form=IMAGE_FOLDER.form,
    tiles="likely",
    matches=_is_table,
    read=_read_table,
    joins=True,
)
TABLE = Layout(
    name="table",
    source="https://github.com/mlfoundations/open_clip",
    form="JSONL, a JSON list or CSV: image, file, filename or path, and caption, text or sentence",
    tiles="likely",
    matches=_is_table,
    read=_read_table,
    joins=True,
)
