"""Captioned images on disk: reading, checking, splitting. Needs Pillow alone: data can be checked before
torch is loaded.

Two formats:

- RSICap as released: `captions.json` with `{"annotations": [{"filename", "text_input", "text_output"}, ...]}` and
  the images in `images/`. The folder also holds images without captions and `.DS_Store` files, so the JSON decides
  which are used. The file name `P0378_0001.png` begins with its source scene; tiles of one scene look alike and may
  overlap, so all of them are on one side of the split.
- An image folder with `metadata.jsonl` (Hugging Face's ImageFolder): `file_name` and `text` (or `caption`), and
  optionally `prompt` and `scene`.
"""

from __future__ import annotations

import hashlib
import json
import random
import reprlib
import stat
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from trainer.common.errors import DataError, shown
from trainer.config import EMBEDDED, TrainConfig
from trainer.data.images import IMAGE_ERRORS, content_of, decode, identity, problem_of
from trainer.data.paths import Names, relative

DEFAULT_PROMPT = "Describe this image in detail."


@dataclass(frozen=True)
class Row:
    """One captioned image."""

    image: Path
    prompt: str
    caption: str
    scene: str
    """Rows of one scene stay on one side of the split."""
    where: str
    """The row's place in its caption file, for messages."""


@dataclass(frozen=True)
class Examined:
    """A data folder after its one check: the good rows, the bad ones with their reasons, and its fingerprint."""

    folder: str
    rows: tuple[Row, ...]
    bad: tuple[str, ...]
    fingerprint: str
    """Hash of all prompts, captions, scenes (they decide the split) and image bytes, whatever the folder's path."""


@dataclass(frozen=True)
class Split:
    """The rows of a run."""

    train: tuple[Row, ...]
    val: tuple[Row, ...]


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


def examine(data: str) -> Examined:
    """Read and check a whole data folder: every row, every image decoded once.

    Raises:
        DataError: the folder or its caption file is missing or unreadable, or has no rows.
    """
    folder = resolve_folder(data)
    entries, images, problems = _read(folder)
    rows: list[Row] = []
    digests: list[str] = []
    with ThreadPoolExecutor(max_workers=4) as pool, warnings.catch_warnings():  # decoding releases the GIL
        warnings.simplefilter("ignore")  # about files that are odd but readable
        names = Names(images)
        for row, digest, problem in pool.map(lambda row: _check_image(row, names), entries):
            if problem:
                problems.append(f"{row.where}: {problem}")
            else:
                rows.append(row)
                digests.append(digest)
    whole = hashlib.sha256()
    for row, digest in zip(rows, digests, strict=True):
        whole.update(json.dumps([row.prompt, row.caption, row.scene, digest]).encode())
    return Examined(str(folder), tuple(rows), tuple(problems), whole.hexdigest()[:16])


def usable(examined: Examined, config: TrainConfig) -> Examined:
    """The same folder, if this configuration accepts it.

    Raises:
        DataError: bad rows without `skip_bad_rows`, all in one message, or fewer than two good ones.
    """
    if examined.bad and not config.skip_bad_rows:
        listed = [f"  - {problem}" for problem in examined.bad]
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
    """Training and validation rows: `max_samples` rows chosen, then split by scene, both by `split_seed` alone.

    Validation gets whole scenes, as many as come nearest to `val_fraction` of the rows.

    Raises:
        DataError: all rows are of one scene, so that no whole scene can be held out.
    """
    # Choose the rows.
    rows = list(usable(examined, config).rows)
    rng = random.Random(config.split_seed)
    rng.shuffle(rows)
    chosen = rows[: config.max_samples]
    scenes: dict[str, list[Row]] = {}
    for row in chosen:
        scenes.setdefault(row.scene, []).append(row)
    if len(scenes) < 2:
        raise DataError(
            f"{examined.folder}: all {len(chosen)} rows used are of one scene ({chosen[0].scene!r}), "
            "so none can be held out for validation; raise max_samples or add scenes"
        )
    # Take whole scenes, in random order, as long as each brings validation nearer to its share.
    names = sorted(scenes)
    rng.shuffle(names)
    val: set[str] = set()
    count, wanted = 0, len(chosen) * config.val_fraction
    for name in names[:-1]:  # the last scene always trains
        size = len(scenes[name])
        if abs(count + size - wanted) < abs(count - wanted):
            val.add(name)
            count += size
    # A single scene that comes nearer than all of these, whatever its place in the order.
    single = min(names, key=lambda name: abs(len(scenes[name]) - wanted))
    if not val or abs(len(scenes[single]) - wanted) < abs(count - wanted):
        val = {single}
    return Split(
        train=tuple(row for row in chosen if row.scene not in val),
        val=tuple(row for row in chosen if row.scene in val),
    )


def _check_image(row: Row, names: Names) -> tuple[Row, str, str | None]:
    """(the row with its file as it is on disk, the image's identity, None) or (row, "", the problem with it)."""
    try:
        row = replace(row, image=names.on_disk(row.image))
        content = content_of(row.image)
        decoded = decode(content)
    except DataError as error:
        return row, "", f"{row.image.name}: {error}"
    except IMAGE_ERRORS as error:
        return row, "", f"{row.image.name}: {problem_of(error)}"
    return row, identity(content, decoded), None


def _read(folder: Path) -> tuple[list[Row], Path, list[str]]:
    """(rows whose entries are sound, the folder their images must lie in, problems of the other entries)."""
    try:
        kind = folder.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"the data folder {shown(str(folder))} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, a name too long, a null character
        problem = (error.strerror if isinstance(error, OSError) else None) or error
        raise DataError(f"the data folder {shown(str(folder))} cannot be read: {problem}") from None
    if not stat.S_ISDIR(kind):
        raise DataError(f"{folder}: the data must be a folder, but this is a file")
    problems: list[str] = []
    if (folder / "captions.json").is_file():
        if not (folder / "images").is_dir():
            raise DataError(f"{folder}: there is captions.json, but no folder images/ beside it")
        images = (folder / "images").resolve()
        rows = _read_rsicap(folder / "captions.json", images, problems)
    elif (folder / "metadata.jsonl").is_file():
        images = folder.resolve()
        rows = _read_image_folder(folder / "metadata.jsonl", images, problems)
    else:
        raise DataError(
            f"{folder}: this folder has neither captions.json (RSICap, with its images in images/) nor metadata.jsonl"
        )
    if not rows and not problems:
        raise DataError(f"{folder}: the caption file has no rows")
    return rows, images, problems


def _read_rsicap(path: Path, images: Path, problems: list[str]) -> list[Row]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise DataError(f"{path}: is not readable as JSON ({error})") from None
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise DataError(f'{path}: must be an object with a list under "annotations"')
    rows = []
    for index, entry in enumerate(annotations):
        where = f"captions.json, annotation {index}"
        row = _row(entry, where, images, "filename", ("text_output",), ("text_input",), problems)
        if row is not None:
            rows.append(row)
    return rows


def _read_image_folder(path: Path, images: Path, problems: list[str]) -> list[Row]:
    rows = []
    try:
        # Not splitlines(): JSON texts may hold U+2028 and the like as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: is not readable as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"metadata.jsonl, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{where}: is not JSON ({error})")
            continue
        row = _row(entry, where, images, "file_name", ("text", "caption"), ("prompt",), problems)
        if row is not None:
            rows.append(row)
    return rows


def _row(
    entry: Any,
    where: str,
    images: Path,
    name_key: str,
    caption_keys: Sequence[str],
    prompt_keys: Sequence[str],
    problems: list[str],
) -> Row | None:
    """The entry as a Row, or None with its problem added to `problems`."""
    if not isinstance(entry, dict):
        problems.append(f"{where}: must be an object, but is {type(entry).__name__}")
        return None
    name = entry.get(name_key)
    caption = next((entry[key] for key in caption_keys if key in entry), None)
    prompt = next((entry[key] for key in prompt_keys if key in entry), DEFAULT_PROMPT)
    for key, value in ((name_key, name), (caption_keys[0], caption), (prompt_keys[0], prompt)):
        if not isinstance(value, str) or not value.strip():
            problems.append(f"{where}: {key!r} must be a text, but is {reprlib.repr(value)}")
            return None
        if any("\ud800" <= character <= "\udfff" for character in value):
            problems.append(f"{where}: {key!r} holds half a surrogate pair, which is not text")
            return None
    assert isinstance(name, str) and isinstance(caption, str) and isinstance(prompt, str)
    if "\0" in name:
        problems.append(f"{where}: {name_key!r} holds a null character")
        return None
    try:
        pure = relative(name)
    except DataError as error:
        problems.append(f"{where}: {name_key!r}: {error}")
        return None
    scene = entry.get("scene")
    if not isinstance(scene, str | int | None):
        problems.append(f"{where}: 'scene' must be a text or a whole number, but is {reprlib.repr(scene)}")
        return None
    return Row(
        image=images / pure,
        prompt=_clean(prompt),
        caption=_clean(caption),
        scene=_scene(pure, by_prefix=name_key == "filename") if scene is None else str(scene),
        where=where,
    )


def _scene(name: PurePosixPath, *, by_prefix: bool) -> str:
    """RSICap's `P0378_0001.png` is a tile of scene P0378; in an image folder each image is its own scene."""
    stem = str(name.with_suffix(""))
    prefix, separator, tile = stem.rpartition("_")
    return prefix if by_prefix and separator and tile.isdigit() else stem


def _clean(text: str) -> str:
    """Single spaces: some RSICap captions have double or trailing ones."""
    return " ".join(text.split())
