"""Captioned images on disk: reading, checking, splitting. Needs Pillow alone: data can be checked before
torch is loaded.

The layouts that are read, and how each is recognised, are in `trainer.data.layouts`; what a scene is and what a class,
in `trainer.data.scenes`; how rows are split, in `trainer.data.splits`. All of it is described in docs/data.md.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import stat
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Literal

from trainer.common.errors import DataError, shown
from trainer.config import EMBEDDED, TrainConfig
from trainer.data import duplicates, scenes, splits
from trainer.data import problems as grouping
from trainer.data.images import IMAGE_ERRORS, content_of, decode, identity, problem_of
from trainer.data.layouts import find
from trainer.data.layouts.entry import Entry
from trainer.data.paths import Names, relative
from trainer.data.splits import SplitFacts

DEFAULT_PROMPT = "Describe this image in detail."
THREADS = 4
"""Images that are decoded at once."""
AT_ONCE = 16
"""Images in one job of a thread: a job costs 0.1 ms, a fifth of a small image's decoding."""
_SURROGATE = re.compile("[\ud800-\udfff]")
Progress = Callable[[int, int], None]


def quiet(done: int, total: int) -> None:
    """Progress that nobody looks at."""


Part = Literal["search", "test", "all"]
"""Which rows of a data folder are read: all but those of a given test split, those alone, or every one."""


@dataclass(frozen=True)
class Row:
    """One image with its captions."""

    image: Path
    prompt: str
    caption: str
    """The first caption; most data have no other."""
    scene: str
    """Rows of one scene stay on one side of the split."""
    where: str
    """The row's place in its caption file, for messages."""
    more_captions: tuple[str, ...] = ()
    """The other captions of the image."""
    given: str | None = None
    """The split that the data give the row, as they write it."""
    label: str | None = None
    """The class of the image, where the data, its folder or its name say one."""
    asked: bool = True
    """Whether `prompt` is the data's own; if not, it is `DEFAULT_PROMPT`, and captions are asked for by what the
    adapter learnt."""

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions. Training draws one of them an epoch, evaluation uses each."""
        return (self.caption, *self.more_captions)


@dataclass(frozen=True)
class Examined:
    """A data folder after its one check: the good rows, the bad ones with their reasons, and its fingerprint."""

    folder: str
    rows: tuple[Row, ...]
    bad: tuple[str, ...]
    fingerprint: str
    """Hash of all prompts, captions, scenes and given splits (they decide the split) and image bytes, whatever the
    folder's path."""
    layout: str = "RSICap"
    """The layout of the caption file."""
    test_rows: int = 0
    """Rows of a given test split. They are counted and not otherwise read: neither searched on nor checked."""
    scenes_by: str = ""
    """What the scenes were taken from, empty where none are known."""
    alike: str = ""
    """What most file names begin with, where it may be the name of the whole set and so is taken for no scene."""
    copies: tuple[tuple[Path, ...], ...] = ()
    """Images that show the same picture, in groups (`trainer.data.duplicates`)."""
    plain: tuple[Path, ...] = ()
    """Images of one colour."""


@dataclass(frozen=True)
class Split:
    """The rows of a run."""

    train: tuple[Row, ...]
    val: tuple[Row, ...]
    facts: SplitFacts = field(default_factory=SplitFacts, compare=False)
    """By which rule they were split, the counts, and what to look at."""


def resolve_folder(data: str) -> Path:
    """The data folder itself; `mini` is generated on first use."""
    if data == EMBEDDED:
        from trainer.mini import ensure_data

        try:
            return ensure_data()
        except (OSError, RuntimeError) as error:  # the folder cannot be made, or there is no room
            raise DataError(
                f"the embedded data cannot be written to the cache: {error}; name a folder in LORA_SEARCH_CACHE"
            ) from None
    try:
        return Path(data).expanduser()
    except RuntimeError as error:  # a home folder of an unknown user
        raise DataError(f"the data folder {shown(data)} cannot be found: {error}") from None


@dataclass(frozen=True)
class Survey:
    """A data folder after its one check, with what the audit shows besides."""

    examined: Examined
    pictures: Mapping[Path, duplicates.Picture]
    """Of each image of a good row."""


def examine(data: str, progress: Progress = quiet, *, part: Part = "search") -> Examined:
    """Read and check a whole data folder: every row, every image decoded once.

    Args:
        data: as the configuration's `data`.
        progress: called with (images looked at, all of them).
        part: the rows to read. A search reads no test row; captioning and evaluation do.

    Raises:
        DataError: the folder or its caption file is missing or unreadable, or has no rows.
    """
    return survey(data, progress, part=part).examined


def survey(data: str, progress: Progress = quiet, *, part: Part = "search") -> Survey:
    """The same, and what was kept of each image. Arguments and errors as of `examine`."""
    folder = resolve_folder(data)
    read = _read(folder, part)
    problems = list(read.problems)
    looked = _look_at(list(dict.fromkeys(row.image for row in read.rows)), read.found.images, progress)
    rows: list[Row] = []
    pictures: dict[Path, duplicates.Picture] = {}
    for row in read.rows:
        image, picture, problem = looked[row.image]
        if picture is None:
            problems.append(f"{row.where}: {problem}")
        else:
            rows.append(replace(row, image=image))
            pictures[image] = picture
    paths = list(pictures)
    copies = tuple(tuple(paths[n] for n in group.members) for group in duplicates.find(list(pictures.values())))
    whole = hashlib.sha256()
    for row in rows:
        # Rows with one caption and no given split hash as they did before there were others.
        added = [list(row.more_captions), row.given] if row.more_captions or row.given is not None else []
        digest = pictures[row.image].digest
        whole.update(json.dumps([row.prompt, row.caption, row.scene, digest, *added]).encode())
    if copies:  # they decide the split too, which earlier versions made without looking for them
        whole.update(json.dumps([len(copies), sum(map(len, copies))]).encode())
    examined = Examined(
        folder=str(folder),
        rows=tuple(rows),
        bad=tuple(problems),
        fingerprint=whole.hexdigest()[:16],
        layout=f"{read.found.layout} ({', '.join(read.found.files)})",
        test_rows=read.tests,
        scenes_by=read.scenes_by,
        alike=read.alike,
        copies=copies,
        plain=tuple(path for path, picture in pictures.items() if picture.plain),
    )
    return Survey(examined, pictures)


def usable(examined: Examined, config: TrainConfig) -> Examined:
    """The same folder, if this configuration accepts it.

    Raises:
        DataError: bad rows without `skip_bad_rows`, all in one message, or fewer than two good ones.
    """
    if examined.bad and not config.skip_bad_rows:
        listed = grouping.grouped(examined.bad)
        total = len(examined.bad) + len(examined.rows)
        raise DataError(
            f"{examined.folder}: {len(examined.bad)} of {total} rows cannot be used:\n"
            + "\n".join(listed)
            + "\nCorrect them, or leave them out: --set skip_bad_rows=true"
        )
    if len(examined.rows) < 2:
        raise DataError(f"{examined.folder}: a run needs at least 2 good rows, but there are {len(examined.rows)}")
    return examined


def split(examined: Examined, config: TrainConfig) -> Split:
    """Training and validation rows, by `split` (given, scenes or random), `split_seed` and `max_samples` alone.

    Raises:
        DataError: the data cannot be split so: they give no splits, or all rows are of one scene.
    """
    usable(examined, config)
    train, val, facts = splits.divide(examined, config)
    return Split(train=(*train, *val) if config.full_data else train, val=val, facts=facts)


def _look_at(
    images: Sequence[Path], folder: Path, progress: Progress
) -> dict[Path, tuple[Path, duplicates.Picture | None, str]]:
    """For each image (its file as on disk, what is kept of it, "") or (the file, None, what is wrong with it)."""
    names = Names(folder)
    looked: dict[Path, tuple[Path, duplicates.Picture | None, str]] = {}
    parts = [images[start : start + AT_ONCE] for start in range(0, len(images), AT_ONCE)]
    with ThreadPoolExecutor(THREADS) as pool, warnings.catch_warnings():  # decoding releases the GIL
        warnings.simplefilter("ignore")  # about files that are odd but readable
        for part, seen in zip(
            parts, pool.map(lambda part: [_look(image, names) for image in part], parts), strict=True
        ):
            looked.update(zip(part, seen, strict=True))
            progress(len(looked), len(images))
    return looked


def _look(image: Path, names: Names) -> tuple[Path, duplicates.Picture | None, str]:
    try:
        image = names.on_disk(image)
        content = content_of(image)
        decoded = decode(content, cells=duplicates.SIZE)
        found = duplicates.picture(decoded.image, identity(content, decoded), decoded.size)
        if found.plain and decoded.image.size != decoded.size:  # what is small in it may have vanished
            found = duplicates.picture(decode(content).image, found.digest)
    except DataError as error:
        return image, None, f"{image.name}: {error}"
    except IMAGE_ERRORS as error:
        return image, None, f"{image.name}: {problem_of(error)}"
    return image, found, ""


@dataclass(frozen=True)
class _Read:
    """What the caption file says."""

    rows: list[Row]
    """Whose entries are sound; their images were not looked at yet."""
    problems: list[str]
    """Of the other entries."""
    found: find.Found
    tests: int
    """Rows of a test split."""
    scenes_by: str
    alike: str


def _read(folder: Path, part: Part) -> _Read:
    """The caption file of a folder, read.

    Raises:
        DataError: the folder or the file cannot be read, or has no rows of this part.
    """
    try:
        kind = folder.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"the data folder {shown(str(folder))} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a null character
        problem = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"the data folder {shown(str(folder))} cannot be read: {problem}") from None
    if not stat.S_ISDIR(kind):
        raise DataError(f"{folder}: the data must be a folder, but this is a file")
    found = find.read(folder)
    problems: list[str] = []
    rows: list[Row] = []
    names: list[PurePosixPath] = []
    given_scenes: list[str | None] = []
    tests = 0
    for entry in found.entries:
        is_test = splits.is_test(entry.split)
        tests += is_test
        if part != "all" and is_test != (part == "test"):
            continue
        row = _row(entry, found.images, problems)
        if row is not None:
            rows.append(row)
            names.append(PurePosixPath(str(entry.name).replace("\\", "/")))
            given_scenes.append(None if entry.scene is None else str(entry.scene))
    if not rows and not problems:
        if part == "test":
            raise DataError(f"{folder}: no row is of a given test split ({found.layout})")
        if tests:
            raise DataError(
                f"{folder}: all {tests} rows are a test set ({found.layout}), which a search never reads; "
                "give it training data, and keep this folder for the result"
            )
        raise DataError(f"{folder}: the caption file has no rows")
    rows, scenes_by = _with_scenes(rows, names, given_scenes, found)
    alike = "" if scenes_by else scenes.alike(names, found.tiles) or ""
    return _Read(rows, problems, found, tests, scenes_by, alike)


def _with_scenes(
    rows: list[Row], names: list[PurePosixPath], given: list[str | None], found: find.Found
) -> tuple[list[Row], str]:
    """The rows with their scenes and classes, and what the scenes were taken from."""
    parts = scenes.scene_parts(names, found.tiles)
    known = [own if own is not None else part for own, part in zip(given, parts, strict=True)]
    labels = scenes.class_parts(names, [own or part for own, part in zip(given, parts, strict=True)])
    whole = scenes.with_single(names, [row.image.relative_to(found.images) for row in rows], known)
    placed = [
        replace(row, scene=scene, label=row.label or label)
        for row, scene, label in zip(rows, whole, labels, strict=True)
    ]
    sources = ["the column 'scene'"] if any(own is not None for own in given) else []
    named = next(
        (n for n, own, part in zip(names, given, parts, strict=True) if own is None and part is not None), None
    )
    if named is not None:
        sources.append(f"file names, as {str(named.with_suffix('')).rpartition('_')[0]} in {named}")
    return placed, " and ".join(sources)


def _row(entry: Entry, images: Path, problems: list[str]) -> Row | None:
    """The entry as a Row, or None with its problem added to `problems`."""
    where, name, name_key = entry.where, entry.name, entry.name_key
    if entry.problem is not None:
        problems.append(f"{where}: {entry.problem}")
        return None
    if not entry.captions:
        problems.append(f"{where}: has no caption")
        return None
    prompt_key, prompt = entry.prompt or ("prompt", DEFAULT_PROMPT)
    for key, value in ((name_key, name), *entry.captions, (prompt_key, prompt)):
        if not isinstance(value, str) or not value.strip():
            problems.append(f"{where}: {key!r} must be a text, but is {reprlib.repr(value)}")
            return None
        if _SURROGATE.search(value):
            problems.append(f"{where}: {key!r} holds half a surrogate pair, which is not text")
            return None
    if "\0" in name:
        problems.append(f"{where}: {name_key!r} holds a null character")
        return None
    try:
        pure = relative(name)
    except DataError as error:
        problems.append(f"{where}: {name_key!r}: {error}")
        return None
    place = PurePosixPath(entry.places[0])
    if place.is_absolute() or ".." in place.parts or "\0" in entry.places[0]:
        problems.append(f"{where}: the folder {shown(entry.places[0])} leads out of the images folder")
        return None
    scene = entry.scene
    if not isinstance(scene, str | int | None):
        problems.append(f"{where}: 'scene' must be a text or a whole number, but is {reprlib.repr(scene)}")
        return None
    first, *more = dict.fromkeys(_clean(value) for _, value in entry.captions)
    return Row(
        image=images / place / pure,
        prompt=_clean(prompt),
        caption=first,
        scene="",
        where=where,
        more_captions=tuple(more),
        given=None if entry.split is None else str(entry.split),
        label=None if entry.label is None else str(entry.label),
        asked=entry.prompt is not None,
    )


def _clean(text: str) -> str:
    """Single spaces: some RSICap captions have double or trailing ones."""
    return " ".join(text.split())
