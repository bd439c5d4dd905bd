"""What a reader makes of a caption file: entries as they stand in it, unchecked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

Tiles = Literal["always", "likely", "never"]
"""Whether a number in front of `_N.png` says which scene a tile is cut from: in RSICap and its kin `always`, in NWPU's
names of classes `never`; `likely` in other layouts, unless it is the name of the whole set (`scenes.scene_parts`)."""


@dataclass(frozen=True)
class Entry:
    """One image and its captions as the file has them: values may be of any type until `dataset.examine` checks."""

    where: str
    """The place in the caption file, for messages."""
    name_key: str = ""
    name: Any = None
    captions: tuple[tuple[str, Any], ...] = ()
    """(key, value) of each caption."""
    prompt: tuple[str, Any] | None = None
    """(key, value), None where the file has no prompts."""
    scene: Any = None
    split: Any = None
    label: Any = None
    """The class of the image."""
    places: tuple[str, ...] = ("",)
    """Folders below the images folder where the layout may keep this image, the likeliest first."""
    problem: str | None = None
    """Why it cannot be used, or why there is nothing else in it."""


@dataclass(frozen=True)
class Layout:
    """A known form of caption file."""

    name: str
    source: str
    """Where it is published."""
    form: str
    """How it looks, for messages."""
    tiles: Tiles
    matches: Callable[[Any], bool]
    """Whether this content, parsed, is of the layout."""
    read: Callable[[Any, str], Iterator[Entry]]
    """(content, name of the file) -> entries."""
    joins: bool = False
    """Whether rows of one image are one entry with several captions."""
    images: str | None = None
    """The folder its images must lie in; None to look in `images/`, beside the file and in the folders beside it."""


def objects(content: Any) -> list[dict[str, Any]]:
    """The first hundred objects in a list: enough to recognise a layout by."""
    return [item for item in content[:100] if isinstance(item, dict)] if isinstance(content, list) else []


def have(items: Sequence[Mapping[str, Any]], *keys: str) -> bool:
    """Whether any of the objects has all these keys."""
    return any(all(key in item for key in keys) for item in items)


def not_an_object(where: str, value: Any) -> Entry:
    """An entry for what should have been an object."""
    return Entry(where, problem=f"must be an object, but is {type(value).__name__}")


def joined(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Entries of one image (and one prompt) made one with all their captions, in the order of the first.

    They must have been placed: until then equal names may be of several images.
    """
    groups: dict[object, list[Entry]] = {}
    for number, entry in enumerate(entries):
        whole = entry.problem is None and isinstance(entry.name, str)
        key = (entry.name, entry.places, repr(entry.prompt), repr(entry.split)) if whole else number
        groups.setdefault(key, []).append(entry)
    for first, *more in groups.values():
        if not more:
            yield first
            continue
        captions = tuple(caption for entry in (first, *more) for caption in entry.captions)
        yield replace(first, captions=captions)
