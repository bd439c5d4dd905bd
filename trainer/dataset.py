"""Captioned images on disk: reading, checking, splitting. Needs Pillow alone, so a supervisor can check data early.

Two formats:

- RSICap as released: `captions.json` with `{"annotations": [{"filename", "text_input", "text_output"}, ...]}` and
  the images in `images/`. The folder also holds images without captions and `.DS_Store` files, so the JSON is what is
  iterated. The file name `P0378_0001.png` begins with its source scene; tiles of one scene look alike and may
  overlap, so they never part between training and validation.
- An image folder with `metadata.jsonl` (Hugging Face's ImageFolder): `file_name` and `text` (or `caption`), and
  optionally `prompt` and `scene`.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, UnidentifiedImageError

from trainer.config import EMBEDDED, TrainConfig
from trainer.errors import DataError

DEFAULT_PROMPT = "Describe this image in detail."
MAX_PIXELS = 89_478_485
"""Pillow's own limit against decompression bombs; Pillow warns above it, here the row is refused."""
MAX_LISTED = 100
"""Bad rows listed in one message; beyond that they are counted."""


@dataclass(frozen=True)
class Row:
    """One captioned image."""

    image: Path
    prompt: str
    caption: str
    scene: str
    """Rows of one scene stay on one side of the split."""
    where: str
    """The row's place in its file, for messages."""


@dataclass(frozen=True)
class Examined:
    """A data folder after its one check: the good rows, the bad ones with their reasons, and its fingerprint."""

    folder: str
    rows: tuple[Row, ...]
    bad: tuple[str, ...]
    fingerprint: str
    """Hash of all prompts, captions and image bytes."""


@dataclass(frozen=True)
class Split:
    """The rows of a run."""

    train: tuple[Row, ...]
    val: tuple[Row, ...]


def resolve_folder(data: str) -> Path:
    """The data folder itself; `mini` is generated on first use."""
    if data == EMBEDDED:
        from trainer.mini import ensure_data

        return ensure_data()
    return Path(data).expanduser()


def examine(data: str) -> Examined:
    """Read and check a whole data folder: every row, every image decoded once.

    Raises:
        DataError: the folder or its caption file is missing or unreadable, or has no rows.
    """
    folder = resolve_folder(data)
    entries, images, problems = _read(folder)
    rows: list[Row] = []
    digests: list[str] = []
    with ThreadPoolExecutor(max_workers=4) as pool:  # decoding releases the GIL
        checked = pool.map(lambda row: _check_image(row, images), entries)
        for row, (digest, problem) in zip(entries, checked, strict=True):
            if problem:
                problems.append(f"{row.where}: {problem}")
            else:
                rows.append(row)
                digests.append(digest)
    whole = hashlib.sha256()
    for row, digest in zip(rows, digests, strict=True):
        whole.update(json.dumps([row.prompt, row.caption, digest]).encode())
    return Examined(str(folder), tuple(rows), tuple(problems), whole.hexdigest()[:16])


def usable(examined: Examined, config: TrainConfig) -> Examined:
    """The folder as this configuration may use it.

    Raises:
        DataError: bad rows without `skip_bad_rows`, all in one message, or fewer than two good ones.
    """
    if examined.bad and not config.skip_bad_rows:
        listed = [f"  - {problem}" for problem in examined.bad[:MAX_LISTED]]
        if len(examined.bad) > MAX_LISTED:
            listed.append(f"  ... and {len(examined.bad) - MAX_LISTED} more")
        total = len(examined.bad) + len(examined.rows)
        raise DataError(
            f"{examined.folder}: {len(examined.bad)} of {total} rows cannot be used:\n"
            + "\n".join(listed)
            + "\nMend them, or go on without them: --set skip_bad_rows=true"
        )
    if len(examined.rows) < 2:
        raise DataError(f"{examined.folder}: a run needs at least 2 good rows, but there are {len(examined.rows)}")
    return examined


def split(examined: Examined, config: TrainConfig) -> Split:
    """Training and validation rows: `max_samples` chosen and split by scene, both by `split_seed` alone.

    Validation gets whole scenes, as many as come nearest to `val_fraction` of the rows.

    Raises:
        DataError: all rows are of one scene, so that no whole scene can be held out.
    """
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
    names = sorted(scenes)
    rng.shuffle(names)
    held: list[str] = []
    count, wanted = 0, len(chosen) * config.val_fraction
    for name in names[:-1]:  # the last scene always trains
        size = len(scenes[name])
        if not held or abs(count + size - wanted) < abs(count - wanted):
            held.append(name)
            count += size
    val = set(held)
    return Split(
        train=tuple(row for row in chosen if row.scene not in val),
        val=tuple(row for row in chosen if row.scene in val),
    )


def open_image(path: Path) -> Image.Image:
    """The whole image, decoded, as RGB (some RSICap images are panchromatic).

    Raises:
        DataError: missing, unreadable, truncated, or more than `MAX_PIXELS`. Never replaced by a black one.
    """
    try:
        return _decode(path.read_bytes())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: {_image_problem(error)}") from error


def _decode(content: bytes) -> Image.Image:
    with warnings.catch_warnings():
        # Pillow's warning about size comes before anything is decoded; as an error it stops the decoding.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image = Image.open(io.BytesIO(content))
        except Image.DecompressionBombWarning as warning:
            raise Image.DecompressionBombError(str(warning)) from None
        if image.width * image.height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels")
        return image.convert("RGB")


def _image_problem(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return "the image is missing"
        case IsADirectoryError():
            return "the image is a folder"
        case PermissionError():
            return "the image may not be read (permission denied)"
        case Image.DecompressionBombError():
            return f"the image is too large and might be a decompression bomb (limit {MAX_PIXELS} pixels)"
        case UnidentifiedImageError():
            return "the file is no image that Pillow can read"
    text = str(error)
    if "truncated" in text or "Truncated" in text:
        return "the image is truncated"
    return f"the image is broken ({text or type(error).__name__})"


def _check_image(row: Row, images: Path) -> tuple[str, str | None]:
    """(hash of the image's bytes, None) or ("", what is wrong with it)."""
    if not row.image.resolve().is_relative_to(images):
        return "", f"the file name {str(row.image.relative_to(images))!r} leads out of the images folder"
    try:
        content = row.image.read_bytes()
        _decode(content)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "", f"{row.image.name}: {_image_problem(error)}"
    return hashlib.sha256(content).hexdigest(), None


def _read(folder: Path) -> tuple[list[Row], Path, list[str]]:
    """(rows whose entries are sound, the folder their images must lie in, problems of the other entries)."""
    if not folder.exists():
        raise DataError(f"the data folder {str(folder)!r} does not exist")
    if not folder.is_dir():
        raise DataError(f"{folder}: the data must be a folder, but this is a file")
    problems: list[str] = []
    if (folder / "captions.json").is_file():
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
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
        lines = path.read_text(encoding="utf-8").splitlines()
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: is not readable as UTF-8 text ({error})") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"metadata.jsonl, line {number}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            problems.append(f"{where}: is no JSON ({error})")
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
    """The entry as a Row, or None with its problem noted."""
    if not isinstance(entry, dict):
        problems.append(f"{where}: must be an object, but is {type(entry).__name__}")
        return None
    name = entry.get(name_key)
    caption = next((entry[key] for key in caption_keys if key in entry), None)
    prompt = next((entry[key] for key in prompt_keys if key in entry), DEFAULT_PROMPT)
    for key, value in ((name_key, name), (caption_keys[0], caption), (prompt_keys[0], prompt)):
        if not isinstance(value, str) or not value.strip():
            problems.append(f"{where}: {key!r} must be a text, but is {value!r}")
            return None
    assert isinstance(name, str) and isinstance(caption, str) and isinstance(prompt, str)
    if "\0" in name:
        problems.append(f"{where}: {name_key!r} holds a null character")
        return None
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts:
        problems.append(f"{where}: the file name {name!r} leads out of the images folder")
        return None
    scene = entry.get("scene")
    return Row(
        image=images / pure,
        prompt=_clean(prompt),
        caption=_clean(caption),
        scene=scene if isinstance(scene, str) else _scene(pure, by_prefix=name_key == "filename"),
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
