"""Checkpoints in the Hugging Face hub's cache, found without asking the hub; it is asked only for what is not there.

The cache is a folder for each repository (https://huggingface.co/docs/huggingface_hub/guides/manage-cache):

    models--ORG--NAME/refs/main              the commit that `main` meant when it was last asked for
    models--ORG--NAME/snapshots/COMMIT/...   its files, or links to them

Read as folders, a cache made by `hf download`, by an earlier run or by hand is the same, with a network and without:
Transformers asks the hub about each file of a hub id, and tries for minutes where there is no network.
"""

from __future__ import annotations

from pathlib import Path

from trainer.common.errors import ModelError, shown

SMALL = ("*.json", "*.txt", "*.model", "qformer_tokenizer/*")
"""Patterns of a checkpoint's files without its weights: config, processor, tokenizers, index of the shards."""
WEIGHTS = "*.safetensors"
TIMEOUT_S = 10
"""Seconds that the hub has to answer, once: huggingface_hub by itself makes six tries."""
LIMIT = 96
"""Most characters of a hub id: huggingface_hub's rule."""

Shapes = dict[str, tuple[int, ...]]
"""A tensor's shape by its name."""


def cached(name: str) -> Path | None:
    """The snapshot of a hub id in the cache, if there is one with a config.json.

    It is the one that `refs/main` names. Where that is missing, as in a cache made by hand, it is the newest.
    """
    from huggingface_hub import constants

    repository = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    snapshots = repository / "snapshots"
    try:
        commit = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = ""
    if commit and (snapshots / commit / "config.json").is_file():
        return snapshots / commit
    try:
        found = [each for each in snapshots.iterdir() if (each / "config.json").is_file()]
    except OSError:
        return None
    return max(found, key=lambda each: (each.stat().st_mtime, each.name), default=None)


def download(name: str, *, weights: bool) -> Path:
    """Get a hub id's files, or those without its weights, into the cache; returns their folder.

    Raises:
        ModelError: the hub does not have it or cannot be reached, or is not to be asked (HF_HUB_OFFLINE).
    """
    from huggingface_hub import HfApi, constants, is_offline_mode, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]

    where = f"the local Hugging Face cache ({constants.HF_HUB_CACHE})"
    remedy = f"where there is a network: hf download {name}"
    if is_offline_mode():
        raise ModelError(
            f"the model {name!r} is not a folder, it is not complete in {where}, and HF_HUB_OFFLINE or "
            f"TRANSFORMERS_OFFLINE says not to ask the hub; {remedy}"
        )
    patterns = [*SMALL, WEIGHTS] if weights else list(SMALL)
    try:
        HfApi().model_info(name, timeout=TIMEOUT_S)
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=TIMEOUT_S))
    except HFValidationError:
        raise ModelError(
            f"the model {shown(name)} does not exist: it is not a folder, and not a valid hub id"
        ) from None
    except HfHubHTTPError as error:
        raise ModelError(f"the hub does not provide the model {name!r}: {str(error).splitlines()[0]}") from None
    except (HTTPError, OSError):  # the HTTP library's own errors, whichever library this version uses
        raise ModelError(
            f"the model {name!r} is not a folder, it is not complete in {where}, "
            f"and the hub cannot be reached; {remedy}"
        ) from None


def shapes(name: str) -> Shapes:
    """The shapes of all tensors of a hub id, from the headers of its files on the hub.

    Raises:
        ModelError: it has no safetensors, or the hub does not answer.
    """
    from huggingface_hub import HfApi

    try:
        files = HfApi().get_safetensors_metadata(name, timeout=TIMEOUT_S).files_metadata.values()
    except Exception as error:  # noqa: BLE001 - HTTP errors of two libraries, and three of its own for what is no file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"the model {name!r}: the hub does not show its safetensors: {reason}") from None
    return {tensor: tuple(info.shape) for file in files for tensor, info in file.tensors.items()}
