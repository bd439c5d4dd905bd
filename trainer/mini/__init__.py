"""The embedded model and data: `model="mini"` and `data="mini"`, for any laptop and without a download.

scenes.py       the generator: scenes, tiles, RSICap's format
vocabulary.py   what a scene can hold, and the words for it
drawing.py      facts -> picture
captions.py     facts -> sentences
build.py        the recipe that made checkpoint/: tiles, tokenizers, vision, captions
recipe.py       its sizes, batches and optimizer
architecture.py its model and tokenizers before training
vision.py       its pretraining of the vision tower
behaviour.py    measures that the mini behaves like the real thing
checkpoint/     the pretrained InstructBLIP: float16 on disk, to be used in float32
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from trainer.mini import scenes

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the embedded InstructBLIP with its processor, as `from_pretrained` takes it."""

STUDY_SCENES = 160
STUDY_TILES_PER_SCENE = 4
STUDY_SEED = 20260101


def cache_folder() -> Path:
    """Where generated data is kept: the environment variable LORA_SEARCH_CACHE, or `~/.cache/lora-search`."""
    return Path(os.environ.get("LORA_SEARCH_CACHE") or "~/.cache/lora-search").expanduser()


def ensure_data() -> Path:
    """The study's data folder, generated on first use (about a second).

    The name holds a hash of all that determines the content, so a changed generator never meets old data.
    The folder appears complete or not at all: it is written beside its place and renamed.
    """
    recipe = (scenes.GENERATOR_VERSION, STUDY_SCENES, STUDY_TILES_PER_SCENE, STUDY_SEED, scenes.STUDY)
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    target = cache_folder() / f"mini-{digest}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        scenes.write_dataset(
            temporary / "data",
            scenes=STUDY_SCENES,
            tiles_per_scene=STUDY_TILES_PER_SCENE,
            seed=STUDY_SEED,
            style=scenes.STUDY,
        )
        try:
            (temporary / "data").rename(target)
        except OSError:
            # Another process was first; a rename never replaces a folder that has content.
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target
