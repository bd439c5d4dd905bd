"""The hub's cache is read as folders: offline, without a network, made by `hf download` or by hand, all the same."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from tests.support import checkpoints
from trainer.common.errors import ModelError
from trainer.model import hub, locate, memory
from trainer.model.base import load_base

NAME = "someone/instructblip-tiny"
CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a hub that must not be asked."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    return tmp_path / "hub"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("ref", [True, False], ids=["hf download", "by hand"])
def test_a_cached_id_is_its_folder_and_nobody_is_asked(cache: Path, tmp_path: Path, ref: bool) -> None:
    checkpoint = checkpoints.write(tmp_path / "c", "llama-gqa", shards=2)
    snapshot = checkpoints.in_cache(checkpoint, cache, NAME, ref=ref)
    began = time.monotonic()
    assert locate.locate(NAME) == str(snapshot)
    assert locate.check(NAME) == locate.Found(NAME, snapshot, None)
    base = load_base(NAME, **CPU)
    assert time.monotonic() - began < 20
    assert base.name == NAME and base.fingerprint == load_base(str(checkpoint), **CPU).fingerprint
    # The Q-Former has its own tokenizer, which marks a text with [CLS] and [SEP].
    ids = base.processor.qformer_tokenizer("a field")["input_ids"]
    assert base.processor.qformer_tokenizer.convert_ids_to_tokens(ids)[:: len(ids) - 1] == ["[CLS]", "[SEP]"]
    assert memory.needed(NAME, "float32") is not None


def test_the_commit_that_main_names_is_taken(cache: Path, tmp_path: Path) -> None:
    snapshot = checkpoints.in_cache(checkpoints.write(tmp_path / "c"), cache, NAME)
    newer = snapshot.parent / ("f" * 40)
    newer.mkdir()
    (newer / "config.json").write_text("{}")
    assert hub.cached(NAME) == snapshot
    (cache / "models--someone--instructblip-tiny" / "refs" / "main").unlink()
    assert hub.cached(NAME) == newer
    assert hub.cached("someone/else") is None


@pytest.mark.usefixtures("offline")
def test_offline_what_is_missing_is_said_at_once(cache: Path, tmp_path: Path) -> None:
    for ask in (locate.check, lambda name: load_base(name, **CPU)):
        with pytest.raises(
            ModelError, match=r"not complete in the local .* cache .*HF_HUB_OFFLINE.*hf download someone"
        ):
            ask(NAME)
    snapshot = checkpoints.in_cache(checkpoints.write(tmp_path / "c"), cache, NAME)
    for file in (snapshot / "qformer_tokenizer").iterdir():
        file.unlink()
    for ask in (locate.check, lambda name: load_base(name, **CPU)):
        with pytest.raises(ModelError, match=r"no tokenizer for the Q-Former.*HF_HUB_OFFLINE"):
            ask(NAME)


def test_without_a_network_the_hub_is_tried_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails(*_: object, **__: object) -> None:
        tries.append(1)
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fails)
    with pytest.raises(ModelError, match="the hub cannot be reached; where there is a network: hf download"):
        locate.check(NAME)
    assert len(tries) == 1


def test_what_is_not_in_the_cache_is_downloaded(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes what is small, and the shapes of the tensors; loading takes the weights too."""
    source = checkpoints.write(tmp_path / "c", "llama")
    asked: list[list[str]] = []

    def download(name: str, *, allow_patterns: list[str], **_: object) -> str:
        asked.append(allow_patterns)
        folder = hub.cached(name) or checkpoints.in_cache(source, cache, name)
        if hub.WEIGHTS not in allow_patterns:
            (folder / "model.safetensors").unlink()
        elif not (folder / "model.safetensors").exists():
            (folder / "model.safetensors").symlink_to(source / "model.safetensors")
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "shapes", lambda name: {"query_tokens": (1, 12, 32)})
    found = locate.check(NAME)
    assert found.shapes == {"query_tokens": (1, 12, 32)} and asked == [list(hub.SMALL)]
    assert load_base(NAME, **CPU).fingerprint == load_base(str(source), **CPU).fingerprint
    assert asked[1:] == [[*hub.SMALL, hub.WEIGHTS]]
