"""The audit of a folder: text, JSON and one page, of good data, bad rows and copies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.called import Outcome, call
from tests.trainer.data.test_duplicates import scene
from trainer.data import check, dataset


def made(folder: Path) -> Path:
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(5):
        scene(i).save(folder / "images" / f"P{i}_1.png")
        rows.append({"filename": f"P{i}_1.png", "text_input": "Describe it.", "text_output": f"A <b>pier</b> {i}."})
    scene(0).transpose(Image.Transpose.ROTATE_90).save(folder / "images" / "Q0_1.png")
    rows.append({"filename": "Q0_1.png", "text_input": "Describe it.", "text_output": "A <b>pier</b> 0."})
    (folder / "captions.json").write_text(json.dumps({"annotations": rows}))
    return folder


def run(*arguments: str) -> Outcome:
    return call(check.app, arguments)


def test_as_text(tmp_path: Path) -> None:
    outcome = run(str(made(tmp_path)))
    assert outcome.code == 0, outcome.err
    assert "rows: 6" in outcome.out
    assert "warning: 1 pictures are there more than once, in 2 files" in outcome.out
    assert re.search(r"copies \((training|validation)\): P0_1.png, Q0_1.png", outcome.out)
    assert "no scenes known" in outcome.out and "split by random: 5 train, 1 validate" in outcome.out
    assert outcome.out.endswith("a search would take this folder\n")


def test_as_json(tmp_path: Path) -> None:
    found: Any = json.loads(run(str(made(tmp_path)), "--json").out)
    assert found["refused"] is False
    assert found["counts"]["rows"] == 6
    assert found["counts"]["captions_repeated"] == 1
    ((group),) = found["copies"]
    assert (group["identical"], group["scenes"]) == (False, 2)
    assert found["counts"]["copied_pictures_on_both_sides"] == found["counts"]["images_on_both_sides"] == 0
    assert (found["counts"]["rows_that_train"], found["counts"]["rows_that_validate"]) == (5, 1)
    assert len(found["caption_lengths"]) == 6


def test_bad_rows_end_with_2(tmp_path: Path) -> None:
    (made(tmp_path) / "images" / "P3_1.png").unlink()
    outcome = run(str(tmp_path))
    assert outcome.code == 2
    assert "bad row: captions.json, annotation 3: P3_1.png: the image is missing" in outcome.out
    assert "a search would refuse this folder" in outcome.out


def test_captions_that_the_tokenizer_lacks(tmp_path: Path) -> None:
    made(tmp_path)
    text = (tmp_path / "captions.json").read_text().replace("A <b>pier</b>", "港口里有船")
    (tmp_path / "captions.json").write_text(text)
    outcome = run(str(tmp_path))
    assert outcome.code == 2
    assert "warning: the model's tokenizer lacks" in outcome.out


def test_one_page_that_fetches_nothing(tmp_path: Path) -> None:
    outcome = run(str(made(tmp_path / "data")), "--html", str(tmp_path / "page.html"))
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(source.startswith("data:image/jpeg;base64,") for source in re.findall(r"src='([^']*)'", page))
    assert "http:" not in page and "https:" not in page and "<script" not in page
    assert "&lt;b&gt;pier" in page and "<b>pier" not in page
    assert page.count("<figure>") == 6 + 2
    assert "The same picture under several names (1)" in page
    assert "Length of captions in tokens" in page
    assert str(tmp_path) not in page and "<title>data</title>" in page


def test_each_image_is_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several rows show it."""
    made(tmp_path)
    captions = json.loads((tmp_path / "captions.json").read_text())
    captions["annotations"] *= 3
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    decoded: list[int] = []
    decode = dataset.decode
    monkeypatch.setattr(
        dataset, "decode", lambda content, cells: (decoded.append(len(content)), decode(content, cells))[1]
    )
    outcome = run(str(tmp_path))
    assert "rows: 18" in outcome.out and "images: 6" in outcome.out
    assert len(decoded) == 6


def test_the_split_is_as_a_search_would_make_it(tmp_path: Path) -> None:
    outcome = run(str(made(tmp_path)), "--set", "split=random", "--set", "val_fraction=0.5")
    assert "split by random: 3 train, 3 validate" in outcome.out or "split by random: 4 train, 2" in outcome.out
    outcome = run(str(tmp_path), "--set", "split=given")
    assert outcome.code == 2 and "warning: " in outcome.out and "split=given, but the data do not say" in outcome.out


def test_pictures_of_one_colour_are_counted_and_a_small_thing_on_the_sea_is_none(tmp_path: Path) -> None:
    made(tmp_path)
    Image.new("RGB", (64, 64), (0, 0, 0)).save(tmp_path / "images" / "P1_1.png")
    sea = Image.new("RGB", (64, 64), (9, 20, 60))
    sea.putpixel((5, 5), (255, 255, 255))
    sea.save(tmp_path / "images" / "P2_1.png")
    outcome = run(str(tmp_path))
    assert "images of one colour: 1" in outcome.out
    assert "warning: 1 images are of one colour (for example P1_1.png)" in outcome.out


@pytest.mark.parametrize("arguments", [["/nowhere"], ["mini", "--html", "/proc/nothing/page.html"]])
def test_what_cannot_be_read_or_written(arguments: list[str]) -> None:
    run(*arguments).check_refused()
