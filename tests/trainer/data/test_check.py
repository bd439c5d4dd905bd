"""The audit of a folder: text, JSON and one page, of good data, bad rows and copies."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.bad_input.harness import Outcome, call
from tests.trainer.data.test_duplicates import scene
from trainer.data import check


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
    assert "warning: 1 pictures have copies (2 rows; 1 of them in several scenes" in outcome.out
    assert "copies: P0_1.png, Q0_1.png" in outcome.out
    assert outcome.out.endswith("a search would take this folder\n")


def test_as_json(tmp_path: Path) -> None:
    found: Any = json.loads(run(str(made(tmp_path)), "--json").out)
    assert found["refused"] is False
    assert found["counts"]["rows"] == 6
    assert found["counts"]["captions_repeated"] == 1
    ((group),) = found["copies"]
    assert (group["identical"], group["scenes"]) == (False, 2)
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


@pytest.mark.parametrize("arguments", [["/nowhere"], ["mini", "--html", "/proc/nothing/page.html"]])
def test_what_cannot_be_read_or_written(arguments: list[str]) -> None:
    run(*arguments).check_refused()
