"""Layouts: a small sample of each is recognised by its content and read; what is in none is told in a few lines."""

from __future__ import annotations

import csv
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data.dataset import Examined, examine, split, usable


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.effect_noise((12, 10), 60).convert("RGB").save(path)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def karpathy(folder: Path) -> None:
    """Lu et al. 2017: RSICD's dataset_rsicd.json."""
    images = []
    for i in range(8):
        picture(folder / "RSICD_images" / f"{i:05d}.jpg")
        sentences = [{"tokens": ["a"], "raw": f"Caption {k} of {i} .", "imgid": i, "sentid": k} for k in range(5)]
        part = "train" if i < 5 else "val" if i < 7 else "test"
        images.append({"filename": f"{i:05d}.jpg", "imgid": i, "sentences": sentences, "split": part, "sentids": []})
    write(folder / "dataset_rsicd.json", {"images": images, "dataset": "rsicd"})


def nwpu(folder: Path) -> None:
    """Cheng et al. 2022: dataset_nwpu.json, with the keys that CLIP/convert_dataset.py of
    https://github.com/ezrafielding/PrioriSat reads (filename, split, raw, raw_1 to raw_4, by class); the images of
    NWPU-RESISC45 lie in a folder for each class."""
    content: dict[str, Any] = {}
    for label in ("airport", "beach"):
        for i in range(1, 5):
            picture(folder / "images" / label / f"{label}_{i:03d}.jpg")
            more = {f"raw_{k}": f"Caption {k} of {label} {i}." for k in range(1, 5)}
            part = ("train", "train", "val", "test")[i - 1]
            item = {"filename": f"{label}_{i:03d}.jpg", "imgid": i, "raw": f"Caption of {label} {i}.", **more}
            content.setdefault(label, []).append({**item, "split": part})
    write(folder / "dataset_nwpu.json", content)


def coco(folder: Path) -> None:
    """Chen et al. 2015: captions_train2017.json and captions_val2017.json in annotations/."""
    for part, count in (("train", 5), ("val", 2)):
        images = [{"id": i, "file_name": f"{i:012d}.jpg", "license": 1} for i in range(count + 1)]
        for image in images:
            picture(folder / f"{part}2017" / str(image["file_name"]))
        annotations = [
            {"id": 10 * i + k, "image_id": i, "caption": f"Caption {k} of {part} {i}."}
            for i in range(count)
            for k in range(5)
        ]
        captions = {"info": {}, "images": images, "annotations": annotations}
        write(folder / "annotations" / f"captions_{part}2017.json", captions)


def vrsbench(folder: Path) -> None:
    """Li et al. 2024: VRSBench_train.json."""
    rows: list[dict[str, Any]] = []
    for i in range(6):
        name = f"P{i // 2:04d}_{i:04d}.png"
        picture(folder / "Images_train" / name)
        for mark, answer in (("caption", f"Tile {i}."), ("vqa", "yes")):
            talk = [
                {"from": "human", "value": f"<image>\n[{mark}] Describe the image in detail"},
                {"from": "gpt", "value": answer},
            ]
            rows.append({"id": name, "image": name, "conversations": talk})
    write(folder / "VRSBench_train.json", rows)


def vrsbench_by_image(folder: Path) -> None:
    """The same, from Annotations_train and Annotations_val."""
    for part, count in (("train", 4), ("val", 2)):
        for i in range(count):
            picture(folder / f"Images_{part}" / f"P{i:04d}_0001.png")
            item = {"image": f"P{i:04d}_0001.png", "caption": f"Tile {part} {i}.", "objects": [], "qa_pairs": []}
            write(folder / f"Annotations_{part}" / f"P{i:04d}_0001.json", item)


def image_folder_csv(folder: Path) -> None:
    """Hugging Face's metadata.csv with several caption columns, the last empty for some."""
    rows = [["file_name", "caption_1", "caption_2", "split"]]
    for i in range(6):
        picture(folder / f"{i}.png")
        rows.append([f"{i}.png", f"One of {i}, seen.", f"Two of {i}." if i % 2 else "", "train" if i < 4 else "val"])
    with (folder / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def image_folder_parts(folder: Path) -> None:
    """Hugging Face's ImageFolder with a metadata.jsonl in each of train/, validation/ and test/."""
    for part, count in (("train", 4), ("validation", 2), ("test", 2)):
        for i in range(count):
            picture(folder / part / f"{i}.png")
        lines = [json.dumps({"file_name": f"{i}.png", "text": f"{part} {i}."}) for i in range(count)]
        (folder / part / "metadata.jsonl").write_text("\n".join(lines))


def jsonl(folder: Path) -> None:
    lines = []
    for i in range(6):
        picture(folder / "images" / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": [f"One of {i}.", f"Two of {i}."]}))
    (folder / "all.jsonl").write_text("\n".join(lines))


def flickr_csv(folder: Path) -> None:
    """Flickr8k's captions.txt as CSV: a line for each caption, with tabs."""
    lines = ["image\tsentence"]
    for i in range(6):
        picture(folder / "Images" / f"{i}.jpg")
        lines += [f"{i}.jpg\tCaption {k} of {i}." for k in range(3)]
    (folder / "captions.csv").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("make", "layout", "rows", "captions", "given", "rule", "tests"),
    [
        (karpathy, "RSICD/UCM/Sydney (Karpathy) (dataset_rsicd.json)", 7, 5, (5, 2), "given", 1),
        (nwpu, "NWPU-Captions (dataset_nwpu.json)", 6, 5, (4, 2), "given", 2),
        (coco, "COCO captions (annotations/captions_train2017.json, ", 7, 5, (5, 2), "given", 0),
        (vrsbench, "VRSBench (VRSBench_train.json)", 6, 1, None, "scenes", 0),
        (vrsbench_by_image, "VRSBench by image (Annotations_train, Annotations_val)", 6, 1, (4, 2), "given", 0),
        (image_folder_csv, "image folder (metadata.csv)", 6, 1.5, (4, 2), "given", 0),
        (image_folder_parts, "image folder (test/metadata.jsonl, train/", 6, 1, (4, 2), "given", 2),
        (jsonl, "table (all.jsonl)", 6, 2, None, "random", 0),
        (flickr_csv, "table (captions.csv)", 6, 3, None, "random", 0),
    ],
)
def test_each_layout_is_recognised_and_read(
    tmp_path: Path,
    make: Callable[[Path], None],
    layout: str,
    rows: int,
    captions: float,
    given: tuple[int, int] | None,
    rule: str,
    tests: int,
) -> None:
    make(tmp_path)
    examined = usable(examine(str(tmp_path)), TrainConfig())
    assert examined.layout.startswith(layout)
    assert len(examined.rows) == rows
    assert sum(len(row.captions) for row in examined.rows) == rows * captions
    assert all(row.image.is_file() for row in examined.rows)
    assert all(text.endswith(".") for row in examined.rows for text in row.captions)
    parts = split(examined, TrainConfig())
    assert parts.facts.rule == rule
    assert parts.facts.test_rows == examined.test_rows == tests
    if given:
        assert (len(parts.train), len(parts.val)) == given


def test_the_content_tells_the_layout_not_the_name(tmp_path: Path) -> None:
    for name in ("dataset_rsicd.json", "captions.json", "anything.json"):
        folder = tmp_path / name.partition(".")[0]
        karpathy(folder)
        (folder / "dataset_rsicd.json").rename(folder / name)
        assert examine(str(folder)).layout == f"RSICD/UCM/Sydney (Karpathy) ({name})"


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "all.jsonl", "captions.json"])
def test_tiles_of_one_picture_stay_on_one_side_whatever_the_layout(name: str, tmp_path: Path) -> None:
    names = [f"P{scene:04d}_{tile:04d}.png" for scene in range(6) for tile in range(4)]
    for each in names:
        picture(tmp_path / each)
    if name == "captions.json":
        images = [{"id": i, "file_name": each} for i, each in enumerate(names)]
        write(
            tmp_path / name, {"images": images, "annotations": [{"image_id": i, "caption": "A."} for i in range(24)]}
        )
    elif name == "metadata.csv":
        (tmp_path / name).write_text("\n".join(["file_name,text", *(f"{each},A pier." for each in names)]))
    else:
        key = "file_name" if name == "metadata.jsonl" else "image"
        (tmp_path / name).write_text("\n".join(json.dumps({key: each, "text": "A."}) for each in names))
    parts = split(examine(str(tmp_path)), TrainConfig())
    assert parts.facts.rule == "scenes" and parts.facts.scenes == 6
    assert not {row.scene for row in parts.train} & {row.scene for row in parts.val}
    assert "whole scenes (by file names, as P0000 in P0000_0000.png)" in parts.facts.why


def test_names_that_begin_alike_may_be_tiles_of_one_picture(tmp_path: Path) -> None:
    for i in range(10):
        picture(tmp_path / f"P0001_{i:04d}.png")
    lines = (json.dumps({"file_name": f"P0001_{i:04d}.png", "text": "A."}) for i in range(10))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    examined = examine(str(tmp_path))
    facts = split(examined, TrainConfig()).facts
    assert facts.rule == "random"
    assert any("most file names begin with 'P0001': if these are tiles of one picture" in w for w in facts.warnings)
    assert not any("begin with" in w for w in split(examined, TrainConfig(split="random")).facts.warnings)


def test_images_may_lie_two_folders_deep(tmp_path: Path) -> None:
    """VRSBench's archives, unpacked each into a folder of its name."""
    vrsbench(tmp_path)
    (tmp_path / "outer").mkdir()
    (tmp_path / "Images_train").rename(tmp_path / "outer" / "Images_train")
    (tmp_path / "outer").rename(tmp_path / "Images_train")
    examined = examine(str(tmp_path))
    assert len(examined.rows) == 6 and not examined.bad


def test_vrsbench_asks_as_its_conversations_do(tmp_path: Path) -> None:
    vrsbench(tmp_path)
    examined = examine(str(tmp_path))
    assert {row.prompt for row in examined.rows} == {"Describe the image in detail"}
    assert {row.scene for row in examined.rows} == {"P0000", "P0001", "P0002"}


def rsieval(folder: Path) -> None:
    annotations = []
    for i in range(3):
        picture(folder / "images" / f"P{i:04d}_0001.png")
        qa = [{"question": "Does this image contains trees?", "answer": "Yes.", "type": "presence"}]
        annotations.append({"filename": f"P{i:04d}_0001.png", "caption": f"Tile {i}.", "qa_pairs": qa})
    write(folder / "annotations.json", {"annotations": annotations})


def vrsbench_test(folder: Path) -> None:
    told = {"question": "Describe the image in detail", "dataset": "RSBench", "type": "caption"}
    rows = [{"image_id": f"P{i}_1.png", "ground_truth": "A tile.", "question_id": i, **told} for i in range(3)]
    write(folder / "VRSBench_EVAL_Cap.json", rows)


@pytest.mark.parametrize(("make", "name"), [(rsieval, "RSIEval"), (vrsbench_test, "VRSBench's test set")])
def test_a_test_set_is_not_searched_on(tmp_path: Path, make: Callable[[Path], None], name: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=rf"all 3 rows are a test set \({name}\), which a search never reads"):
        examine(str(tmp_path))


def test_a_test_split_is_not_even_opened(tmp_path: Path) -> None:
    karpathy(tmp_path)
    before = examine(str(tmp_path))
    (tmp_path / "RSICD_images" / "00007.jpg").write_bytes(b"broken")
    after = examine(str(tmp_path))
    assert after == before and not after.bad


def refused(folder: Path, config: TrainConfig | None = None) -> list[str]:
    """The lines of the message."""
    with pytest.raises(DataError) as caught:
        usable(examine(str(folder)), config or TrainConfig())
    return str(caught.value).splitlines()


def test_coco_without_its_images_is_a_few_lines(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(5000)]
    annotations = [{"image_id": i, "caption": "A field."} for i in range(5000)]
    write(tmp_path / "captions.json", {"images": images, "annotations": annotations})
    lines = refused(tmp_path)
    assert lines[0].endswith("5000 of 5000 rows cannot be used:")
    assert lines[1] == "  - 5000 rows: the image is missing, for example"
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("content", "seems"),
    [
        (
            {"annotations": [{"id": i, "img": "a.png", "words": "A."} for i in range(5000)]},
            "an object with 5000 items under 'annotations'",
        ),
        ([{"picture": "a.png", "words": "A."}] * 5000, "a list of 5000 items with the keys 'picture', 'words'"),
        ({f"a{i}.png": "A." for i in range(5000)}, "an object with 5000 keys ('a0.png', "),
        (
            {
                "images": [{"id": 1, "file_name": "a.png"}],
                "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}] * 5000,
            },
            "COCO's boxes without captions (5000 annotations)",
        ),
        (7, "a single int"),
        ([[1] * 50] * 5000, "a list of 5000 items"),
    ],
)
@pytest.mark.parametrize("name", ["captions.json", "other.json"])
def test_an_unknown_layout_is_described_in_a_few_lines(tmp_path: Path, content: Any, seems: str, name: str) -> None:
    (tmp_path / "images").mkdir()
    write(tmp_path / name, content)
    lines = refused(tmp_path)
    assert f"{name} seems to be {seems}" in lines[1]
    assert len(lines) <= 17 and all(len(line) < 300 for line in lines)
    assert any(line.startswith("  - COCO captions: {") for line in lines)


def test_a_caption_of_an_image_that_coco_does_not_list_is_told(tmp_path: Path) -> None:
    coco(tmp_path)
    path = tmp_path / "annotations" / "captions_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"] += [{"image_id": 99, "caption": "Whose?"}, "no object"]
    write(path, content)
    assert [line.partition(", ")[2] for line in refused(tmp_path)[1:-1]] == [
        "annotation 11: must be an object, but is str",
        "annotation 10: image_id is 99, which no image has",
    ]


def test_two_caption_files_are_not_guessed_between(tmp_path: Path) -> None:
    karpathy(tmp_path)
    jsonl(tmp_path)
    (line,) = refused(tmp_path)
    assert "holds 2 caption files (all.jsonl (table), dataset_rsicd.json (RSICD/UCM/Sydney (Karpathy)))" in line


@pytest.mark.parametrize(
    ("encoding", "text", "named"),
    [
        ("gb18030", "机场旁边有三架飞机。", "GB18030"),
        ("utf-16", "A café.", "UTF-16"),
        ("utf-16-le", "A field.", "UTF-16LE"),
        ("utf-32", "A field.", "UTF-32"),
        ("latin-1", "A café by the sea.", "WINDOWS-1252"),
        ("cp1252", "Ein “Hafen” für Öl.", "WINDOWS-1252"),
        ("shift_jis", "空港の隣に飛行機がある。", "SHIFT_JIS"),
        ("euc_kr", "공항 옆에 비행기가 있다.", "EUC-KR"),
    ],
)
@pytest.mark.parametrize("name", ["captions.json", "metadata.jsonl", "metadata.csv", "any.csv"])
def test_other_encodings_are_named_with_the_way_out(
    tmp_path: Path, encoding: str, text: str, named: str, name: str
) -> None:
    (tmp_path / "images").mkdir()
    row = {"filename": "a.png", "text_output": text, "file_name": "a.png", "text": text}
    content = f"file_name,text\na.png,{text}" if name.endswith("csv") else json.dumps(row, ensure_ascii=False)
    (tmp_path / name).write_bytes(content.encode(encoding))
    (message,) = refused(tmp_path)
    assert f"looks like {named}; convert it: iconv -f {named} -t UTF-8 {tmp_path}" in message
    # As pasted, and the folder is read then: a copy beside the file would change nothing.
    subprocess.run(message.partition("convert it: ")[2], shell=True, check=True)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]
    if name != "captions.json":
        picture(tmp_path / "a.png")
        assert [row.captions for row in examine(str(tmp_path)).rows] == [(text,)]


@pytest.mark.parametrize("broken", ["train.csv", "train.json", "val.csv"])
def test_a_file_that_cannot_be_read_beside_one_that_can_is_not_left_out(tmp_path: Path, broken: str) -> None:
    """It may be the training split: the test split alone would be trained on."""
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "test.csv").write_text("image,caption\na.png,One.\nb.png,Two.\n")
    content = "image,caption\nc.png,A café.\n" if broken.endswith("csv") else '[{"image": "c.png", "capti'
    (tmp_path / broken).write_bytes(content.encode("latin-1"))
    first, *_, last = refused(tmp_path)
    assert str(tmp_path / broken) in first
    assert "test.csv beside it can be read; mend what cannot, or move it elsewhere" in last


def test_splits_are_found_among_many_files(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"box{number:02d}.json").write_text('{"boxes": []}')
    for name in ("a", "b"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "train.csv").write_text("image,caption\na.png,One.\n")
    (tmp_path / "anno_val.csv").write_text("image,caption\nb.png,Two.\n")
    assert {(row.image.name, row.given) for row in examine(str(tmp_path)).rows} == {
        ("a.png", "train"),
        ("b.png", "val"),
    }


def test_a_quote_that_is_never_closed_does_not_swallow_rows(tmp_path: Path) -> None:
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    table = tmp_path / "rows.csv"
    table.write_text('image,caption\na.png,"A 4"" one, ""big""."\nb.png,"B.\nc.png,C.\nd.png,D.\n')
    (line,) = [line for line in refused(tmp_path) if "rows.csv, line" in line]
    assert "line 5: is not CSV in the row that begins in line 3" in line and "must be closed" in line
    table.write_text('image,caption\na.png,"A 4"" one, ""big""."\nb.png,"B."x\nc.png,C.\nd.png,5" long\n')
    (line,) = [line for line in refused(tmp_path) if "rows.csv, line" in line]
    assert "line 3: is not CSV (" in line
    table.write_text(table.read_text().replace('"B."x', '"B.\n\nx"'))
    assert [row.caption for row in examine(str(tmp_path)).rows] == ['A 4" one, "big".', "B. x", "C.", '5" long']


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ("image,caption,caption,caption\na.png,One.,Two.,Three.\n", ("One.", "Two.", "Three.")),
        ("image,caption,caption_2,caption\na.png,One.,Two.,Three.\n", ("One.", "Two.", "Three.")),
        ("image,caption,caption.1\na.png,One.,Two.\n", ("One.", "Two.")),
        ('image,raw\na.png,"[""One."", ""Two \\""2\\"".""]"\n', ("One.", 'Two "2".')),  # Flickr30k's CSV
        ("image,captions\na.png,\"['One.', 'It\\'s two.']\"\n", ("One.", "It's two.")),  # a list, as pandas writes it
        ("image,caption\na.png,[caption] One.\n", ("[caption] One.",)),
        ("image,caption\na.png,[1]\n", ("[1]",)),
        ("image, caption\na.png, \"One, 'two'.\"\n", ("One, 'two'.",)),
        ('image, caption_1, caption_2\na.png, "One.", Two "2".\n', ("One.", 'Two "2".')),
        ("prompt\timage\tcaption\n\ta.png\tOne.\n", ("One.",)),  # an empty first value is no space to be skipped
        ('prompt\tcaption\timage\n\t "One\ttwo."\ta.png\n', ("One two.",)),
    ],
)
def test_several_captions_in_a_csv_are_all_read(tmp_path: Path, content: str, captions: tuple[str, ...]) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text(content)
    (row,) = examine(str(tmp_path)).rows
    assert row.captions == captions


def test_two_columns_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text("image,caption,image\na.png,One.,b.png\n")
    (line,) = refused(tmp_path)
    assert "two columns are named 'image'" in line


def test_csv_rows_that_do_not_fit_their_columns_are_told(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "rows.csv").write_text('image,caption\na.png,"One, two."\na.png,One, two.\nb.png\n')
    lines = refused(tmp_path)
    assert any("rows.csv, line 3: has 3 values for 2 columns; quote values that hold ','" in line for line in lines)
    assert any("rows.csv, line 4: 'caption' must be a text" in line for line in lines)


def test_names_that_lead_out_are_refused_in_every_layout(tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    folder = tmp_path / "data"
    picture(folder / "a.png")
    (folder / "rows.jsonl").write_text(
        "\n".join(
            json.dumps({"image": n, "caption": "A."}) for n in ("a.png", "../secret.png", str(tmp_path / "secret.png"))
        )
    )
    lines = refused(folder)
    assert sum("leads out of the images folder" in line for line in lines) == 2
    images = [{"filename": "secret.png", "filepath": "..", "sentences": [{"raw": "A."}], "split": "train"}]
    write(tmp_path / "k" / "dataset.json", {"images": images})
    assert any("is missing" in line or "leads out" in line for line in refused(tmp_path / "k"))


def several(folder: Path) -> Examined:
    jsonl(folder)
    return examine(str(folder))


def test_the_fingerprint_is_of_all_captions_and_given_splits(tmp_path: Path) -> None:
    first = several(tmp_path).fingerprint
    path = tmp_path / "all.jsonl"
    text = path.read_text()
    path.write_text(text.replace("Two of 3.", "Two of three."))
    assert examine(str(tmp_path)).fingerprint != first
    path.write_text(text.replace('"image"', '"split": "train", "image"'))
    assert examine(str(tmp_path)).fingerprint != first
    path.write_text(text)
    assert examine(str(tmp_path)).fingerprint == first


def test_text_and_caption_of_metadata_jsonl_are_not_two_captions(tmp_path: Path) -> None:
    """As before there were several: `text` alone counts; without it, the list or the numbered columns do."""
    picture(tmp_path / "a.png")
    rows = [
        {"file_name": "a.png", "text": "One.", "caption": "Other.", "caption_1": "Third."},
        {"file_name": "a.png", "captions": ["One.", "Two.", "One."]},
        {"file_name": "a.png", "caption_0": "One.", "caption_1": "Two."},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    examined = examine(str(tmp_path))
    assert [row.captions for row in examined.rows] == [("One.",), ("One.", "Two."), ("One.", "Two.")]
