"""The caption file of a data folder: which it is, of which layout, and where its images are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from trainer.common.errors import DataError, shown
from trainer.data.layouts import coco, files, karpathy, nwpu, rsicap, tables, vrsbench
from trainer.data.layouts.entry import Entry, Layout, Tiles, joined
from trainer.data.layouts.placing import SPLIT_WORDS, placed, split_in

FORMS = (rsicap.RSIEVAL, rsicap.RSICAP, karpathy.KARPATHY, coco.COCO, *vrsbench.VRSBENCH, nwpu.NWPU, tables.TABLE)
"""In the order in which they are tried."""
IMAGE_FOLDER_FILES = ("metadata.jsonl", "metadata.csv")
FIRST = ("captions.json", *IMAGE_FOLDER_FILES)
"""Files that decide alone, whatever lies beside them."""
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
MOST_FILES = 20
"""Most files that are looked into where none is named as in `FIRST`."""


@dataclass(frozen=True)
class Found:
    """A caption file that was recognised and read."""

    layout: str
    files: tuple[str, ...]
    images: Path
    """The folder that all images must lie in."""
    entries: tuple[Entry, ...]
    """Each with one place: the folder below `images` that its name counts from."""
    tiles: Tiles


def read(folder: Path) -> Found:
    """Recognise and read the caption file of a folder.

    Raises:
        DataError: there is none, or it is in no layout known here: what it looks like, and what is known.
    """
    sources = _sources(folder)
    layout = sources[0][1]
    entries: list[Entry] = []
    counts: list[int] = []
    for name, _, content in sources:
        split = split_in(name) if len(sources) > 1 else None
        parent = name.rpartition("/")[0] if name.rpartition("/")[2] in IMAGE_FOLDER_FILES else ""
        before = len(entries)
        for entry in layout.read(content, name):
            places = (f"{parent}/",) if parent else entry.places
            entries.append(replace(entry, places=places, split=split if entry.split is None else entry.split))
        counts.append(len(entries) - before)
    names = tuple(name for name, _, _ in sources)
    if layout.images is not None:
        if not (folder / layout.images).is_dir():
            raise DataError(f"{folder}: there is {names[0]}, but no folder {layout.images}/ beside it")
        return Found(layout.name, names, (folder / layout.images).resolve(), tuple(entries), layout.tiles)
    images = folder.resolve()
    if layout not in (tables.IMAGE_FOLDER, tables.IMAGE_FOLDER_CSV):
        entries = placed(entries, images)
    if layout.joins:  # after placing: rows of one name may be of several images
        rest = iter(entries)
        entries = [entry for count in counts for entry in joined(islice(rest, count))]
    return Found(layout.name, names, images, tuple(entries), layout.tiles)


def holds_captions(folder: Path) -> bool:
    """Whether any file of a folder is a caption file in a layout known here: otherwise it is a folder of images."""
    for path in _candidates(folder):
        try:
            content = _per_image(path) if path.is_dir() else files.parsed(path)
        except DataError:
            if path.name in FIRST:
                return True  # it is meant to be one: whoever reads it says what is wrong
            continue
        if path.name in FIRST or _layout_of(str(path.relative_to(folder)), content) is not None:
            return True
    return False


def _sources(folder: Path) -> list[tuple[str, Layout, Any]]:
    """(name, layout, content) of the files to read: one, or several of one layout, each with a split in its name."""
    for name in FIRST:
        if (folder / name).is_file():
            content = files.parsed(folder / name)
            layout = _layout_of(name, content)
            if layout is None:
                raise DataError(_unknown(folder, [(name, content)]))
            return [(name, layout, content)]
    found: list[tuple[str, Layout, Any]] = []
    others: list[tuple[str, Any]] = []
    broken: list[str] = []
    for path in _candidates(folder):
        name = str(path.relative_to(folder))
        try:
            content = _per_image(path) if path.is_dir() else files.parsed(path)
        except DataError as error:
            broken.append(str(error))
            continue
        layout = _layout_of(name, content)
        if layout is None:
            others.append((name, content))
        else:
            found.append((name, layout, content))
    if not found:
        if not others and not broken:
            raise DataError(
                f"{folder}: this folder has neither captions.json (RSICap, with its images in images/) nor "
                f"metadata.jsonl, nor another caption file ({', '.join(SUFFIXES)}) in a layout known here:\n{_known()}"
            )
        raise DataError("\n".join([*broken, *([_unknown(folder, others)] if others else [])]))
    if broken:  # it may be the training split: what is left would be trained on without a word
        names = ", ".join(name for name, _, _ in found)
        raise DataError(
            "\n".join([*broken, f"{folder}: {names} beside it can be read; mend what cannot, or move it elsewhere"])
        )
    splits = [split_in(name) for name, _, _ in found]
    if len({layout.name for _, layout, _ in found}) > 1 or (len(found) > 1 and (None in splits)):
        listed = ", ".join(f"{name} ({layout.name})" for name, layout, _ in found)
        raise DataError(
            f"{folder}: holds {len(found)} caption files ({listed}), and nothing says which to use; leave one in this "
            "folder, or several of one layout with train, val or test in their names"
        )
    return found


def _candidates(folder: Path) -> Iterator[Path]:
    """Files that may hold captions: in the folder, in annotations/ (COCO), in train/ and its like (Hugging Face), and
    VRSBench's folders of one file an image. Of many the first, those with a split in their name before others."""
    here = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    folders = [path for path in here if path.is_dir()]
    beside = [path for part in folders if part.name == "annotations" for path in sorted(part.iterdir())]
    parts = [part / name for part in folders if part.name in SPLIT_WORDS for name in IMAGE_FOLDER_FILES]
    files_found = [p for p in (*here, *beside, *parts) if p.suffix.lower() in SUFFIXES and p.is_file()]
    # Splits first: beside many other files one of them would be left out, and the others be trained on.
    yield from islice(sorted(files_found, key=lambda path: split_in(path.name) is None), MOST_FILES)
    yield from (path for path in folders if path.name.startswith("Annotations_"))


def _per_image(folder: Path) -> Any:
    """The JSON files of a folder as one list, each with the name of its file."""
    found = []
    for path in sorted(folder.glob("*.json")):
        content = files.parsed(path)
        found.append({**content, vrsbench.PER_IMAGE: path.name} if isinstance(content, dict) else content)
    return found


def _layout_of(name: str, content: Any) -> Layout | None:
    match name.rpartition("/")[2]:
        case "metadata.jsonl":
            return tables.IMAGE_FOLDER
        case "metadata.csv":
            return tables.IMAGE_FOLDER_CSV if tables.IMAGE_FOLDER_CSV.matches(content) else None
    return next((layout for layout in FORMS if layout.matches(content)), None)


def _unknown(folder: Path, contents: Sequence[tuple[str, Any]]) -> str:
    lines = [f"{folder}: no caption file here is in a known layout:"]
    for name, content in contents[:3]:
        lines.append(f"  - {name} seems to be {_looks_like(content)}")
        lines += [f"      {example}" for example in _examples(content)]
    more = f"and {len(contents) - 3} more files; " if len(contents) > 3 else ""
    return "\n".join([*lines, f"{more}known are:", _known()])


def _known() -> str:
    forms = [tables.IMAGE_FOLDER, *FORMS]
    return "\n".join(f"  - {layout.name}: {layout.form}" for layout in forms)


def _looks_like(content: Any) -> str:
    if isinstance(content, tables.Lines):
        return f"a table of {len(content)} rows{_keys(content)}"
    if isinstance(content, list):
        return f"a list of {len(content)} items{_keys(content)}"
    if not isinstance(content, dict):
        return f"a single {type(content).__name__}"
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    boxes = lists.get("annotations", [])
    if boxes and isinstance(boxes[0], dict) and "bbox" in boxes[0] and "caption" not in boxes[0]:
        return f"COCO's boxes without captions ({len(boxes)} annotations); its captions are in another file"
    parts = [f"{len(value)} items under {shown(key)}{_keys(value)}" for key, value in islice(lists.items(), 3)]
    if parts:
        return f"an object with {' and '.join(parts)}"
    return f"an object with {len(content)} keys ({', '.join(shown(key) for key in islice(content, 5))})"


def _keys(items: Sequence[Any]) -> str:
    first = next((item for item in items[:100] if isinstance(item, dict)), None)
    return f" with the keys {', '.join(shown(str(key)) for key in islice(first, 8))}" if first else ""


def _examples(content: Any) -> list[str]:
    """Three items of the first list, each on a line."""
    items = content
    if isinstance(content, dict):
        items = next((value for value in content.values() if isinstance(value, list) and value), [])
    if not isinstance(items, list):
        return []
    return [shown(item) for item in items[:3]]
