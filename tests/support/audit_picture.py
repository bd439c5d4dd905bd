"""`python -m tests.support.audit_picture --out docs/images`: the picture of the audit's page in docs/data.md.

The data are a part of the embedded ones, with what an audit finds: a copy that is turned, one that is recompressed, a
black picture, a caption that is too long, one that is empty.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from tests.support import browser
from tests.support.screenshots import keep
from trainer.config import TrainConfig
from trainer.data.audit import audit
from trainer.data.page import page as page_of
from trainer.mini import ensure_data

SCENES = 15
"""Of four tiles each."""


def main(out: Annotated[Path, typer.Option(help="Folder of the picture.")] = Path("docs/images")) -> None:
    """Take it, unattended."""
    if browser.CHROMIUM is None:
        raise SystemExit("no chromium is installed")
    with tempfile.TemporaryDirectory() as temporary:
        data = sample(Path(temporary) / "harbours")
        file = Path(temporary) / "page.html"
        file.write_text(page_of(audit(TrainConfig(data=str(data)), lambda done, total: None)), encoding="utf-8")
        with browser.page() as (page, _):
            page.set_viewport_size({"width": 1250, "height": 1300})
            page.set_content(file.read_text(encoding="utf-8"))
            keep(page, out / "data-audit.png")


def sample(folder: Path) -> Path:
    """The data, made in this folder."""
    source = ensure_data()
    rows = json.loads((source / "captions.json").read_text())["annotations"][: 4 * SCENES]
    (folder / "images").mkdir(parents=True)
    for row in rows:
        Image.open(source / "images" / row["filename"]).save(folder / "images" / row["filename"])
    first, second = (Image.open(folder / "images" / rows[i]["filename"]) for i in (0, 9))
    first.transpose(Image.Transpose.ROTATE_90).save(folder / "images" / "P0901_0001.png")
    second.convert("RGB").resize((96, 96)).save(folder / "images" / "P0902_0001.jpg", quality=60)
    Image.new("RGB", first.size).save(folder / "images" / "P0903_0001.png")
    extra = (
        ("P0901_0001.png", rows[0]["text_output"]),
        ("P0902_0001.jpg", " ".join([rows[9]["text_output"]] * 7)),
        ("P0903_0001.png", "..."),
    )
    rows += [{**rows[0], "filename": name, "text_output": text} for name, text in extra]
    (folder / "captions.json").write_text(json.dumps({"annotations": rows}))
    return folder


if __name__ == "__main__":
    typer.run(main)
