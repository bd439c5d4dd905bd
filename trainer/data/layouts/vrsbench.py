"""VRSBench (Li et al. 2024, "VRSBench: A Versatile Vision-Language Benchmark Dataset for Remote Sensing Image
Understanding", https://arxiv.org/abs/2406.12384, https://huggingface.co/datasets/xiang709/VRSBench).

It is published in three forms: conversations for training (`VRSBench_train.json`, of which those that ask for a
caption are read), `VRSBench_EVAL_Cap.json` (a test set), and a JSON file an image (`Annotations_train/`,
`Annotations_val/`), which `find` gives to this reader as one list.

The keys are those that https://github.com/lx709/VRSBench writes: `prepare_eval_all.ipynb` the test set (`image_id`,
`ground_truth`, `question`, `type`), `extract_patch_json.py` the files an image (`image`, `caption`). That the training
conversations of a caption begin with `[caption]`, and have `image`, is by programs that read VRSBench_train.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.layouts.entry import Entry, Layout, have, not_an_object, objects

MARK = "[caption]"
"""Begins the questions that ask for a caption."""
PER_IMAGE = "__file__"
"""Key under which `find` notes the name of an image's own JSON file."""


def _is_conversations(content: Any) -> bool:
    return any(_wants_caption(item) for item in content if isinstance(item, dict)) if _is_talk(content) else False


def _is_talk(content: Any) -> bool:
    return have(objects(content), "image", "conversations")


def _turns(item: dict[str, Any]) -> list[Any]:
    turns = item.get("conversations")
    return turns if isinstance(turns, list) else []


def _wants_caption(item: dict[str, Any]) -> bool:
    turns = _turns(item)
    first = turns[0] if turns and isinstance(turns[0], dict) else {}
    return MARK in str(first.get("value"))


def _is_test(content: Any) -> bool:
    return have(objects(content), "image_id", "ground_truth", "question")


def _is_per_image(content: Any) -> bool:
    return have(objects(content), PER_IMAGE, "image", "caption")


def _read_conversations(content: Any, file: str) -> Iterator[Entry]:
    for index, item in enumerate(content):
        where = f"{file}, item {index}"
        if not isinstance(item, dict):
            yield not_an_object(where, item)
        elif _wants_caption(item):
            turns = _turns(item)
            question = str(turns[0]["value"]).replace("<image>", "").replace(MARK, "").strip()
            answer = turns[1].get("value") if len(turns) > 1 and isinstance(turns[1], dict) else None
            prompt = ("value", question) if question else None
            caption = ("value", answer)
            yield Entry(where, name_key="image", name=item.get("image"), captions=(caption,), prompt=prompt)


def _read_test(content: Any, file: str) -> Iterator[Entry]:
    for index, item in enumerate(content):
        where = f"{file}, item {index}"
        if not isinstance(item, dict):
            yield not_an_object(where, item)
        elif item.get("type", "caption") == "caption":
            caption = ("ground_truth", item.get("ground_truth"))
            yield Entry(where, name_key="image_id", name=item.get("image_id"), captions=(caption,), split="test")


def _read_per_image(content: Any, file: str) -> Iterator[Entry]:
    for item in content:
        where = f"{file}/{item[PER_IMAGE]}" if isinstance(item, dict) else file
        if not isinstance(item, dict) or "image" not in item:
            yield Entry(where, problem="must be an object with 'image' and 'caption'")
            continue
        yield Entry(where, name_key="image", name=item.get("image"), captions=(("caption", item.get("caption")),))


def _layout(name: str, form: str, matches: Any, read: Any) -> Layout:
    source = "https://huggingface.co/datasets/xiang709/VRSBench"
    return Layout(name=name, source=source, form=form, tiles="always", matches=matches, read=read)


VRSBENCH = (
    _layout(
        "VRSBench", '[{"image", "conversations": [{"value": "[caption] ..."}, ...]}, ...]', _is_conversations,
        _read_conversations,
    ),
    _layout("VRSBench's test set", '[{"image_id", "ground_truth", "question"}, ...]', _is_test, _read_test),
    _layout(
        "VRSBench by image", 'Annotations_train/*.json and Annotations_val/*.json: {"image", "caption", ...}',
        _is_per_image, _read_per_image,
    ),
)  # fmt: skip
