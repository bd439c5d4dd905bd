"""NWPU-Captions (Cheng et al. 2022, "NWPU-Captions Dataset and MLCA-Net for Remote Sensing Image Captioning",
https://doi.org/10.1109/TGRS.2022.3201474, https://github.com/HaiyanHuang98/NWPU-Captions): `dataset_nwpu.json`.

The file itself is not in that repository; its keys (`filename`, `split`, `raw`, `raw_1` to `raw_4`, by class; images
in a folder a class) are those that `CLIP/convert_dataset.py` of https://github.com/ezrafielding/PrioriSat reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trainer.data.layouts.entry import Entry, Layout, have, not_an_object, objects


def _matches(content: Any) -> bool:
    if not isinstance(content, dict) or not content or "annotations" in content:
        return False
    lists = [value for value in content.values() if isinstance(value, list)]
    return len(lists) == len(content) and any(have(objects(value), "filename", "raw") for value in lists)


def _read(content: Any, file: str) -> Iterator[Entry]:
    for label, items in content.items():
        for index, item in enumerate(items):
            where = f"{file}, {label} {index}"
            if not isinstance(item, dict):
                yield not_an_object(where, item)
                continue
            keys = [key for key in item if re.fullmatch(r"raw(_\d+)?", key)]
            yield Entry(
                where=where,
                name_key="filename",
                name=item.get("filename"),
                captions=tuple((key, item[key]) for key in keys) or (("raw", None),),
                split=item.get("split"),
                label=label,
                places=("", f"{label}/"),
            )


NWPU = Layout(
    name="NWPU-Captions",
    source="https://github.com/HaiyanHuang98/NWPU-Captions",
    form='{class: [{"filename", "raw", "raw_1", ..., "split"}, ...], ...}',
    tiles="never",
    matches=_matches,
    read=_read,
)
