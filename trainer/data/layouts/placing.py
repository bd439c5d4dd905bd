"""Where the image of each entry lies, in layouts whose images may lie in any folder.

Folders repeat names: `train/0000.jpg` and `test/0000.jpg`, `airport/000.jpg` and `beach/000.jpg`. A name is looked up
in all of them, and where several have it, the folder decides that says the entry's own split or class. What is then
still in several is in `images/` or beside the caption file, or its row is bad: a guess would pair a caption with
another image, and train on pictures of the test split.
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from trainer.data.layouts.entry import Entry
from trainer.data.splits import name_of

MOST_FOLDERS = 100
"""Most folders in which images are looked for, and most folders in these."""
SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}

NO_FILE = PurePosixPath()


def split_in(name: str) -> str | None:
    """`train`, `val` or `test` if the name says so: `captions_val2017.json` is a validation split."""
    words = "".join(c if c.isalpha() else " " for c in name.lower().rpartition(".")[0] or name.lower()).split()
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    return found.pop() if len(found) == 1 else None


def placed(entries: Sequence[Entry], images: Path) -> list[Entry]:
    """The entries, each with the one place its image was found at, or the commonest if it is missing.

    An entry whose image may be one of several, or is another entry's, has a problem instead.
    """
    outer = _folders(images)
    inner = [f"{name}/{below}" for name in outer for below in _folders(images / name)][:MOST_FOLDERS]
    homes = ["images/", "", *(f"{name}/" for name in (*outer, *inner) if name != "images")]
    names = [_name(entry) for entry in entries]
    index = _Index(images, homes, (name for name in names if name is not None))
    found = [
        _Found() if name is None else _choose(entry, index.where(name, entry.places), images)
        for entry, name in zip(entries, names, strict=True)
    ]
    usual = Counter(each.places[0] for each in found if each.places).most_common(1)
    default = usual[0][0] if usual else "images/" if (images / "images").is_dir() else ""
    strangers = _strangers(entries, found)
    done = []
    for number, (entry, each) in enumerate(zip(entries, found, strict=True)):
        problem = entry.problem
        if len(each.places) > 1:
            several = _listed(each.places)
            problem = f"{entry.name}: the image is in several folders: {several}; write the folder before the name"
        elif number in strangers:
            problem = f"{entry.name}: the image is missing; that in {_listed(each.places)} is another row's"
        done.append(replace(entry, places=(each.places or (default,))[:1], problem=problem))
    return done


@dataclass(frozen=True)
class _Found:
    """Where the image of an entry may be."""

    places: tuple[str, ...] = ()
    """Folders below the images folder: none, one, or several that nothing tells apart."""
    file: PurePosixPath = NO_FILE
    """The first of them, below the images folder."""
    by_class: bool = False
    """Whether the class chose between several."""


class _Index:
    """The files of each name. Folders are listed, each once: a look a row and folder takes minutes."""

    def __init__(self, images: Path, homes: Sequence[str], names: Iterable[PurePosixPath]) -> None:
        self._images = images
        self._homes = homes
        self._wanted = {_form(part) for name in names for part in (name.parts[0], name.name)}
        self._listed: dict[PurePosixPath, set[str]] = {}
        self._known: dict[tuple[tuple[str, ...], PurePosixPath], dict[str, dict[PurePosixPath, str]]] = {}

    def where(self, name: PurePosixPath, places: tuple[str, ...]) -> dict[PurePosixPath, str]:
        """The files that may be meant, below the images folder, in whatever Unicode form, with the place of each."""
        key = places, name.parent
        if key not in self._known:
            self._known[key] = self._files(*key)
        return self._known[key].get(_form(name.name), {})

    def _files(self, places: tuple[str, ...], inner: PurePosixPath) -> dict[str, dict[PurePosixPath, str]]:
        """The wanted files by name, of all homes, in `inner` below each of the places."""
        found: dict[str, dict[PurePosixPath, str]] = {}
        for place in (home + below for home in self._homes for below in places if not below.startswith("/")):
            outer = PurePosixPath(place)
            # Most homes do not have the inner folder: data with a folder an image have thousands of these.
            if ".." not in outer.parts and (not inner.parts or _form(inner.parts[0]) in self._names(outer)):
                for name in self._names(outer / inner):
                    found.setdefault(name, {}).setdefault(outer / inner / name, place)
        return found

    def _names(self, folder: PurePosixPath) -> set[str]:
        if folder not in self._listed:
            try:
                names = map(_form, os.listdir(self._images / folder))  # noqa: PTH208 - names alone
            except (OSError, ValueError):  # no such folder, or no name of one
                names = map(_form, ())
            self._listed[folder] = self._wanted.intersection(names)
        return self._listed[folder]


def _choose(entry: Entry, found: dict[PurePosixPath, str], images: Path) -> _Found:
    """The one of several files that the layout, the split, the class or the scene says, or the usual one; else all."""
    if len(found) < 2:
        return next((_Found((place,), file) for file, place in found.items()), _Found())
    split = name_of(entry.split)

    def by_split(file: PurePosixPath) -> int:
        said = _split_of(file.parent)
        return 2 * (said == split) + (said is None) if split is not None else _says(file.parent, entry.split)

    files = _most(found, lambda file: f"/{found[file]}".endswith(f"/{entry.places[0]}"))
    files = _most(files, by_split)
    several = len(files)
    files = _most(files, lambda file: _says(file.parent, entry.label))
    by_class = len(files) < several
    files = _most(files, lambda file: _says(file.parent, entry.scene))
    if len(files) > 1 and len({os.path.realpath(images / file) for file in files}) == 1:
        files = files[:1]  # links to one file
    files = _most(files, lambda file: found[file] == "images/")
    files = _most(files, lambda file: found[file] == "")
    files = _most(files, lambda file: found[file].startswith("images/"))
    return _Found(tuple(found[file] for file in files), files[0], by_class)


def _most(files: Iterable[PurePosixPath], score: Callable[[PurePosixPath], int]) -> list[PurePosixPath]:
    """The files with the highest score: all of them where nothing tells them apart."""
    scores = {file: score(file) for file in files}
    best = max(scores.values())
    return [file for file, value in scores.items() if value == best]


def _strangers(entries: Sequence[Entry], found: Sequence[_Found]) -> set[int]:
    """Entries whose own image is missing, so that the one found is of the same name in another split or class.

    That is so where the folder's own split or class has an entry for the file, too. An image may be of two classes, so
    classes count only where folders repeat names.
    """
    sharing: dict[PurePosixPath, list[int]] = {}
    for number, each in enumerate(found):
        if len(each.places) == 1:
            sharing.setdefault(each.file, []).append(number)
    repeated = any(each.by_class for each in found)
    strangers: set[int] = set()
    for file, numbers in sharing.items():
        splits = {number: name_of(entries[number].split) for number in numbers}
        said = _split_of(file.parent) if len(set(splits.values())) > 1 else None
        if said is not None and said in splits.values():
            strangers |= {number for number, split in splits.items() if split not in (None, said)}
        if repeated:
            owners = {number for number in numbers if _says(file.parent, entries[number].label)}
            others = {number for number in numbers if number not in owners and _plain(entries[number].label)}
            strangers |= others if owners else set()
    return strangers


def _split_of(folder: PurePosixPath) -> str | None:
    """The split that a folder's names say, if they say one."""
    said = {name_of(part) or split_in(part) for part in folder.parts} - {None}
    return said.pop() if len(said) == 1 else None


def _says(folder: PurePosixPath, word: object) -> bool:
    """Whether one of a folder's names is this word."""
    return word is not None and _plain(word) in map(_plain, folder.parts) and bool(_plain(word))


def _plain(word: object) -> str:
    """Letters and digits alone: the class `Baseball field` has the folder `baseball_field`."""
    return "".join(c for c in str(word).casefold() if c.isalnum()) if word is not None else ""


def _name(entry: Entry) -> PurePosixPath | None:
    """The image's name with its folders, None where it can be in none of ours."""
    name = PurePosixPath(entry.name.replace("\\", "/")) if isinstance(entry.name, str) else PurePosixPath()
    return None if not name.name or name.is_absolute() or ".." in name.parts else name


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listed(places: Sequence[str]) -> str:
    return ", ".join(place or "./" for place in places[:3]) + (", ..." if len(places) > 3 else "")


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones; of one that may not be read, as `lost+found`, none."""
    try:
        with os.scandir(folder) as found:
            names = sorted(item.name for item in found if not item.name.startswith(".") and item.is_dir())
    except OSError:
        return []
    return names[:MOST_FOLDERS]
