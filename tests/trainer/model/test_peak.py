"""The estimate of a step's memory and arithmetic against what autograd keeps and PyTorch counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.bare import ready_batches
from tests.benchmarks.xl import QFORMER, TEXT, VISION
from tests.support.tiny import QUERIES, tiny_batch, tiny_model
from trainer.common import nvidia
from trainer.config import TrainConfig
from trainer.model import arithmetic, peak
from trainer.model.base import forward, load_base
from trainer.model.batch import Batch
from trainer.model.forward import layers_again
from trainer.model.fused import fuse
from trainer.model.lora import Adapter, Hooks, Segment
from trainer.model.peak import Lengths, Sizes
from trainer.runtime import DTYPES
from trainer.workbench import Workbench

XL = Sizes.of({"vision_config": VISION, "qformer_config": QFORMER, "text_config": TEXT, "num_query_tokens": 32})


@pytest.fixture(scope="module")
def batches(bench: Workbench) -> list[Batch]:
    """Three batches of four with the vision outputs that the embedded model has for them."""
    return ready_batches(bench, TrainConfig(max_samples=32, lora_dropout=0.0))[:3]


def lengths_of(batches: list[Batch]) -> Lengths:
    samples = sum(len(batch) for batch in batches)
    masks = [sum(int(getattr(b, name).sum()) for b in batches) / samples for name in ("qformer_mask", "text_mask")]
    return Lengths(*masks, sum(b.num_tokens() for b in batches) / samples)


def kept(model: Any, config: TrainConfig, batch: Batch) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, the model's own left out."""
    adapter, hooks = Adapter(model, config), Hooks(model)
    hooks.cover(adapter.modules)
    hooks.segments, hooks.training = [Segment(adapter, 0, len(batch), 0, batch.num_tokens())], True
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    found: dict[int, int] = {}
    held = []  # freed memory would be used, and counted, twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    again = config.gradient_checkpointing == "always"
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), layers_again(again):
        forward(model, batch)
    hooks.remove()
    return sum(found.values())


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"lora_dropout": 0.1},
        {"target_modules": ("query", "value")},
        {"gradient_checkpointing": "always"},
        {"base_dtype": "bfloat16", "lora_dropout": 0.1},
    ],
    ids=str,
)
def test_what_a_step_keeps_is_told_within_fifteen_percent(fields: dict[str, Any], batches: list[Batch]) -> None:
    config = TrainConfig.parse({"lora_dropout": 0.0, **fields})
    dtype = DTYPES[config.dtype_of_base]
    model = load_base("mini", dtype=dtype, device=torch.device("cpu")).model
    sizes = Sizes.of(model.config.to_dict())
    assert sizes is not None
    for batch in batches:
        assert batch.image_embeds is not None
        batch.image_embeds = batch.image_embeds.to(dtype)
    told = peak.estimate(sizes, [config], lengths_of(batches), weights=0, on_cpu=True)
    found = sum(kept(model, config, batch) for batch in batches) / len(batches)
    assert told.kept == pytest.approx(found, rel=0.15)
    assert peak.adapter_weights(sizes, config) == len(Adapter(model, config))


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_what_a_tiny_step_computes(kind: str) -> None:
    """Against PyTorch's count, which has the adapters' own products too."""
    model, batch = tiny_model(kind), tiny_batch(kind, size=8)
    sizes = Sizes.of(model.config.to_dict())
    assert sizes is not None and sizes.queries == QUERIES
    fuse(model)
    adapter, hooks = Adapter(model, TrainConfig(lora_r=1, lora_dropout=0.0)), Hooks(model)
    hooks.cover(adapter.modules)
    hooks.segments, hooks.training = [Segment(adapter, 0, len(batch), 0, batch.num_tokens())], True
    with FlopCounterMode(display=False) as counter:
        forward(model, batch).loss_sum.backward()
    asked = batch.text_mask.sum() - (batch.num_tokens() if kind == "llama" else 0)
    lengths = Lengths(float(batch.qformer_mask.sum()) / 8, float(asked) / 8, batch.num_tokens() / 8)
    told = 8 * arithmetic.step_flops(sizes, lengths, vision_kept=False)
    assert told == pytest.approx(counter.get_total_flops(), rel=0.25)  # such a model is half attention and edges


def test_the_real_size_is_that_of_the_notes() -> None:
    assert XL is not None
    assert arithmetic.step_flops(XL, peak.TYPICAL) / 1e12 == pytest.approx(0.80, rel=0.02)
    assert arithmetic.step_flops(XL, peak.TYPICAL, vision_kept=False) / 1e12 == pytest.approx(1.32, rel=0.02)
    card = arithmetic.card_of("NVIDIA H100 80GB HBM3")
    assert card is not None and card.of(TrainConfig()) == 67
    assert card.of(TrainConfig(base_dtype="bfloat16")) == 989
    assert card.of(TrainConfig(matmul_precision="high")) == 495


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX A6000", "A6000"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA T4G", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Quadro 2", None),
    ],
)
def test_a_card_is_known_by_whole_words_of_its_name(name: str, card: str | None) -> None:
    found = arithmetic.card_of(name)
    assert (found and found.name) == card


def test_packs_and_batches_take_more_and_recomputing_less() -> None:
    assert XL is not None

    def total(number: int = 1, **fields: Any) -> int:
        config = TrainConfig.parse(fields)
        return peak.estimate(XL, [config] * number, peak.TYPICAL, weights=0).total

    assert total(8) > 7 * total() and total(batch_size=8) > 1.9 * total(batch_size=4)
    assert total(gradient_checkpointing="always") < 0.3 * total()
    assert total(batch_size=8, micro_batch_size=4) < 1.1 * total(batch_size=4)
    # The logits, too: with those of the whole batch it was 2.67 GiB instead of 0.64.
    assert total(batch_size=64, micro_batch_size=1) == total(batch_size=1)
    stored = peak.estimate(XL, [TrainConfig()], peak.TYPICAL, weights=0, stored=1000)
    assert stored.store == 1000 * 257 * 1408 * 4
    assert "vision store 1.3 GiB" in str(stored)


def test_a_model_of_another_kind_is_not_guessed_at(tmp_path: Any) -> None:
    assert Sizes.of({"vision_config": VISION, "qformer_config": QFORMER, "text_config": {"model_type": "opt"}}) is None
    (tmp_path / "config.json").write_text("{}")
    assert peak.sizes_of(str(tmp_path)) is None and peak.sizes_of("nobody/nothing") is None


def test_what_nvidia_smi_says() -> None:
    (gpu,) = nvidia.parse("0, NVIDIA H100 80GB HBM3, 580.159.03, 81559, 1024, 37, [N/A], 700.00, GPU-1\n")
    assert (gpu.name, gpu.driver, gpu.memory_mib, gpu.utilization) == (
        "NVIDIA H100 80GB HBM3",
        "580.159.03",
        81559,
        37,
    )
    assert gpu.power_w is None
    assert nvidia.parse("NVIDIA-SMI has failed\n") == []
