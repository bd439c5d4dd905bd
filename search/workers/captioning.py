"""A worker's captions: each trial that completes captions the same few validation images with its best adapter."""

from __future__ import annotations

import io
import logging
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import optuna
from PIL import Image

from search.captions import CUT, IMAGES, Captioned, Pictured
from trainer import runtime
from trainer.captions.generate import Decoding
from trainer.captions.hooked import hooked_captioner
from trainer.common.files import write_whole
from trainer.data.images import open_image

if TYPE_CHECKING:
    from trainer.config import TrainConfig
    from trainer.data.dataset import Row
    from trainer.workbench import Workbench

log = logging.getLogger("search.workers.captioning")

SHARE = 0.03
"""Most of a trial's own training time that its captions take; generation is stopped there."""
LEAST_S = 0.02
"""With less time than this no token comes out, and nothing is begun."""
MOST_TOKENS = 128
SIDE = 160
"""Pixels of a picture's longer side on notes and pages."""


class Captioning:
    """The images of a study, chosen once, and what the base says of them."""

    def __init__(self, study: optuna.Study, base: TrainConfig, bench: Workbench, folder: Path, most: int) -> None:
        """Prepares nothing yet.

        Args:
            study: keeps the images and the base's captions.
            base: the study's base configuration, whose validation rows the images are.
            bench: the worker's.
            folder: of the study; the pictures go below it.
            most: number of images; 0 for none.
        """
        self._study, self._base, self._bench, self._folder, self._most = study, base, bench, folder, most
        self._pictured: Pictured | None = None
        self._opened: list[Image.Image] = []
        self._pictures: tuple[bytes, ...] = ()
        self._files: tuple[Path, ...] = ()
        self._sheet = b""
        self._broken = False
        self._over_s = 0.0

    def of(self, config: TrainConfig, adapter: Path, trained_s: float) -> Captioned | None:
        """Captions by a trial's adapter; None where there are none to be had. Never raises: they are worth no trial.

        Args:
            config: the trial's.
            adapter: folder of its best adapter.
            trained_s: seconds that it trained, of which captions take `SHARE` at most.
        """
        if self._most == 0 or self._broken or config.model != self._base.model:
            return None
        budget = SHARE * trained_s - self._over_s
        if budget < LEAST_S:
            return None
        try:
            if self._pictured is None:
                self._prepare()
            assert self._pictured is not None
            began = time.perf_counter()
            captions = self._captions(config, adapter, budget)
            seconds = time.perf_counter() - began
            # What goes before and after generation is not stopped by its limit: it is left out of the next one.
            self._over_s = max(self._over_s, seconds - budget)
        except Exception:
            log.exception("no captions: the images or the adapter cannot be used")
            self._broken = True
            return None
        return Captioned(self._pictured, captions, seconds, self._pictures, self._files, self._sheet)

    def _prepare(self) -> None:
        """Choose the images, and caption them with the base, once for a study."""
        train, val = self._bench.datasets(self._base)
        rows = choose(val.rows, self._most, self._base.split_seed)
        prompts = [row.prompt for row in train.rows]
        instruction = max(dict.fromkeys(prompts), key=prompts.count)
        self._opened = [open_image(row.image) for row in rows]
        self._write_pictures()
        names = tuple(str(row.image) for row in rows)
        known = Pictured.of(self._study.user_attrs)
        if known is None or known.images != names:
            known = Pictured(
                images=names,
                labels=tuple(row.label for row in rows),
                references=tuple(row.caption for row in rows),
                instruction=instruction,
                base=(),
            )
            self._pictured = known
            known = Pictured(**{**known.to_dict(), "base": self._captions(self._base, None, None)})
            self._study.set_user_attr(IMAGES, known.to_dict())
        self._pictured = known

    def _captions(self, config: TrainConfig, adapter: Path | None, budget_s: float | None) -> tuple[str, ...]:
        assert self._pictured is not None
        base = self._bench.base(config)
        decoding = Decoding(
            max_new_tokens=min(config.max_target_length, MOST_TOKENS),
            max_time=budget_s,
            began=None if budget_s is None else time.time(),
        )
        try:
            with hooked_captioner(base, config, adapter, decoding) as captioner:
                texts = captioner(self._opened, self._pictured.instruction)
                late = captioner.late
        except (RuntimeError, MemoryError) as error:
            if runtime.is_out_of_memory(error):
                runtime.release_memory(base.device)
            raise
        return tuple(text + CUT if late and not text.endswith((".", "!", "?")) else text for text in texts)

    def _write_pictures(self) -> None:
        small = []
        for image in self._opened:
            copy = image.copy()
            copy.thumbnail((SIDE, SIDE))
            small.append(copy)
        self._pictures = tuple(_png(image) for image in small)
        folder = self._folder / "captions"
        folder.mkdir(parents=True, exist_ok=True)
        self._files = tuple(folder / f"image-{number}.png" for number in range(1, len(small) + 1))
        sheet = Image.new("RGB", (sum(image.width + 4 for image in small) - 4, max(image.height for image in small)))
        left = 0
        for image in small:
            sheet.paste(image, (left, 0))
            left += image.width + 4
        self._sheet = _png(sheet)
        for file, content in ((folder / "sheet.png", self._sheet), *zip(self._files, self._pictures, strict=True)):
            if not file.is_file() or file.read_bytes() != content:
                write_whole(file, content)


def choose(rows: Sequence[Row], most: int, seed: int) -> list[Row]:
    """At most `most` rows, spread over classes where classes are known, else over scenes; one row an image."""
    rng = random.Random(seed)
    groups: dict[str, list[Row]] = {}
    labelled = any(row.label for row in rows)
    for row in {row.image: row for row in reversed(rows)}.values():
        groups.setdefault((row.label or "") if labelled else row.scene, []).append(row)
    names = sorted(groups)
    rng.shuffle(names)
    for name in names:
        groups[name].sort(key=lambda row: str(row.image))
        rng.shuffle(groups[name])
    turns = max((len(group) for group in groups.values()), default=0)
    chosen = [groups[name][turn] for turn in range(turns) for name in names if turn < len(groups[name])]
    return chosen[:most]


def _png(image: Image.Image) -> bytes:
    """In 256 colours: a third of the size, for pictures that only show what is meant."""
    stream = io.BytesIO()
    image.quantize(256).save(stream, "PNG", optimize=True)
    return stream.getvalue()
