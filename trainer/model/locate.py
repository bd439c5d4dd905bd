"""Finding a checkpoint without loading it, and without torch, so that a missing one is reported at once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.common.errors import ModelError, shown
from trainer.config import EMBEDDED


def locate(name: str) -> str:
    """The checkpoint's folder or hub id.

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
    return name


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def check_type(name: str, config: Mapping[str, Any]) -> None:
    """Raise ModelError unless a checkpoint's config.json is an InstructBLIP's."""
    if config.get("model_type") != "instructblip":
        raise ModelError(f"the model {name!r} is a {shown(config.get('model_type'))}, but an 'instructblip' is needed")


def check(name: str) -> None:
    """Make sure that a checkpoint exists: a folder, a hub id in the local cache, or one that the hub knows.

    The hub is asked only for an id that is not in the cache.

    Raises:
        ModelError: it is missing or of another architecture.
    """
    path = Path(locate(name))
    config_file: str | None = str(path / "config.json")
    if not path.is_dir():
        from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

        try:
            cached = try_to_load_from_cache(name, "config.json")
        except HFValidationError:
            raise ModelError(
                f"the model {shown(name)} does not exist: it is not a folder, and not a valid hub id"
            ) from None
        config_file = cached if isinstance(cached, str) else None
        if config_file is None:
            try:
                HfApi().model_info(name, timeout=10)  # one try; hf_hub_download would make six, over half a minute
                config_file = hf_hub_download(name, "config.json")
            except HfHubHTTPError as error:
                raise ModelError(
                    f"the hub does not provide the model {name!r}: {str(error).splitlines()[0]}"
                ) from None
            except (HTTPError, OSError):  # the HTTP library's own errors, whichever library this version uses
                raise ModelError(
                    f"the model {name!r} is not a folder, it is not in the local Hugging Face cache, "
                    "and the hub cannot be reached"
                ) from None
    assert config_file is not None
    try:
        config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"the model {name!r}: its config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise ModelError(f"the model {name!r}: its config.json is not an object")
    check_type(name, config)
