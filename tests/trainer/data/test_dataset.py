"""Data folders: both formats, everything bad in one message, whole scenes on one side, fingerprints of content."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data.dataset import Examined, Row, examine, split, usable
from trainer.data.images import MAX_FILE_BYTES, MAX_PIXELS, open_image


def png(path: Path, colour: int = 90, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (20, 16), colour if mode == "L" else (colour, 20, 30)).save(path)
    return path


def rsicap(folder: Path, rows: Sequence[Any]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "captions.json").write_text(json.dumps({"annotations": list(rows)}), encoding="utf-8")
    return folder


def row(name: str, caption: Any = "A pier.", **more: Any) -> dict[str, Any]:
    return {"image_id": "0", "filename": name, "text_input": "Describe it.", "text_output": caption, **more}


def bomb(path: Path, width: int, height: int) -> Path:
    """A PNG of some hundred bytes that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    path.write_bytes(content + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b""))
    return path


def good_folder(folder: Path, scenes: int = 4, tiles: int = 2) -> Path:
    names = [f"P{scene:04d}_{tile:04d}.png" for scene in range(scenes) for tile in range(tiles)]
    for i, name in enumerate(names):
        png(folder / "images" / name, i)
    return rsicap(folder, [row(name, f"Tile {name}.") for name in names])


def test_rsicap_as_released(tmp_path: Path) -> None:
    png(tmp_path / "images" / "P0378_0001.png")
    png(tmp_path / "images" / "P0378_0002.png", mode="L")
    png(tmp_path / "images" / "P0001_0001.png")
    png(tmp_path / "images" / "P9999_0001.png")  # without a caption
    (tmp_path / "images" / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    rows = [
        row("P0378_0001.png", "An  aerial image.  A pier. "),
        row("P0378_0002.png"),
        {"image_id": "2", "filename": "P0001_0001.png", "text_output": "A field."},
    ]
    examined = examine(str(rsicap(tmp_path, rows)))
    assert examined.bad == ()
    assert [r.caption for r in examined.rows] == ["An aerial image. A pier.", "A pier.", "A field."]
    assert [r.scene for r in examined.rows] == ["P0378", "P0378", "P0001"]
    assert [r.prompt for r in examined.rows] == ["Describe it.", "Describe it.", "Describe this image in detail."]
    grey = open_image(examined.rows[1].image)
    assert grey.mode == "RGB"


def test_image_folder(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    png(tmp_path / "deep" / "b_1.png")
    png(tmp_path / "deep" / "b_2.png")
    lines = [
        json.dumps({"file_name": "a.png", "text": "Two\u2028lines."}, ensure_ascii=False),
        "",
        json.dumps({"file_name": "deep/b_1.png", "caption": "B.", "prompt": "What is it?"}),
        json.dumps({"file_name": "deep/b_2.png", "text": "B.", "scene": 7}),
    ]
    (tmp_path / "metadata.jsonl").write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    examined = examine(str(tmp_path))
    assert examined.bad == ()
    assert [r.caption for r in examined.rows] == ["Two lines.", "B.", "B."]
    assert [r.scene for r in examined.rows] == ["a", "deep/b_1", "7"]
    assert examined.rows[1].prompt == "What is it?"


def bad_folder(folder: Path) -> tuple[Path, dict[str, str]]:
    """A folder with two good rows and one of each kind of bad row, and the messages on the bad ones, by annotation."""
    images = good_folder(folder, scenes=2, tiles=1) / "images"
    entries: list[Any] = json.loads((folder / "captions.json").read_text())["annotations"]
    said = {}

    def add(entry: Any, message: str) -> None:
        said[f"annotation {len(entries)}:"] = message
        entries.append(entry)

    add(row("nowhere.png"), "nowhere.png: the image is missing")
    (images / "text.png").write_text("no image")
    add(row("text.png"), "not an image in one of the formats read here")
    (images / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    add(row("script.png"), "not an image in one of the formats read here")
    whole = png(images / "cut.png").read_bytes()
    Image.effect_noise((200, 200), 90).save(images / "cut.png")
    whole = (images / "cut.png").read_bytes()
    (images / "cut.png").write_bytes(whole[: len(whole) // 2])
    add(row("cut.png"), "cut.png: the image is truncated")
    bomb(images / "bomb.png", 60_000, 60_000)  # above twice Pillow's limit, where Pillow raises
    add(row("bomb.png"), "might be a decompression bomb")
    bomb(images / "small_bomb.png", 9_500, 9_500)  # above it, where Pillow warns
    add(row("small_bomb.png"), f"might be a decompression bomb (limit {MAX_PIXELS} pixels)")
    Image.new("I;16", (8, 8), 4000).save(images / "deep.png")
    add(row("deep.png"), "more than 8 bits a channel")
    (images / "folder.png").mkdir()
    add(row("folder.png"), "the image is a folder")
    os.mkfifo(images / "pipe.png")
    add(row("pipe.png"), "the image is not a regular file")
    with (images / "large.png").open("wb") as stream:
        stream.truncate(MAX_FILE_BYTES + 1)  # sparse
    add(row("large.png"), "has 1073741825 bytes")
    add(row("../../secret.png"), "leads out of the images folder")
    add(row("/etc/passwd"), "leads out of the images folder")
    add(row("..\\secret.png"), "leads out of the images folder")
    (images / "link.png").symlink_to("/dev/zero")
    add(row("link.png"), "the image is not a regular file")
    (images / "dangling.png").symlink_to("../.git/annex/objects/x.png")
    add(row("dangling.png"), "a link to '../.git/annex/objects/x.png', which does not exist; if it was not fetched")
    (images / "loop.png").symlink_to("loop.png")
    add(row("loop.png"), "loop.png: the image is broken")
    add(row("."), "must name a file")
    add(row("a\0b.png"), "null character")
    add(row("n" * 300 + ".png"), "the image is broken")
    add("P0001_0001.png", "must be an object, but is str")
    add(row("P0000_0000.png", 17), "'text_output' must be a text, but is 17")
    add(row("P0000_0000.png", "  "), "'text_output' must be a text, but is '  '")
    add(row("P0000_0000.png", text_input=None), "'text_input' must be a text, but is None")
    add(row("P0000_0000.png", "\ud800"), "half a surrogate pair")
    add(row("P0000_0000.png", scene=[1]), "'scene' must be")
    add({"text_output": "No name."}, "'filename' must be a text, but is None")
    return rsicap(folder, entries), said


def test_everything_bad_is_listed_in_one_error(tmp_path: Path) -> None:
    folder, said = bad_folder(tmp_path / "data")
    examined = examine(str(folder))
    assert len(examined.rows) == 2
    with pytest.raises(DataError) as caught:
        usable(examined, TrainConfig())
    lines = str(caught.value).splitlines()
    assert lines[0].endswith(f"{len(said)} of {len(said) + 2} rows cannot be used:")
    assert lines[-1].endswith("--set skip_bad_rows=true")
    for place, message in said.items():
        (line,) = [line for line in lines if f"captions.json, {place}" in line]
        assert message in line


def test_skip_bad_rows_goes_on_and_counts(tmp_path: Path) -> None:
    folder, said = bad_folder(tmp_path / "data")
    examined = examine(str(folder))
    parts = split(examined, TrainConfig(skip_bad_rows=True))
    assert len(parts.train) == len(parts.val) == 1
    assert len(usable(examined, TrainConfig(skip_bad_rows=True)).bad) == len(said)


def test_rows_wrong_in_the_same_way_are_counted_with_three_examples(tmp_path: Path) -> None:
    folder = rsicap(tmp_path, [row(f"{i}.png") for i in range(130)] + [row("0.png", i) for i in range(7)])
    with pytest.raises(DataError, match="137 of 137 rows") as error:
        usable(examine(str(folder)), TrainConfig())
    assert str(error.value).splitlines()[1:-1] == [
        "  - 7 rows: 'text_output' must be a text, for example",
        *(f"      captions.json, annotation {130 + i}: 'text_output' must be a text, but is {i}" for i in range(3)),
        "  - 130 rows: the image is missing, for example",
        *(f"      captions.json, annotation {i}: {i}.png: the image is missing" for i in range(3)),
    ]
    with pytest.raises(DataError, match="at least 2 good rows, but there are 0"):
        usable(examine(str(folder)), TrainConfig(skip_bad_rows=True))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither captions.json .* nor metadata.jsonl"),
        ({"captions.json": '{"annotations": []}'}, "no folder images/"),
        ({"captions.json": "{", "images/x": ""}, "not readable as JSON"),
        ({"captions.json": "[" * 200_000, "images/x": ""}, "not readable as JSON"),
        ({"captions.json": "[]", "images/x": ""}, 'an object with a list under "annotations"'),
        ({"captions.json": '{"annotations": []}', "images/x": ""}, "has no rows"),
        ({"metadata.jsonl": "\n"}, "has no rows"),
    ],
)
def test_folders_that_are_no_data(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        examine(str(tmp_path))


def test_bad_lines_of_an_image_folder_are_listed(tmp_path: Path) -> None:
    png(tmp_path / "a.png")
    lines = ['{"file_name": "a.png", "text": "A."}', "{", "[" * 100_000, '"a"', '{"file_name": "a.png"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    bad = examine(str(tmp_path)).bad
    assert [problem.partition(":")[0] for problem in bad] == [f"metadata.jsonl, line {n}" for n in (2, 3, 4, 5)]


@pytest.mark.parametrize("data", ["/nowhere/at/all", "~nobody-of-that-name/x", "x" * 300, "a\0b"])
def test_places_that_do_not_exist(data: str) -> None:
    with pytest.raises(DataError, match="the data folder"):
        examine(data)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is a file"):
        examine(str(png(tmp_path / "a.png")))


def test_an_image_is_never_replaced(tmp_path: Path) -> None:
    for name in ("nowhere.png", "bomb.png"):
        if name == "bomb.png":
            bomb(tmp_path / name, 9_500, 9_500)
        with pytest.raises(DataError, match=name):
            open_image(tmp_path / name)


def made(scenes: Sequence[int]) -> Examined:
    """Rows of scenes of these sizes, without images."""
    rows = [
        Row(image=Path(f"{s}_{t}.png"), prompt="p", caption="c", scene=str(s), where="")
        for s, size in enumerate(scenes)
        for t in range(size)
    ]
    return Examined("made", tuple(rows), (), "")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=2, max_size=30),
    st.floats(0.05, 0.6),
    st.integers(0, 50),
    st.one_of(st.none(), st.integers(2, 60)),
)
def test_split_keeps_scenes_whole_and_comes_near(
    scenes: list[int], fraction: float, seed: int, max_samples: int | None
) -> None:
    examined = made(scenes)
    config = TrainConfig(val_fraction=fraction, split_seed=seed, max_samples=max_samples)
    try:
        parts = split(examined, config)
    except DataError as error:
        assert "of one scene" in str(error)
        assert max_samples is not None  # the rows drawn happen to be of one scene
        return
    total = min(len(examined.rows), max_samples or len(examined.rows))
    assert len(parts.train) + len(parts.val) == total
    train_scenes, val_scenes = {r.scene for r in parts.train}, {r.scene for r in parts.val}
    assert train_scenes and val_scenes
    assert not train_scenes & val_scenes
    sizes = [sum(r.scene == s for r in (*parts.train, *parts.val)) for s in train_scenes | val_scenes]
    # Never further off than half the largest scene, or than the smallest if even that is too large.
    assert abs(len(parts.val) - fraction * total) <= max(max(sizes) / 2, min(sizes))


def test_a_scene_too_large_is_not_held_out() -> None:
    for seed in range(20):
        parts = split(made([90, 4, 3, 3]), TrainConfig(split_seed=seed, val_fraction=0.05))
        assert len(parts.val) in (3, 4, 6, 7)


def test_split_is_the_same_for_every_trial_of_a_study() -> None:
    examined = made([4] * 30)
    first = split(examined, TrainConfig(max_samples=60))
    other_trial = TrainConfig(max_samples=60, seed=7, learning_rate=1e-3, batch_size=2, lora_r=32, num_epochs=1)
    assert split(examined, other_trial) == first
    assert split(examined, TrainConfig(max_samples=60, split_seed=1)) != first
    assert abs(len(first.val) - 12) <= 2


def test_one_scene_cannot_be_split() -> None:
    with pytest.raises(DataError, match="all 5 rows used are of one scene"):
        split(made([5]), TrainConfig())


def test_the_fingerprint_is_of_the_content_alone(tmp_path: Path) -> None:
    one, other = good_folder(tmp_path / "one"), good_folder(tmp_path / "other")
    before = examine(str(one)).fingerprint
    assert examine(str(other)).fingerprint == before
    text = (other / "captions.json").read_text()
    for old, new in (
        ("Tile P0001_0001.png.", "Tile P0001_0001.png!"),  # a caption
        ("Describe it.", "Describe it!"),  # a prompt
        ('"filename": "P0001_0001.png"', '"scene": "s", "filename": "P0001_0001.png"'),  # decides the split
    ):
        assert old in text
        (other / "captions.json").write_text(text.replace(old, new))
        assert examine(str(other)).fingerprint != before
    (other / "captions.json").write_text(text)
    assert examine(str(other)).fingerprint == before
    image = other / "images" / "P0001_0001.png"
    image.write_bytes(image.read_bytes() + b"\0")  # Pillow decodes the same pixels
    assert examine(str(other)).fingerprint != before


def test_the_embedded_data_is_good() -> None:
    examined = usable(examine("mini"), TrainConfig())
    assert len(examined.rows) == 640
    parts = split(examined, TrainConfig())
    assert len(parts.val) == 128
