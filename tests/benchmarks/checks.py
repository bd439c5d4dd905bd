"""`python -m tests.benchmarks.checks`: what checks of a data folder take, against the decoding of its images alone.

Makes a folder of small JPEGs (224 x 224, different scenes of noise) in the image folder's layout, decodes all of them
with as many threads as the checks use, examines the folder as a search does before its first trial, and audits it.
Each is run several times in turn, and the least of its times counts: other work on the machine only adds.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.audit import audit
from trainer.data.images import content_of, decode
from trainer.data.text import check_text

SIDE = 224


def main(
    images: Annotated[int, typer.Option(min=2, help="Number of images.")] = 10_000,
    rounds: Annotated[int, typer.Option(min=1, help="Times that each is run.")] = 3,
    folder: Annotated[Path | None, typer.Option(help="Where the images are, or are to be made; kept.")] = None,
) -> None:
    """Measure."""
    with tempfile.TemporaryDirectory() as temporary:
        data = folder or Path(temporary)
        make(data, images)
        paths = sorted(data.glob("*.jpg"))
        config = TrainConfig(data=str(data))
        least: dict[str, tuple[float, float]] = {}
        for _ in range(rounds):
            for name, work in (
                ("decoding alone", lambda: decoded(paths)),
                ("checks of a search", lambda: examined(config)),
                ("audit", lambda: audited(config)),
            ):
                took = seconds(work)
                least[name] = tuple(map(min, least.get(name, took), took))  # type: ignore[assignment]
        wall, processor = least["decoding alone"]
        for name, (a, b) in least.items():
            print(f"{name:20} {a:7.2f} s  {a / wall:5.2f}   of a processor {b:7.2f} s  {b / processor:5.2f}")


def make(folder: Path, count: int) -> None:
    """So many JPEGs that differ, with a caption each, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "metadata.jsonl").is_file():
        return
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        name = f"S{number // 10:04d}_{number:05d}.jpg"
        coarse = Image.fromarray(random.integers(0, 256, (14, 14, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / name, quality=90)
        lines.append(json.dumps({"file_name": name, "text": f"An aerial view of harbor {number} with some boats."}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")


def decoded(paths: list[Path]) -> None:
    """Each file read and decoded, nothing else, with the checks' number of threads."""
    with ThreadPoolExecutor(dataset.THREADS) as pool:
        for _ in pool.map(lambda path: decode(content_of(path)), paths):
            pass


def examined(config: TrainConfig) -> None:
    """What `search.preflight` does with data and text."""
    found = dataset.examine(config.data)
    dataset.split(found, config)
    check_text(found.rows, config.model, config.max_target_length)


def audited(config: TrainConfig) -> None:
    """`python -m trainer.data.check`."""
    audit(config, lambda done, total: None)


def seconds(work: Callable[[], None]) -> tuple[float, float]:
    """(how long it takes, processor time of all its threads)."""
    began, busy = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - busy


if __name__ == "__main__":
    typer.run(main)
