"""Given splits, scenes and classes: who validates, by which rule, and what is warned of; several captions an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image, ImageOps

from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data.batches import CaptionDataset, EpochSampler
from trainer.data.dataset import Examined, Row, examine, split
from trainer.data.layouts.entry import Tiles
from trainer.data.scenes import class_parts, scene_parts, with_single

CLASSES = ("airport", "beach", "stadium", "forest", "port")


def parts(names: Sequence[str], tiles: Tiles = "always") -> list[tuple[str | None, str | None]]:
    """(scene, class) of each image."""
    paths = [PurePosixPath(name) for name in names]
    found = scene_parts(paths, tiles)
    return list(zip(found, class_parts(paths, found), strict=True))


def test_a_numbered_part_is_a_scene_and_a_word_a_class() -> None:
    assert parts(["P0001_0001.png", "P0001_0002.png"]) == [("P0001", None)] * 2
    names = [f"{label}_{i}.jpg" for label in CLASSES for i in range(1, 21)]
    assert parts(names) == [(None, name.partition("_")[0]) for name in names]
    assert parts([f"{label}{i:02d}.tif" for label in CLASSES for i in (0, 1)])[0] == (None, "airport")
    assert parts(["airport/1.jpg", "airport/2.jpg", "port/1.jpg", "port/2.jpg"])[2] == (None, "port")


def test_many_words_with_few_images_each_are_places() -> None:
    places = [f"place{chr(97 + i)}" for i in range(20)]
    assert {scene for scene, _ in parts([f"{p}_{i}.png" for p in places for i in (1, 2)])} == set(places)
    assert {scene for scene, _ in parts([f"{p}_{i}.png" for p in places for i in range(5)])} == {None}


def test_the_name_of_the_whole_set_is_not_a_scene() -> None:
    names = [f"COCO_val2014_{i:012d}.jpg" for i in range(40)]
    assert {scene for scene, _ in parts(names, "likely")} == {None}
    assert {scene for scene, _ in parts([*names, "COCO_train2014_1.jpg"], "likely")} == {None}
    tiles = [f"S{scene:02d}_{i}.png" for scene in range(3) for i in range(4)]
    assert {scene for scene, _ in parts(tiles, "likely")} == {f"S{scene:02d}" for scene in range(3)}
    uneven = [*names, *(f"P{scene}_1.png" for scene in range(3))]
    assert {scene for scene, _ in parts(uneven, "likely")} == {"COCO_val2014", "P0", "P1", "P2"}
    assert {scene for scene, _ in parts(tiles, "never")} == {None}


def test_images_of_one_name_are_not_of_one_scene(tmp_path: Path) -> None:
    """Folders of splits number their images anew, and im0.png is another picture than im0.jpg."""
    for part, count in (("train", 6), ("validation", 3)):
        (tmp_path / part).mkdir()
        rows = []
        for i in range(count):
            Image.effect_noise((32, 32), 90).save(tmp_path / part / f"{i:04d}.jpg")
            rows.append(json.dumps({"file_name": f"{i:04d}.jpg", "text": f"{part} {i}"}))
        (tmp_path / part / "metadata.jsonl").write_text("\n".join(rows))
    examined = examine(str(tmp_path))
    facts = split(examined, TrainConfig()).facts
    assert (facts.rule, facts.scenes, facts.warnings) == ("given", 0, ())
    # What no other image shares is as it was, since it is in the data's fingerprint.
    assert [row.scene for row in examined.rows][2:4] == ["train/0002.jpg", "0003"]
    with pytest.raises(DataError, match="no scenes are known"):
        split(examined, TrainConfig(split="scenes"))
    names = [PurePosixPath(name) for name in ("im0.jpg", "im0.png", "im1.jpg", "P1_1.png", "P1_2.png")]
    assert with_single(names, names, [None, None, None, "P1", "P1"]) == ["im0.jpg", "im0.png", "im1", "P1", "P1"]
    assert with_single(names[:1] * 2, names[:1] * 2, [None, None]) == ["im0", "im0"]  # two rows of one image


def made(rows: Sequence[tuple[str, str | None, str | None]], **more: Any) -> Examined:
    """Rows of (scene, given split, class)."""
    made_rows = [
        Row(Path(f"{i}.png"), "p", "c", scene=scene, where="", given=given, label=label)
        for i, (scene, given, label) in enumerate(rows)
    ]
    return Examined("made", tuple(made_rows), (), "", **more)


def test_no_class_is_held_out_whole_without_a_word() -> None:
    rows = [(f"{label}_{i}", None, label) for label in CLASSES for i in range(20)]
    for seed in range(10):
        facts = split(made(rows), TrainConfig(split_seed=seed)).facts
        assert (facts.rule, facts.rows, facts.scenes, facts.classes, facts.val) == ("random", 100, 0, 5, 20)
        assert facts.val_classes >= 3 and not facts.warnings
    held = made([(label, None, label) for label in CLASSES for _ in range(20)])
    warnings = split(held, TrainConfig()).facts.warnings
    assert any("1 classes are in validation alone" in warning for warning in warnings)
    assert any("validation is 1 of 5 scenes" in warning for warning in warnings)


def test_given_splits_are_used_and_keep_their_share() -> None:
    rows = [(str(i), "train" if i % 4 else "validation", None) for i in range(100)]
    found = split(made(rows), TrainConfig())
    assert (found.facts.rule, len(found.train), len(found.val)) == ("given", 75, 25)
    assert all(row.given == "validation" for row in found.val)
    fewer = split(made(rows), TrainConfig(max_samples=20))
    assert (len(fewer.train), len(fewer.val)) == (15, 5)
    assert [facts.left_out for facts in (found.facts, fewer.facts)] == [0, 80]
    least = split(made(rows), TrainConfig(max_samples=2))
    assert (len(least.train), len(least.val)) == (1, 1)
    other = split(made(rows), TrainConfig(split="random"))
    assert {row.given for row in other.val} == {"train", "validation"}


def test_an_image_on_both_given_sides_is_a_warning() -> None:
    """The same file, as one with several captions may be given; copies under other names are another matter."""
    rows = [(str(i), "train", None) for i in range(10)]
    examined = made([*rows, *((str(i), "val", None) for i in range(10, 15))])
    again = replace(examined.rows[12], image=examined.rows[0].image)
    both = replace(examined, rows=(*examined.rows[:12], again, *examined.rows[13:]))
    (warning,) = split(both, TrainConfig()).facts.warnings
    assert warning.startswith("1 of the 5 images of validation are in training too (for example 0.png)")
    assert split(examined, TrainConfig()).facts.warnings == ()


def test_scenes_on_both_given_sides_are_a_warning() -> None:
    rows = [(f"P{i // 4}", "val" if i % 4 == 0 else "train", None) for i in range(40)]
    warnings = split(made(rows), TrainConfig()).facts.warnings
    assert warnings == ("10 scenes are in training and in validation (P0, P1, P2), whose tiles may look alike",)


def test_a_split_that_the_data_do_not_allow_is_refused() -> None:
    whole = made([(str(i), None, None) for i in range(8)])
    with pytest.raises(DataError, match="split=scenes, but no scenes are known"):
        split(whole, TrainConfig(split="scenes"))
    with pytest.raises(DataError, match="split=given, but the data do not say"):
        split(whole, TrainConfig(split="given"))
    odd = made([(str(i), "fold1" if i else "train", None) for i in range(8)])
    with pytest.raises(DataError, match="1 train, 0 val, 7 rows without a split known here: 7 of 'fold1'"):
        split(odd, TrainConfig(split="given"))
    facts = split(odd, TrainConfig()).facts
    assert facts.rule == "random" and "7 of 'fold1'" in facts.warnings[0]


def test_a_training_split_alone_gives_validation_too() -> None:
    found = split(made([(str(i), "train", None) for i in range(10)], test_rows=3), TrainConfig())
    assert (len(found.train), len(found.val), found.facts.test_rows, found.facts.warnings) == (8, 2, 3, ())


def test_facts_are_plain_values() -> None:
    facts = split(made([(f"P{i // 2}", None, None) for i in range(20)], test_rows=3), TrainConfig()).facts
    assert json.loads(json.dumps(facts.tags()))["split.rule"] == "scenes"
    assert facts.lines()[0] == "rows used: 20; 10 scenes, no classes known; 3 test rows are left alone"
    assert facts.lines()[1].startswith("split by scenes: 16 train, 4 validate (2 scenes)")


def drawn(epoch: int, counts: Sequence[int], seed: int = 1, group: Any = None) -> list[int]:
    sampler = EpochSampler(len(counts), seed, group, counts)
    sampler.epoch = epoch
    return list(sampler)


def test_one_caption_a_row_is_drawn_each_epoch() -> None:
    counts = [5, 1, 3] * 20
    row_of = [row for row, count in enumerate(counts) for _ in range(count)]
    seen: set[int] = set()
    for epoch in range(1, 60):
        samples = drawn(epoch, counts)
        assert sorted(row_of[sample] for sample in samples) == list(range(60))
        assert samples == drawn(epoch, counts)
        assert [row_of[sample] for sample in samples] == drawn(epoch, [1] * 60)  # the order of one-caption data
        seen |= set(samples)
    assert seen == set(range(len(row_of)))
    assert drawn(1, counts) != drawn(1, counts, seed=2)
    grouped = drawn(3, counts, group=([7] * len(row_of), 4))
    assert sorted(grouped) == sorted(drawn(3, counts))


def test_a_data_set_has_a_sample_for_each_caption() -> None:
    rows = [
        Row(Path("a.png"), "p", "one", "a", "", more_captions=("two", "three")),
        Row(Path("b.png"), "p", "four", "b", ""),
    ]
    tokens: Any = lambda row, caption: SimpleNamespace(caption=caption)  # noqa: E731
    data = CaptionDataset(rows, tokens, lambda path: path.name)  # type: ignore[arg-type, return-value]
    assert [(image, token.caption) for image, token in (data[i] for i in range(len(data)))] == [  # type: ignore
        ("a.png", "one"), ("a.png", "two"), ("a.png", "three"), ("b.png", "four"),
    ]  # fmt: skip


@pytest.mark.parametrize("rule", ["auto", "random"])
def test_copies_of_a_picture_stay_on_one_side(rule: str, tmp_path: Path) -> None:
    """One picture under twelve names, mirrored and recompressed ones among them."""
    (tmp_path / "images").mkdir()
    names = []
    for number in range(40):
        image = Image.effect_noise((64, 64), 90).resize((160, 160)).convert("RGB")
        image.save(tmp_path / "images" / f"P{number:04d}_0001.png")
        names.append(f"P{number:04d}_0001.png")
    for number in range(11):
        copy = ImageOps.mirror(image) if number % 2 else image
        copy.save(tmp_path / "images" / f"P{number + 50:04d}_0001.jpg", quality=90)
        names.append(f"P{number + 50:04d}_0001.jpg")
    rows = [{"filename": name, "text_input": "Describe.", "text_output": f"View {i}."} for i, name in enumerate(names)]
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": rows}))
    examined = examine(str(tmp_path))
    assert [len(group) for group in examined.copies] == [12]
    copies = {path.name for path in examined.copies[0]}
    for seed in range(12):
        found = split(examined, TrainConfig.parse({"split_seed": seed, "split": rule}))
        sides = [{row.image.name for row in side} & copies for side in (found.train, found.val)]
        assert set() in sides and found.train and found.val
        assert any("1 pictures are there more than once, in 12 files" in line for line in found.facts.warnings)
