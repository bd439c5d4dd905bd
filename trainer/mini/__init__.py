"""The embedded model and data: `model="mini"` and `data="mini"`, for any laptop and without a download.

scenes.py       the generator: scenes, tiles, RSICap's format
vocabulary.py   what a scene can hold, and the words for it
drawing.py      facts -> picture
captions.py     facts -> sentences
checkpoint/     the pretrained InstructBLIP: float16 on disk, to be used in float32
behaviour.py    a program that measures whether the embedded model behaves like the real one
recipe/         the program that made checkpoint/; nothing that trains imports it
    build.py        tiles, tokenizers, vision, captions
    sizes.py        its sizes, batches and optimizer
    architecture.py the model and its tokenizers before training
    vision.py       pretraining of the vision tower
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from trainer.common.cache import cache_folder
from trainer.common.files import whole_folder
from trainer.mini import scenes

CHECKPOINT = Path(__file__).parent / "checkpoint"
"""Folder of the embedded InstructBLIP with its processor, as `from_pretrained` takes it."""

STUDY_SCENES = 160
STUDY_TILES_PER_SCENE = 4
STUDY_SEED = 20260101
"""Size and seed of the data set that the studies of the embedded model use."""


def ensure_data() -> Path:
    """The study's data folder, generated on first use (about a second).

    Its name holds a hash of everything that determines the content, so a changed generator never meets old data.
    It appears complete or not at all.
    """
    recipe = (scenes.GENERATOR_VERSION, STUDY_SCENES, STUDY_TILES_PER_SCENE, STUDY_SEED, scenes.STUDY)
    digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]
    target = cache_folder() / f"mini-{digest}"
    if not target.is_dir():
        # Another process may be doing the same: whoever is first counts. Not flushed: that takes 3 s for 641 files.
        with whole_folder(target, replace=False, flush=False) as folder:
            scenes.write_dataset(
                folder,
                scenes=STUDY_SCENES,
                tiles_per_scene=STUDY_TILES_PER_SCENE,
                seed=STUDY_SEED,
                style=scenes.STUDY,
            )
    return target
