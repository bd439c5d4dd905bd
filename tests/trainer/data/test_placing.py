"""Images whose names several folders have: each caption is paired with its own, or its row is bad."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.data.dataset import Examined, examine
from trainer.data.layouts import find


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((12, 10), 60).convert("RGB").save(path)


def pictures(folder: Path, *folders: str, count: int = 4) -> None:
    for name in folders:
        for i in range(count):
            picture(folder / name / f"{i:04d}.jpg")


def pairs(found: Examined, folder: Path) -> dict[str, tuple[str, ...]]:
    """The captions of each image."""
    return {row.image.relative_to(folder.resolve()).as_posix(): row.captions for row in found.rows}


def expected(*folders: str, count: int = 4) -> dict[str, tuple[str, ...]]:
    return {f"{name}/{i:04d}.jpg": (f"{name} {i}",) for name in folders for i in range(count)}


def table(path: Path, *folders: str, columns: str = "image,caption", word: str = "") -> None:
    """A row of each image in each folder; `word` stands for a third column, of which {} is the folder's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{i:04d}.jpg,{name} {i}{word.format(name)}" for name in folders for i in range(4)]
    path.write_text("\n".join([columns, *rows]) + "\n", encoding="utf-8")


def test_a_caption_file_a_split_takes_its_own_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "train", "val", "test")
    for part in ("train", "val", "test"):
        table(tmp_path / f"{part}.csv", part)

    assert pairs(examine(str(tmp_path)), tmp_path) == expected("train", "val")
    assert pairs(examine(str(tmp_path), part="test"), tmp_path) == expected("test")


def test_a_column_of_splits_chooses_the_folder(tmp_path: Path) -> None:
    pictures(tmp_path, "images/training", "images/val2014", "images/test")
    parts = {"train": "images/training", "val": "images/val2014", "test": "images/test"}
    table(tmp_path / "all.csv", *parts, columns="image,caption,split", word=",{}")

    found = pairs(examine(str(tmp_path), part="all"), tmp_path)

    assert found == {f"{parts[part]}/{i:04d}.jpg": (f"{part} {i}",) for part in parts for i in range(4)}


def test_coco_takes_the_folder_of_its_split(tmp_path: Path) -> None:
    pictures(tmp_path, "train", "val")
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        images = [{"id": i, "file_name": f"{i:04d}.jpg"} for i in range(4)]
        captions = [{"id": i, "image_id": i, "caption": f"{part} {i}"} for i in range(4)]
        content = json.dumps({"images": images, "annotations": captions})
        (tmp_path / "annotations" / f"captions_{part}.json").write_text(content, encoding="utf-8")

    assert pairs(examine(str(tmp_path)), tmp_path) == expected("train", "val")


@pytest.mark.parametrize("column", ["class", "scene"])
def test_rows_of_one_name_in_two_classes_are_two_images(tmp_path: Path, column: str) -> None:
    pictures(tmp_path, "airport", "beach")
    table(tmp_path / "captions.csv", "airport", "beach", columns=f"filename,caption,{column}", word=",{}")

    assert pairs(examine(str(tmp_path)), tmp_path) == expected("airport", "beach")


def test_classes_within_splits(tmp_path: Path) -> None:
    folders = [f"{part}/{name}" for part in ("train", "val") for name in ("Baseball_Field", "beach")]
    pictures(tmp_path, *folders)
    named = {"Baseball_Field": "Baseball field", "beach": "beach"}
    rows = [f"{i:04d}.jpg,{f} {i},{f.split('/')[0]},{named[f.split('/')[1]]}" for f in folders for i in range(4)]
    (tmp_path / "all.csv").write_text("\n".join(["image,caption,split,class", *rows]), encoding="utf-8")

    assert pairs(examine(str(tmp_path)), tmp_path) == expected(*folders)


def test_a_name_in_several_folders_that_nothing_tells_apart_is_a_bad_row(tmp_path: Path) -> None:
    pictures(tmp_path, "a", "b")
    picture(tmp_path / "b" / "alone.jpg")
    (tmp_path / "c.csv").write_text(
        "image,caption\n0000.jpg,One.\nalone.jpg,Two.\n0000.jpg,Three.\n", encoding="utf-8"
    )

    found = examine(str(tmp_path))

    problem = "0000.jpg: the image is in several folders: a/, b/; write the folder before the name"
    assert found.bad == (f"c.csv, line 2: {problem}", f"c.csv, line 4: {problem}")
    assert pairs(found, tmp_path) == {"b/alone.jpg": ("Two.",)}


def test_the_usual_folders_come_before_others_that_say_nothing(tmp_path: Path) -> None:
    """`masks/` and `thumbs/` have the names of the images as a rule."""
    pictures(tmp_path, "images", "masks", "thumbs")
    table(tmp_path / "c.csv", "images")
    assert pairs(examine(str(tmp_path)), tmp_path) == expected("images")


def test_links_to_one_file_are_not_several(tmp_path: Path) -> None:
    pictures(tmp_path, "a")
    (tmp_path / "b").symlink_to("a")
    table(tmp_path / "c.csv", "a")
    assert pairs(examine(str(tmp_path)), tmp_path) == expected("a")


@pytest.mark.parametrize("other", ["val", "test"])
def test_a_missing_image_is_not_taken_from_another_split(tmp_path: Path, other: str) -> None:
    pictures(tmp_path, "train", other)
    (tmp_path / other / "0003.jpg").unlink()
    for part in ("train", other):
        table(tmp_path / f"{part}.csv", part)

    found = examine(str(tmp_path), part="all")

    assert found.bad == (f"{other}.csv, line 5: 0003.jpg: the image is missing; that in train/ is another row's",)
    assert pairs(found, tmp_path) == {k: v for k, v in expected("train", other).items() if k != f"{other}/0003.jpg"}


def test_a_missing_image_is_not_taken_from_another_class(tmp_path: Path) -> None:
    pictures(tmp_path, "airport", "beach")
    (tmp_path / "beach" / "0003.jpg").unlink()
    table(tmp_path / "captions.csv", "airport", "beach", columns="filename,caption,class", word=",{}")

    found = examine(str(tmp_path))

    problem = "0003.jpg: the image is missing; that in airport/ is another row's"
    assert found.bad == (f"captions.csv, line 9: {problem}",)


def test_an_image_of_two_classes_stays_one(tmp_path: Path) -> None:
    for name in ("airport", "beach"):
        for i in range(4):
            picture(tmp_path / name / f"{name}{i}.jpg")
    rows = [f"airport{i}.jpg,One {i},airport\nairport{i}.jpg,Two {i},runway" for i in range(4)]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption,class", *rows]), encoding="utf-8")

    found = pairs(examine(str(tmp_path)), tmp_path)

    assert found == {f"airport/airport{i}.jpg": (f"One {i}", f"Two {i}") for i in range(4)}


def test_a_split_is_not_bound_to_a_folder_of_another(tmp_path: Path) -> None:
    """Karpathy's `restval` trains and lies in val2014/; others split one folder anew."""
    for i in range(4):
        picture(tmp_path / "val2014" / f"{i}.jpg")
    rows = [f"{i}.jpg,One {i},{'train' if i < 2 else 'val'}" for i in range(4)]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption,split", *rows]), encoding="utf-8")

    found = examine(str(tmp_path))

    assert [row.given for row in found.rows] == ["train", "train", "val", "val"] and not found.bad


def test_a_folder_that_may_not_be_read_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lost+found` at the top of a disk: no image is looked for there."""
    pictures(tmp_path, "photos")
    table(tmp_path / "captions.csv", "photos")
    (tmp_path / "lost+found").mkdir()
    scan = os.scandir

    def refuse(path: Any = ".") -> Any:
        if str(path).endswith("lost+found"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)  # root, as in containers, may read all
    assert pairs(examine(str(tmp_path)), tmp_path) == expected("photos")


@pytest.mark.parametrize("name", ["{i}.jpg", "own{i}/a.jpg"])
def test_each_folder_is_listed_once_however_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A look a row and folder took four minutes for 157,500 rows in 45 folders of classes."""
    for i in range(60):
        path = tmp_path / "images" / f"class{i % 20}" / name.format(i=i)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    rows = [f"{name.format(i=i)},Caption {k}" for i in range(60) for k in range(5)]
    (tmp_path / "c.csv").write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    listed: list[str] = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or listdir(path))

    found = find.read(tmp_path)

    assert {entry.places for entry in found.entries} == {(f"images/class{i}/",) for i in range(20)}
    below = [path for path in listed if path != str(tmp_path)]  # which is listed for its caption files, too
    assert len(below) == len(set(below)) <= 1 + 20 + 60  # images/, the classes, and what is in them
