"""COCO captions (Chen et al. 2015, "Microsoft COCO Captions", https://arxiv.org/abs/1504.00325; the form:
https://cocodataset.org/#format-data, "Image Captioning"): images and captions in two lists, joined by id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.layouts.entry import Entry, Layout, have, not_an_object, objects


def _matches(content: Any) -> bool:
    if not isinstance(content, dict):
        return False
    images, annotations = objects(content.get("images")), objects(content.get("annotations"))
    return have(images, "id", "file_name") and have(annotations, "image_id", "caption")


def _read(content: Any, file: str) -> Iterator[Entry]:
    captions: dict[Any, list[tuple[int, Any]]] = {}
    for index, item in enumerate(content["annotations"]):
        if not isinstance(item, dict):
            yield not_an_object(f"{file}, annotation {index}", item)
            continue
        captions.setdefault(_key(item.get("image_id")), []).append((index, item.get("caption")))
    for index, image in enumerate(content["images"]):
        if not isinstance(image, dict):
            yield not_an_object(f"{file}, image {index}", image)
            continue
        of_image = captions.pop(_key(image.get("id")), [])
        if not of_image:
            continue  # as in RSICap, images without a caption are usual: COCO's own lists have some
        yield Entry(
            where=f"{file}, image {index}",
            name_key="file_name",
            name=image.get("file_name"),
            captions=tuple(("caption", caption) for _, caption in of_image),
            split=image.get("split"),
        )
    for key, lost in captions.items():
        for index, _ in lost:
            yield Entry(f"{file}, annotation {index}", problem=f"image_id is {key}, which no image has")


def _key(value: Any) -> str:
    return repr(value)


COCO = Layout(
    name="COCO captions",
    source="https://cocodataset.org/#format-data",
    form='{"images": [{"id", "file_name"}, ...], "annotations": [{"image_id", "caption"}, ...]}',
    tiles="likely",
    matches=_matches,
    read=_read,
)
