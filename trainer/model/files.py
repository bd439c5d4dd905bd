"""A checkpoint's folder looked at without torch: which files are there, and the tensors that their headers list."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trainer.common.errors import ModelError, shown

QFORMER = "qformer_tokenizer"
"""Folder of the Q-Former's own tokenizer."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt", "vocab.json")
"""Files of which a tokenizer has one at least, as Hugging Face's tokenizers are saved."""
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_LISTED = 5
"""Most names that a message lists."""


def problems(folder: Path, *, weights: bool = True) -> Iterator[str]:
    """What a checkpoint's folder lacks to be loaded, each as the end of a sentence about the model.

    Args:
        folder: with a config.json.
        weights: whether the weights have to be there too.
    """
    for where, what in ((folder, "no tokenizer"), (folder / QFORMER, "no tokenizer for the Q-Former")):
        if not any((where / file).is_file() for file in TOKENIZER_FILES):
            place = "it has" if where == folder else f"its folder {QFORMER}/ is missing or has"
            yield f"{what}: {place} none of {', '.join(TOKENIZER_FILES)}"
    if not any((folder / file).is_file() for file in PROCESSOR_FILES):
        yield f"no image processor: it has neither {' nor '.join(PROCESSOR_FILES)}"
    if not weights:
        return
    try:
        files = weight_files(folder)
    except ModelError as error:
        yield str(error)
        return
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        yield f"{len(missing)} of its {len(files)} weight files are missing: {listed(missing)}"


def weight_files(folder: Path) -> list[Path]:
    """The files in which a checkpoint has its weights, by its index if there is one, whether they exist or not.

    Raises:
        ModelError: it has no safetensors, or its index cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
            return sorted(folder / Path(name).name for name in names)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise ModelError(f"its {INDEX} cannot be read: {error!r}") from None
    pickled = sorted(file.name for file in (*folder.glob("pytorch_model*.bin"), *folder.glob("*.pt")))
    if pickled:
        raise ModelError(
            f"no safetensors, only pickled weights ({listed(pickled)}), which are never read, since they can run "
            "code; where they are trusted, load them with Transformers and call save_pretrained: it writes safetensors"
        )
    raise ModelError(f"no weights: it has neither {WEIGHTS} nor {INDEX}")


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors by name, from the headers of the weight files alone.

    Raises:
        ModelError: a file is missing or is not whole.
    """
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - no dict
                    found[name] = tuple(tensors.get_slice(name).get_shape())
        except Exception as error:  # noqa: BLE001 - SafetensorError, which is not an OSError, and OSErrors
            raise ModelError(f"the weight file {file} cannot be read: {error}") from None
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """A checkpoint's config.json.

    Raises:
        ModelError: it cannot be read, or is not an InstructBLIP's.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"its config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError("its config.json is not an object")
    return config


def pixel_bytes(folder: Path) -> int:
    """Bytes of one image as the model takes it: (3, size, size) in float32, by its config.json.

    Raises:
        ModelError: the file cannot be read.
    """
    vision = read_config(folder).get("vision_config")
    size = vision.get("image_size", 224) if isinstance(vision, dict) else 224
    return 3 * size * size * 4 if isinstance(size, int) else 0


def has_own_head(folder: Path) -> bool:
    """Whether a checkpoint's config.json says that its language model's head is not tied to the embeddings.

    As the file says it: Transformers 5 ties every T5's, also FlanT5's, whose head is a weight of its own, and so would
    let a missing one pass.
    """
    text = read_config(folder).get("text_config")
    return isinstance(text, dict) and text.get("tie_word_embeddings") is False


def listed(names: list[str]) -> str:
    """The first names and how many more there are."""
    more = f" and {len(names) - MOST_LISTED} more" if len(names) > MOST_LISTED else ""
    return ", ".join(shown(name)[1:-1] for name in names[:MOST_LISTED]) + more
