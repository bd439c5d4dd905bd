"""InstructBLIPs in the forms in which they lie on the hub: shards, float16, configs of older versions, Vicuna."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import checkpoints
from tests.support.checkpoints import edit_json
from tests.support.near_probe import NearProbe
from trainer.config import TrainConfig
from trainer.events import EpochEnded
from trainer.loop import train
from trainer.model import locate
from trainer.model.base import load_base
from trainer.model.probe import Question
from trainer.workbench import Workbench

CPU: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}


def old_config(folder: Path) -> None:
    """As config.json and the processor's file were in 2023."""

    def change(config: dict[str, Any]) -> None:
        for name in ("image_token_index", "dtype", "transformers_version"):
            config.pop(name, None)
        config["torch_dtype"] = "float32"

    edit_json(folder / "config.json", change)
    edit_json(folder / "processor_config.json", lambda config: config.pop("num_query_tokens"))
    edit_json(folder / "processor_config.json", lambda config: config.pop("processor_class"))


def with_pad_token(folder: Path) -> None:
    """As Vicuna's: a pad token behind the vocabulary, and an embedding for it."""

    def add(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: torch.cat([v, v[:1]]) if len(v) == checkpoints.VOCABULARY else v for k, v in tensors.items()}

    checkpoints.edit_weights(folder, add)
    size = checkpoints.VOCABULARY + 1
    edit_json(folder / "config.json", lambda config: config["text_config"].update(vocab_size=size))
    edit_json(folder / "config.json", lambda config: config["text_config"].update(pad_token_id=size - 1))


@pytest.mark.parametrize("kind", checkpoints.KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_float16_files_in_float32_and_in_shards(kind: str, shards: int, tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c", kind, dtype=torch.float16, shards=shards)
    whole = checkpoints.write(tmp_path / "whole", kind)
    found, expected = (load_base(str(each), **CPU).model.state_dict() for each in (folder, whole))
    assert {value.dtype for value in found.values() if value.is_floating_point()} == {torch.float32}
    assert all(torch.equal(found[name], value.half().float()) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["t5-untied", "llama", "llama-gqa"])
@pytest.mark.parametrize("change", [old_config, with_pad_token], ids=lambda each: each.__name__)
def test_older_forms_train_as_the_others(
    kind: str, change: Callable[[Path], None], embedded: Any, tmp_path: Path
) -> None:
    losses = []
    for name in ("plain", "changed"):
        folder = checkpoints.write(tmp_path / name, kind)
        if name == "changed":
            change(folder)
            with NearProbe([Question(locate.check(str(folder)), (("query",),))]) as probe:
                assert probe.answer() == []
        fields = {"model": str(folder), "max_samples": 8, "num_epochs": 1, "batch_size": 3, "device": "cpu"}
        config = TrainConfig.parse({**fields, "lora_dropout": 0.0})
        events = train(config, Workbench(embedded, "mini"), tmp_path / f"{name}-out")
        losses.append([event.val_loss for event in events if isinstance(event, EpochEnded)])
    # A pad token's embedding takes a share of the softmax; nothing else may differ.
    assert losses[1] == pytest.approx(losses[0], rel=0 if change is old_config else 0.02)


def test_a_config_without_a_number_of_query_tokens_has_32(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "c")
    edit_json(folder / "config.json", lambda config: config.pop("num_query_tokens"))
    edit_json(folder / "processor_config.json", lambda config: config.pop("num_query_tokens"))

    def more(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**tensors, "query_tokens": torch.randn(1, 32, 32)}

    assert load_base(str(checkpoints.edit_weights(folder, more)), **CPU).num_query_tokens == 32
