"""Caption files as text and as plain data: UTF-8 alone, and what a file is that is not."""

from __future__ import annotations

import codecs
import csv
import io
import json
import shlex
from itertools import count, zip_longest
from pathlib import Path
from typing import Any

from trainer.common.errors import DataError, shown
from trainer.data.layouts.tables import CAPTIONS, LABELS, NAMES, SPLITS, Bad, Lines

MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
"""Byte order marks; UTF-32's begins with UTF-16's."""
PAIRS = (("euc_kr", "EUC-KR"), ("gb2312", "GB18030"), ("euc_jp", "EUC-JP"), ("shift_jis", "SHIFT_JIS"))
"""Codecs of two bytes a character, strict ones, and the name for iconv. Latin text with accents fails in them, since
an accented letter stands alone among ASCII."""
CSV_FIELD_LIMIT = 1 << 20
QUOTES = "a quote that is opened must be closed, and one within a quoted value is written twice"
READ = (*NAMES, *SPLITS, *LABELS, "prompt", "scene")
"""Columns of which there may be one each."""


def text_of(path: Path) -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises:
        DataError: it cannot be read, or is in another encoding, which is named with the command that converts it.
    """

    def converted(encoding: str) -> str:
        """The command that puts a copy in UTF-8 in the file's place: beside it, the file would still be read."""
        name, copy = (shlex.quote(str(p)) for p in (path, path.with_name(f"{path.name}.utf8")))
        return f"iconv -f {encoding} -t UTF-8 {name} > {copy} && mv {copy} {name}"

    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        encoding = encoding_of(content)
        line = content[: error.start].count(b"\n") + 1
        byte = f"byte 0x{content[error.start]:02x} in line {line}"
        raise DataError(
            f"{path}: is not readable as JSON, JSONL or CSV: it is not UTF-8 text ({byte}) but looks like {encoding}; "
            f"convert it: {converted(encoding)}"
        ) from None
    if len(text) > 1 and text[:2].count("\0") == 1:
        order = "LE" if text[1] == "\0" else "BE"
        raise DataError(
            f"{path}: is not readable as JSON, JSONL or CSV: every other byte is 0, so it looks like UTF-16{order}; "
            f"convert it: {converted(f'UTF-16{order}')}"
        )
    return text


def encoding_of(content: bytes) -> str:
    """The likeliest encoding of text that is not UTF-8, as iconv names it."""
    for mark, name in MARKS:
        if content.startswith(mark):
            return name
    if content[:200].count(b"\0") > len(content[:200]) // 4:
        return "UTF-16LE" if content[1:2] == b"\0" else "UTF-16BE"
    for codec, name in PAIRS:
        # The bytes of Korean are also Chinese, in meaningless order; those of Chinese are hardly ever all Hangul.
        try:
            text = content.decode(codec)
        except UnicodeDecodeError:
            continue
        if codec != "euc_kr" or all("\uac00" <= c <= "\ud7a3" for c in text if not c.isascii()):
            return name
    return "WINDOWS-1252"


def parsed(path: Path) -> Any:
    """The content of a `.json`, `.jsonl` or `.csv` file as plain data; rows of tables as `Lines`.

    Raises:
        DataError: it is not of that form.
    """
    text = text_of(path)
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return _json_lines(text)
    if path.suffix.lower() in (".csv", ".tsv"):
        return _csv_rows(path, text)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = _json_lines(text)
        if len(lines) > 1 and any(isinstance(row, dict) for row in lines[:2]):  # JSONL under another name
            return lines
        raise DataError(f"{path}: is not readable as JSON ({error})") from None


def _json_lines(text: str) -> Lines:
    rows: list[tuple[int, Any]] = []
    # Not splitlines(): JSON texts may hold U+2028 and the like as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            rows.append((number, Bad(f"is not JSON ({error})")))
    return Lines(rows)


def _csv_rows(path: Path, text: str) -> Lines:
    """Rows as objects by the names in the first line; separated by the commas, semicolons or tabs of that line."""
    head = text.partition("\n")[0]
    separator = max(",;\t|", key=head.count)
    csv.field_size_limit(CSV_FIELD_LIMIT)
    rows: list[tuple[int, Any]] = []
    # Strictly: a quote that is never closed would make one caption of all that follows. A quote after a separator and
    # a space opens a value too; else it would stand in the caption, and a comma within would end it.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True, skipinitialspace=True)
    try:
        columns = _columns(path, [name.strip() for name in next(reader, [])])
    except csv.Error as error:
        raise DataError(f"{path}: is not readable as CSV (line {reader.line_num}: {error})") from None
    while True:
        first = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return Lines(rows)
        except csv.Error as error:
            begun = f" in the row that begins in line {first}" if reader.line_num > first else ""
            rows.append((reader.line_num, Bad(f"is not CSV{begun} ({error}); {QUOTES}")))
            continue
        if len(values) > len(columns):
            bad = f"has {len(values)} values for {len(columns)} columns; quote values that hold {separator!r}"
            rows.append((reader.line_num, Bad(bad)))
        elif values:
            rows.append((reader.line_num, dict(zip_longest(columns, values, fillvalue=""))))


def _columns(path: Path, names: list[str]) -> list[str]:
    """The names of a table's columns. Captions under one name are told apart, as `caption`, `caption_2`, ...

    Raises:
        DataError: two columns of another kind that is read have one name.
    """
    found: list[str] = []
    for name in names:
        if name not in found:
            found.append(name)
        elif name in CAPTIONS:
            number = next(n for n in count(2) if f"{name}_{n}" not in (*found, *names))
            found.append(f"{name}_{number}")
        elif name in READ:
            raise DataError(f"{path}: two columns are named {shown(name)}; name them apart, or leave one out")
        else:
            found.append(name)
    return found
