"""A base's need of memory, read from its files; one that does not fit is refused; one is spread by Accelerate."""

from __future__ import annotations

import json
import logging
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import QUERIES, tiny_batch, tiny_model
from trainer import runtime
from trainer.common.errors import ModelError
from trainer.events import StepEnded
from trainer.loop import train
from trainer.model import memory
from trainer.model.base import forward, load_base
from trainer.model.lora import Adapter
from trainer.model.memory import needed, shown
from trainer.workbench import Workbench

XL = 4_022_000_000
"""Parameters of InstructBLIP-FlanT5-XL: 986 million in ViT-g, 188 in the Q-Former, 2,850 in T5-XL."""


@pytest.fixture
def xl(tmp_path: Path) -> Path:
    """A checkpoint of that size, its weights a hole in the file."""
    text = {"d_model": 2048, "d_ff": 5120, "num_layers": 24}
    config = {"model_type": "instructblip", "num_query_tokens": 32, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensor = {"dtype": "F32", "shape": [XL // 1000, 1000], "data_offsets": [0, 4 * XL]}
    header = json.dumps({"weight": tensor}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 4 * XL)
    return tmp_path


def test_weights_are_those_that_are_loaded(tiny_checkpoint: Path) -> None:
    base = load_base(str(tiny_checkpoint), dtype=torch.bfloat16, device=torch.device("cpu"))
    loaded = sum(p.numel() for p in base.model.parameters())
    assert needed(str(tiny_checkpoint), "bfloat16").weights == 2 * loaded  # type: ignore[union-attr]
    assert needed(str(tiny_checkpoint), "float32").weights == 4 * loaded  # type: ignore[union-attr]


def test_the_real_size_is_told_from_its_header(xl: Path) -> None:
    began = time.monotonic()
    need = needed(str(xl), "float32")
    assert need is not None and time.monotonic() - began < 5
    assert need.weights == 4 * XL and shown(need.weights) == "15.0 GiB"
    assert need.activations == 4 * (32 + memory.TOKENS) * 24 * (5 * 2048 + 2 * 5120)


def test_a_model_that_is_not_here_yet_is_left_to_the_loader(tmp_path: Path) -> None:
    assert needed("nobody/nothing-of-that-name", "float32") is None
    (tmp_path / "config.json").write_text("{}")
    assert needed(str(tmp_path), "float32") is None
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ModelError, match="its files cannot be read"):
        needed(str(tmp_path), "float32")


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_step_keeps_no_less_than_is_told(kind: str, small: Callable[..., Any], monkeypatch: Any) -> None:
    model = tiny_model(kind)
    adapter = Adapter(model, small())
    batch = tiny_batch(kind, size=1)
    monkeypatch.setattr(memory, "TOKENS", batch.text_ids.shape[1])
    kept: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    from trainer.model.lora import Hooks, Segment

    hooks = Hooks(model)
    hooks.cover(adapter.modules)
    hooks.segments, hooks.training = (Segment(adapter, 0, 1, 0, batch.num_tokens()),), True
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = forward(model, batch)  # held: freed memory would be used, and counted, twice
    config = {"num_query_tokens": QUERIES, "text_config": model.config.text_config.to_dict()}
    assert held.token_losses.requires_grad
    assert 0 < 4 * memory._kept(config) <= sum(kept.values())


@pytest.mark.parametrize("fields", [{}, {"device_map": "auto"}])
def test_a_base_that_does_not_fit_is_refused_before_it_is_loaded(
    fields: dict[str, Any], xl: Path, small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "free_memory", lambda device: 12 * 2**30)
    with pytest.raises(ModelError) as error:
        Workbench().base(small(model=str(xl), **fields))
    text = str(error.value)
    assert "does not fit: in float32 its weights take 15.0 GiB, a training step of one sample at least" in text
    assert "but cpu has 12.0 GiB free" in text
    assert "--set base_dtype=bfloat16, which takes 7.6 GiB" in text


def test_several_gpus_hold_more_and_are_advised(
    xl: Path, small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(runtime, "visible_devices", lambda device: gpus)
    monkeypatch.setattr(runtime, "free_memory", lambda device: 12 * 2**30)
    config = small(model=str(xl), device="cuda")
    with pytest.raises(ModelError, match=r"--set device_map=auto \(in a search with --gpus-per-worker 2\)"):
        memory.check(config, torch.device("cuda"))
    memory.check(config.model_copy(update={"device_map": "auto"}), torch.device("cuda"))
    monkeypatch.setattr(runtime, "free_memory", lambda device: 6 * 2**30)
    with pytest.raises(ModelError, match=r"cuda:0, cuda:1 has 12.0 GiB free(.|\n)*a higher --gpus-per-worker"):
        memory.check(config.model_copy(update={"device_map": "auto"}), torch.device("cuda"))


def test_what_is_needed_is_logged(
    tiny_checkpoint: Path, small: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "trainer.model.memory"):
        Workbench().base(small())
    assert f"{tiny_checkpoint} in float32: {needed(str(tiny_checkpoint), 'float32')}; cpu has" in caplog.text


def test_what_is_left_of_an_earlier_base_or_of_one_that_failed_is_released(
    small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released: list[torch.device] = []
    monkeypatch.setattr(runtime, "release_memory", released.append)
    bench = Workbench()
    assert bench.base(small()) is bench.base(small()) and not released, "nothing was there before the first"
    with pytest.raises(ModelError):
        bench.base(small(model=str(tmp_path / "gone")))
    assert len(released) == 1
    bench.base(small())
    assert len(released) == 2


def losses(config: Any, folder: Path) -> list[float]:
    """The losses of a run, by step."""
    return [event.loss for event in train(config, Workbench(), folder) if isinstance(event, StepEnded)]


def test_a_spread_base_on_one_device_trains_the_same(small: Callable[..., Any], tmp_path: Path) -> None:
    spread = losses(small(device_map="auto"), tmp_path / "spread")
    assert len(spread) > 4 and spread == losses(small(), tmp_path / "single")


@pytest.mark.filterwarnings("ignore:The following device_map keys do not match any submodules")  # query_tokens
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_accelerates_hooks_leave_losses_and_gradients_alone(kind: str, small: Callable[..., Any]) -> None:
    """Accelerate wraps every layer's forward to move tensors between devices; here each device is the CPU."""
    from accelerate import dispatch_model

    from trainer.model.lora import Hooks, Segment

    found = []
    for hooked in (False, True):
        model = tiny_model(kind)
        batch = tiny_batch(kind)
        if hooked:
            parts = dict.fromkeys(["vision_model", "query_tokens", "qformer.embeddings"], "cpu")
            parts |= {f"qformer.encoder.layer.{index}": "cpu" for index in range(2)}
            parts |= dict.fromkeys(["language_projection", "language_model"], "cpu")
            dispatch_model(model, parts, main_device="cpu", force_hooks=True)
            assert hasattr(model.qformer.encoder.layer[0], "_hf_hook")
        adapter = Adapter(model, small())
        hooks = Hooks(model)
        hooks.cover(adapter.modules)
        hooks.segments, hooks.training = (Segment(adapter, 0, len(batch), 0, batch.num_tokens()),), True
        out = forward(model, batch)
        out.loss_sum.backward()
        found.append((out.token_losses.detach(), adapter.grads))
    for plain, wrapped in zip(*found, strict=True):
        assert plain.abs().max() > 0
        assert torch.equal(plain, wrapped)


def test_adapters_on_several_devices_are_refused(small: Callable[..., Any]) -> None:
    model = tiny_model("t5")
    model.language_model.encoder.block[1].to("meta")
    Adapter(model, small())
    with pytest.raises(ModelError, match=r"2 of the \d+ adapted modules on other devices than the Q-Former's \(cpu\)"):
        Adapter(model, small(target_modules=("query", "encoder.block.1.layer.0.SelfAttention.q", "v")))
