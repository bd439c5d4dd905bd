"""Images that are bad in ways that only training shows: named, and never trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from trainer.common.errors import DataError
from trainer.data import features
from trainer.data.batches import Pixels
from trainer.data.features import compute_or_open
from trainer.data.images import open_image
from trainer.model.base import Base, load_base


@pytest.fixture(scope="module")
def base(tiny_checkpoint: Path) -> Base:
    return load_base(str(tiny_checkpoint), dtype=torch.float32, device=torch.device("cpu"))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = []
    for grey in (10, 20, 30):
        paths.append(tmp_path / f"{grey}.png")
        Image.new("RGB", (40, 40), (grey, grey, grey)).save(paths[-1])
    return paths


class Poisoned:
    """The model's image processor, which makes NaN of dark images."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, *, images: Image.Image, **options: Any) -> Any:
        values = self.processor(images=images, **options)
        if images.getpixel((0, 0)) == (20, 20, 20):
            values["pixel_values"][0][0, 3, 3] = float("nan")
        return values

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def test_an_image_of_floats_with_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nan.tiff"
    image = Image.new("F", (8, 8), 0.5)
    image.putpixel((3, 3), float("nan"))
    image.save(path)
    with pytest.raises(DataError, match=r"nan\.tiff: the image has more than 8 bits a channel \(32 bits\); convert"):
        open_image(path)


@pytest.mark.parametrize("stored", [False, True])
def test_pixels_that_are_not_finite_name_their_image(
    base: Base, images: list[Path], tmp_path: Path, stored: bool
) -> None:
    pixels = Pixels(Poisoned(base.processor.image_processor))
    with pytest.raises(DataError, match=r"/20\.png: its pixels are not finite after preprocessing; check image_mean"):
        if stored:
            compute_or_open(tmp_path / "store", base, images, pixels)
        else:
            for path in images:
                pixels(path)
    assert not list(tmp_path.rglob("segment-*")), "something of it was kept"


def test_a_tower_that_overflows_names_the_image(
    base: Base, images: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = features.encode_images

    def overflows(model: Any, pixel_values: torch.Tensor) -> torch.Tensor:
        output = original(model, pixel_values)
        output[1, 0, 0] = float("inf")
        return output

    monkeypatch.setattr(features, "encode_images", overflows)
    with pytest.raises(DataError, match=r"20\.png: the vision tower's output is not finite in float32"):
        compute_or_open(tmp_path / "store", base, images[:2], Pixels(base.processor.image_processor))
    assert not list(tmp_path.rglob("segment-*"))
