"""RSICap and RSIEval (Hu et al. 2023, "RSGPT: A Remote Sensing Vision Language Model and Benchmark",
https://arxiv.org/abs/2307.15266, https://github.com/Lavender105/RSGPT).

The keys are those of that repository's `dataset/RSICap/captions.json` and `dataset/RSIEval/annotations.json`, whose
`qa_pairs` its `test.py` reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.layouts.entry import Entry, Layout, have, not_an_object, objects


def _annotations(content: Any) -> Any:
    return content.get("annotations") if isinstance(content, dict) and "images" not in content else None


def _is_rsicap(content: Any) -> bool:
    found = _annotations(content)
    if not isinstance(found, list):
        return False
    first = objects(found)
    return not first or have(first, "filename")


def _is_rsieval(content: Any) -> bool:
    first = objects(_annotations(content) or (content if isinstance(content, list) else None))
    return have(first, "filename", "caption") and have(first, "qa_pairs") and not have(first, "text_output")


def _read_rsicap(content: Any, file: str) -> Iterator[Entry]:
    for index, item in enumerate(content["annotations"]):
        where = f"{file}, annotation {index}"
        if not isinstance(item, dict):
            yield not_an_object(where, item)
            continue
        key = "caption" if "caption" in item and "text_output" not in item else "text_output"
        yield Entry(
            where=where,
            name_key="filename",
            name=item.get("filename"),
            captions=((key, item.get(key)),),
            prompt=("text_input", item["text_input"]) if "text_input" in item else None,
            scene=item.get("scene"),
            split=item.get("split"),
        )


def _read_rsieval(content: Any, file: str) -> Iterator[Entry]:
    for index, item in enumerate(content["annotations"] if isinstance(content, dict) else content):
        where = f"{file}, annotation {index}"
        if not isinstance(item, dict):
            yield not_an_object(where, item)
            continue
        caption = ("caption", item.get("caption"))
        yield Entry(where, name_key="filename", name=item.get("filename"), captions=(caption,), split="test")


RSICAP = Layout(
    name="RSICap",
    source="https://github.com/Lavender105/RSGPT",
    form='an object with a list under "annotations": [{"filename", "text_input", "text_output"}, ...]; images/',
    tiles="always",
    matches=_is_rsicap,
    read=_read_rsicap,
    images="images",
)
RSIEVAL = Layout(
    name="RSIEval",
    source="https://github.com/Lavender105/RSGPT",
    form='{"annotations": [{"filename", "caption", "qa_pairs"}, ...]}: a test set',
    tiles="always",
    matches=_is_rsieval,
    read=_read_rsieval,
)
