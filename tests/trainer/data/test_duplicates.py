"""Copies of a picture are found however they were made, and different tiles are not taken for copies."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from trainer.data.dataset import examine
from trainer.data.duplicates import SIZE, Group, Picture, find, merged, picture
from trainer.data.images import open_image

T = Image.Transpose


def scene(seed: int, width: int = 200, height: int = 200) -> Image.Image:
    """A picture with large and small parts, as photographs have."""
    rng = np.random.default_rng(seed)
    whole = np.zeros((height, width, 3))
    for cells, weight in ((4, 60), (12, 30), (50, 12)):
        part = Image.fromarray(rng.integers(0, 256, (cells, cells, 3)).astype(np.uint8))
        whole += (np.asarray(part.resize((width, height), Image.Resampling.BICUBIC), float) - 128) * weight / 64
    return Image.fromarray(np.clip(whole + 128, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=quality)
    return Image.open(stream).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "pixels": lambda image: image.copy(),
    **{turn.name: lambda image, turn=turn: image.transpose(turn) for turn in T},  # type: ignore[misc]
    "half": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC),
    "a third": lambda image: image.resize((image.width // 3, image.height // 3), Image.Resampling.BILINEAR),
    "larger": lambda image: image.resize((image.width * 3 // 2, image.height * 3 // 2), Image.Resampling.NEAREST),
    "recompressed": lambda image: jpeg(image, 25),
    "turned, smaller, recompressed": lambda image: jpeg(image.transpose(T.ROTATE_270).resize((90, 90)), 50),
}


def pictures(images: list[Image.Image]) -> list[Picture]:
    return [picture(image, str(number)) for number, image in enumerate(images)]


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_is_found(kind: str) -> None:
    images = [scene(seed) for seed in range(12)]
    copies = [COPIES[kind](image) for image in images]
    groups = find(pictures([*images, *copies]))
    assert [group.members for group in groups] == [(i, i + 12) for i in range(12)]
    assert not any(group.identical for group in groups)


def test_identical_files_and_a_picture_of_twelve_names() -> None:
    many = [picture(scene(0), "a") for _ in range(12)]
    assert find([*many, picture(scene(1), "b")]) == [Group(tuple(range(12)), identical=True)]
    assert find([]) == []


def test_another_shape_is_not_a_copy() -> None:
    """Squeezed to a square, all sketches look alike; a wide picture turned is a high one."""
    wide = scene(0, 300, 200)
    assert len(find(pictures([wide, wide.transpose(T.ROTATE_90)]))) == 1
    assert find(pictures([wide, wide.resize((200, 300))])) == []
    assert find(pictures([wide, wide.resize((200, 200))])) == []


def test_pictures_of_one_colour_are_copies_of_none() -> None:
    blank = [picture(Image.new("RGB", (40, 40), (grey, grey, grey)), "same") for grey in (0, 0, 5)]
    assert find(blank) == []


def test_the_embedded_tiles_are_all_different() -> None:
    rows = examine("mini").rows
    kept = [picture(open_image(row.image), str(number)) for number, row in enumerate(rows)]
    assert find(kept) == []


def test_ten_thousand_images_take_seconds() -> None:
    """Decoding as many tiles of 512 pixels takes a minute."""
    rng = np.random.default_rng(0)
    sketches = rng.integers(0, 256, (10_000, SIZE, SIZE, 3), dtype=np.uint8)
    kept = [Picture(str(n), 64, 64, sketch.tobytes()) for n, sketch in enumerate(sketches)]
    began = time.perf_counter()
    assert find(kept) == []
    assert time.perf_counter() - began < 20


def test_scenes_that_share_a_picture_are_one() -> None:
    scenes = ["a", "a", "b", "c", "d", "b"]
    assert merged(scenes, []) == scenes
    assert merged(scenes, [Group((1, 3), False)]) == ["a", "a", "b", "a", "d", "b"]
    assert merged(scenes, [Group((1, 3), False), Group((2, 3), True)]) == ["a", "a", "a", "a", "d", "a"]
    assert merged(["a", "a"], [Group((0, 1), True)]) == ["a", "a"]
