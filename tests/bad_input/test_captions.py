"""Data folders: caption files and images that were never meant for this, or meant to harm."""

from __future__ import annotations

import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from tests.bad_input.harness import examples, folder, search, written
from tests.bad_input.test_recorded_runs import ANY
from tests.support.called import Outcome
from trainer.common.errors import DataError
from trainer.data.images import FORMATS, open_image

NAMES = st.sampled_from(
    [
        *(
            "a_1.png",
            "b_1.png",
            "./a_1.png",
            "a_1.png ",
            "nowhere.png",
            "text.png",
            "link.png",
            "loop",
            "folder",
            "images",
        ),
        *(
            "../a_1.png",
            "/etc/passwd",
            "..",
            ".",
            "",
            "a_1.png/x",
            "C:\\x.png",
            "n" * 300,
            "a\0.png",
            "\ud800",
            "\udcff.png",
        ),
    ]
)
TEXTS = st.text(max_size=10) | st.sampled_from(["A pier.", " ", "\0", "\ud800", "x" * 10_000, "\u200b", "\x1c"])


def entries(name_key: str, caption_key: str, prompt_key: str) -> st.SearchStrategy[Any]:
    row = st.fixed_dictionaries(
        {name_key: NAMES | ANY, caption_key: TEXTS | ANY}, optional={prompt_key: TEXTS | ANY, "scene": TEXTS | ANY}
    )
    return st.lists(row | ANY, max_size=4)


@cache
def picture(kind: str) -> bytes:
    """A file of this format; its pixels are the same each time."""
    stream = io.BytesIO()
    Image.frombytes("RGB", (24, 20), random.Random(0).randbytes(24 * 20 * 3)).save(stream, kind)
    return stream.getvalue()


PNG = picture("PNG")


def make(here: Path) -> Path:
    """A folder with images, good and bad, yet without captions."""
    images = here / "data" / "images"
    images.mkdir(parents=True)
    for name in ("a_1.png", "b_1.png"):
        (images / name).write_bytes(PNG)
    (images / "text.png").write_text("no image")
    (images / "folder").mkdir()
    (images / "link.png").symlink_to("/dev/zero")
    (images / "loop").symlink_to("loop")
    return here / "data"


def tried(here: Path, *settings: str) -> Outcome:
    arguments = [
        "--study",
        "rsicap_mini",
        "--runs-dir",
        str(here / "runs"),
        "--dry-run",
        "--no-measure",
        "--set",
        f"data={here}/data",
    ]
    outcome = search([*arguments, *(part for setting in settings for part in ("--set", setting))])
    assert not (here / "runs").exists()
    outcome.check("data")
    return outcome


GOOD = [{"filename": f"{scene}_1.png", "text_output": "A pier."} for scene in "ab"]


def test_the_good_one_is_accepted(tmp_path: Path) -> None:
    (make(tmp_path) / "captions.json").write_text(json.dumps({"annotations": GOOD}))
    assert tried(tmp_path).accepted


@examples(60)
@given(entries("filename", "text_output", "text_input"), st.booleans())
@example([{"filename": "link.png", "text_output": "A device."}], False)
@example([{"filename": "a_1.png", "text_output": "0\x1b\x08"}], True)  # 13 % of all text is none to the tokenizer
@example([{"filename": "a_1.png", "text_output": "0", "text_input": "00000Æ"}], True)
def test_rsicaps_entries(rows: list[Any], skip: bool) -> None:
    with folder() as here:
        (make(here) / "captions.json").write_text(json.dumps({"annotations": [*GOOD, *rows]}))
        outcome = tried(here, f"skip_bad_rows={str(skip).lower()}")
        if "tokenizer" in outcome.err and " lacks " in outcome.err:  # of all texts together: no row is to blame alone
            outcome.check_refused("translate the")
            return
        assert outcome.accepted or not skip
        if not outcome.accepted:
            outcome.check_refused("captions.json, annotation", "--set skip_bad_rows=true")


@examples(40)
@given(entries("file_name", "text", "prompt"), st.binary(max_size=10))
def test_lines_of_an_image_folder(rows: list[Any], line: bytes) -> None:
    with folder() as here:
        data = make(here)
        lines = [json.dumps(row).encode() for row in rows]
        (data / "metadata.jsonl").write_bytes(b"\n".join([*lines, line]))
        tried(here)


@examples(60)
@given(
    st.binary(max_size=40)
    | ANY.map(lambda x: json.dumps(x).encode())
    | ANY.map(lambda x: json.dumps({"annotations": x}).encode())
)
@example(b'{"annotations": [' + b"9" * 5000 + b"]}")
@example(b"[" * 100_000)
@example(b'\xef\xbb\xbf{"annotations": []}')
@example(b"\0")
def test_caption_files(content: bytes) -> None:
    with folder() as here:
        (make(here) / "captions.json").write_bytes(content)
        outcome = tried(here)
        assert not outcome.accepted


def test_a_file_that_is_odd_yet_gives_its_pixels_is_silent(tmp_path: Path) -> None:
    """Pillow warns of it, and warnings are errors here: `Tag data larger than file. Skipping tag 259`."""
    data = make(tmp_path)
    content = bytearray(picture("TIFF"))
    content[51] = 4
    (data / "images" / "odd_1.png").write_bytes(content)
    rows = [*GOOD, {"filename": "odd_1.png", "text_output": "A pier."}]
    (data / "captions.json").write_text(json.dumps({"annotations": rows}))
    assert tried(tmp_path).accepted


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # a worker has them in its log
@examples(150, deep_factor=34)
@given(st.sampled_from(FORMATS), st.data())
def test_images_damaged_anywhere(kind: str, data: st.DataObject) -> None:
    content = bytearray(picture(kind))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(len(content) - 1, 200)) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    with folder() as here:
        (here / "a.png").write_bytes(content)
        try:
            image = open_image(here / "a.png")
        except DataError as error:
            assert "a.png: the" in str(error)
        else:
            assert image.mode == "RGB"


def test_places_for_the_embedded_data_that_cannot_be_written(monkeypatch: Any, tmp_path: Path) -> None:
    from tests.bad_input import harness
    from trainer.data import dataset

    monkeypatch.setattr(dataset, "examine", harness._real_examine)
    (tmp_path / "file").write_text("")
    for place in (str(tmp_path / "file"), "/proc/nothing", "n" * 300, "~nobody-of-that-name/x"):
        monkeypatch.setenv("LORA_SEARCH_CACHE", place)
        outcome = search(["--study", "rsicap_mini", "--runs-dir", str(tmp_path / "runs"), "--dry-run", "--no-measure"])
        outcome.check_refused("LORA_SEARCH_CACHE")
    assert written(tmp_path) == ["file"]
