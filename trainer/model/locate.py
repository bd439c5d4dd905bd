"""Finding a checkpoint without loading it, and without torch, so that a missing one is reported at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.common.errors import ModelError, shown
from trainer.config import EMBEDDED
from trainer.model import files, hub


@dataclass(frozen=True)
class Found:
    """A checkpoint whose files have been looked at."""

    name: str
    folder: Path
    """With its config.json, processor and tokenizers."""
    shapes: hub.Shapes | None
    """Shapes of its tensors, if the weights are not in the folder yet but on the hub."""


def locate(name: str) -> str:
    """The checkpoint's folder, be it one in the hub's cache; the hub id itself, if it is not in the cache.

    Raises:
        ModelError: it looks like a folder, but there is none with a config.json.
    """
    if name == EMBEDDED:
        from trainer.mini import CHECKPOINT

        return str(CHECKPOINT)
    try:
        path = Path(name).expanduser()
        exists, is_folder = path.exists(), path.is_dir()
        has_config = is_folder and (path / "config.json").is_file()
    except (RuntimeError, OSError, ValueError) as error:  # an unknown user's home, a name too long, a null character
        raise ModelError(f"the model folder {shown(name)} cannot be found: {_reason(error)}") from None
    if is_folder:
        if not has_config:
            raise ModelError(f"the model folder {name!r} has no config.json, so it is not a Transformers checkpoint")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1 or exists:
        raise ModelError(f"the model folder {shown(name)} does not exist")
    snapshot = hub.cached(name)
    return name if snapshot is None else str(snapshot)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def check_type(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError unless a checkpoint's config.json is an InstructBLIP's."""
    if config.get("model_type") != "instructblip":
        raise ModelError(f"the model {name!r} is a {shown(config.get('model_type'))}, but an 'instructblip' is needed")


def check(name: str) -> Found:
    """Make sure that a checkpoint has all its files: a folder, a hub id in the cache, or one that the hub knows.

    The hub is asked only for an id of which something is not in the cache.

    Raises:
        ModelError: it is missing, incomplete or of another architecture.
    """
    found = Path(locate(name))
    shapes = None
    if _is_hub_id(name) and (not found.is_dir() or any(files.problems(found))):
        found = _completed(name, found, weights=False)
        if any(files.problems(found)) and not any(files.problems(found, weights=False)):
            shapes = hub.shapes(name)
    _check_files(name, found, weights=shapes is None)
    return Found(name, found, shapes)


def fetch(name: str) -> Path:
    """The folder of a checkpoint with all its files, from which everything is loaded; missing ones are downloaded.

    Raises:
        ModelError: as `check`.
    """
    found = Path(locate(name))
    if _is_hub_id(name) and (not found.is_dir() or any(files.problems(found))):
        found = _completed(name, found, weights=True)
    _check_files(name, found)
    return found


def _is_hub_id(name: str) -> bool:
    return name != EMBEDDED and not Path(name).expanduser().is_dir()


def _completed(name: str, snapshot: Path, *, weights: bool) -> Path:
    """A snapshot that lacks files, or there is none, with those that the hub has.

    Raises:
        ModelError: the hub does not give them; the message says what is lacking.
    """
    try:
        return hub.download(name, weights=weights)
    except ModelError as error:
        if not snapshot.is_dir():
            raise
        lacking = "; ".join(files.problems(snapshot))
        raise ModelError(f"the model {name!r} in {snapshot}: {lacking}. Besides, {error}") from None


def _check_files(name: str, folder: Path, *, weights: bool = True) -> None:
    try:
        config = files.read_config(folder)
    except ModelError as error:
        raise ModelError(f"the model {name!r}: {error}") from None
    check_type(name, config)
    problems = list(files.problems(folder, weights=weights))
    if problems:
        raise ModelError(f"the model {name!r} is not complete:" + "".join(f"\n  - {each}" for each in problems))
