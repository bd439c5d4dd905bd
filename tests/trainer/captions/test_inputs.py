"""What is to be captioned: each image once for an instruction, with all captions that data give it."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from trainer.captions.inputs import Item, items_of


def test_all_lines_of_an_image_are_its_references(tmp_path: Path) -> None:
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    for path in (a, b):
        Image.effect_noise((12, 10), 60).save(path)
    lines = [("a.png", "One."), ("b.png", "Two."), ("a.png", "Three."), ("a.png", "One.")]
    rows = [{"file_name": name, "text": text} for name, text in lines]
    rows.append({"file_name": "a.png", "text": "Four.", "prompt": "What is it?"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    expected = [
        Item(a, None, ("One.", "Three.")),
        Item(b, None, ("Two.",)),
        Item(a, "What is it?", ("Four.",)),
    ]
    assert items_of([str(tmp_path)]) == (expected, [])
    assert items_of([str(a), str(tmp_path), str(tmp_path), str(b)]) == (expected, [])
