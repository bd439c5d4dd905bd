"""RSICD, UCM-Captions and Sydney-Captions, in the form of Karpathy's splits.

Lu et al. 2017, "Exploring Models and Data for Remote Sensing Image Caption Generation"
(https://arxiv.org/abs/1712.07835, https://github.com/201528014227051/RSICD_optimal); UCM and Sydney: Qu et al. 2016,
https://doi.org/10.1109/CITS.2016.7546397. The form is that of Karpathy and Fei-Fei 2015
(https://cs.stanford.edu/people/karpathy/deepimagesent/), so Flickr8k, Flickr30k and COCO in it are read too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.layouts.entry import Entry, Layout, have, not_an_object, objects


def _matches(content: Any) -> bool:
    return isinstance(content, dict) and have(objects(content.get("images")), "filename", "sentences")


def _read(content: Any, file: str) -> Iterator[Entry]:
    for index, item in enumerate(content["images"]):
        where = f"{file}, image {index}"
        if not isinstance(item, dict):
            yield not_an_object(where, item)
            continue
        sentences = item.get("sentences")
        if not isinstance(sentences, list):
            yield Entry(where, problem=f"'sentences' must be a list, but is {type(sentences).__name__}")
            continue
        folder = item.get("filepath")
        yield Entry(
            where=where,
            name_key="filename",
            name=item.get("filename"),
            captions=tuple(("raw", s.get("raw") if isinstance(s, dict) else s) for s in sentences),
            split=item.get("split"),
            places=(f"{folder}/", "") if isinstance(folder, str) and folder else ("",),
        )


KARPATHY = Layout(
    name="RSICD/UCM/Sydney (Karpathy)",
    source="https://github.com/201528014227051/RSICD_optimal",
    form='{"images": [{"filename", "sentences": [{"raw"}, ...], "split"}, ...]}',
    tiles="likely",
    matches=_matches,
    read=_read,
)
