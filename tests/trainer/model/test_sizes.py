"""Passes of any size are the library's: one sample, odd last batches, tails of one, packs of one to four runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import checkpoints, peft_reference
from tests.support.tiny import tiny_batch, tiny_model
from tests.trainer.model.test_base import library_forward
from tests.trainer.test_pack import alone_with_peft
from trainer import runtime
from trainer.config import TrainConfig
from trainer.events import EpochEnded, StepEnded
from trainer.loop import Pack, train
from trainer.model.base import forward
from trainer.model.batch import Batch, merge
from trainer.model.fused import fuse
from trainer.model.lora import Adapter, Hooks, Segment
from trainer.workbench import Workbench

KINDS = ("t5", "llama", "llama-gqa")
TARGETS = {"t5": ("query", "value", "q", "wo")}
LLAMA_TARGETS = ("query", "value", "k_proj", "down_proj")


def doubled(kind: str, size: int, seed: int) -> Batch:
    batch = tiny_batch(kind.partition("-")[0], size, seed)
    assert batch.pixel_values is not None
    return replace(batch, pixel_values=batch.pixel_values.double())


def pack_of(model: Any, configs: Sequence[TrainConfig], batches: Sequence[Batch]) -> list[tuple[Any, Adapter]]:
    """(loss sum, adapter with its gradients) of each run, all in one pass."""
    torch.manual_seed(1)
    adapters, hooks = [Adapter(model, config) for config in configs], Hooks(model)
    start = token = 0
    segments = []
    for adapter, batch in zip(adapters, batches, strict=True):
        adapter.weights.normal_(std=0.2)
        hooks.cover(adapter.modules)
        ends = start + len(batch), token + batch.num_tokens()
        segments.append(Segment(adapter, start, ends[0], token, ends[1]))
        start, token = ends
    hooks.segments = segments
    try:
        losses = forward(model, merge(batches)).token_losses
        sums = [losses[s.first_token : s.last_token].sum() for s in segments]
        torch.autograd.backward(sums)
    finally:
        hooks.remove()
    return list(zip(sums, adapters, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 1), (2, 1, 1), (1, 3, 1, 2)])
def test_a_pass_of_any_size_equals_the_library_with_peft(kind: str, sizes: tuple[int, ...]) -> None:
    """Every run of a pack, however many samples it has: loss and gradients as alone, by code that is not ours."""
    model = tiny_model(kind, torch.float64)
    targets = TARGETS.get(kind, LLAMA_TARGETS)
    configs = [TrainConfig(target_modules=targets, lora_r=2 + i, lora_dropout=0.0) for i in range(len(sizes))]
    batches = [doubled(kind, size, i) for i, size in enumerate(sizes)]
    theirs = tiny_model(kind, torch.float64)
    fuse(model)
    for (loss, adapter), config, batch in zip(pack_of(model, configs, batches), configs, batches, strict=True):
        with peft_reference.attached(theirs, config) as (peft_model, _):
            parameters, found = peft_reference.parameters(peft_model), adapter.named()
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(found[name].weight)
            expected = library_forward(theirs, batch, kind.partition("-")[0]).loss * batch.num_tokens()
            expected.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # the library's loss of a Llama is in float32
        for name, parameter in parameters.items():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            torch.testing.assert_close(found[name].grad, grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5-untied", "llama", "llama-gqa"])
@pytest.mark.parametrize(
    "fields",
    [
        {"batch_size": 1},
        {"batch_size": 2, "micro_batch_size": 1},
        {"batch_size": 3},  # 7 training rows: the last batch has one
    ],
    ids=["ones", "micro-ones", "odd-last"],
)
def test_training_with_passes_of_one_sample(
    kind: str, fields: dict[str, int], embedded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pack of one and of two, with evaluation tails of one, against PEFT, AdamW and a plain loop."""
    monkeypatch.setitem(runtime.DTYPES, "float32", torch.float64)
    bench = Workbench(embedded, "mini")
    checkpoint = checkpoints.write(tmp_path / "checkpoint", kind)
    config = TrainConfig.parse(
        {
            "model": str(checkpoint),
            "max_samples": 10,
            "num_epochs": 1,
            "eval_batch_size": 2,
            "lora_dropout": 0.0,
            "lora_r": 3,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "device": "cpu",
            "val_fraction": 0.3,
            **fields,
        }
    )
    train_set, val_set = bench.datasets(config)
    assert len(train_set) % 3 == 1 and len(val_set) % 2 == 1
    expected = alone_with_peft(bench, config)
    evaluated: dict[int, set[float]] = {}
    for runs in (1, 2):
        with Pack(bench) as pack:
            for run in range(runs):
                pack.add(config, tmp_path / f"{runs}-{run}")
            events = [event for _ in iter(lambda: bool(pack.members), False) for _, event in pack.round()]
        steps = [event for event in events if isinstance(event, StepEnded)]
        assert len(steps) == runs * len(expected)
        for step in steps:
            assert (step.loss, step.grad_norm) == pytest.approx(expected[step.step - 1], rel=1e-8)
        evaluated[runs] = {event.val_loss for event in events if isinstance(event, EpochEnded)}
    # The validation loss of two rows and a tail of one is that of all three in one pass, whatever runs beside.
    whole = [
        e.val_loss
        for e in train(config.model_copy(update={"eval_batch_size": 16}), bench, tmp_path / "whole")
        if isinstance(e, EpochEnded)
    ]
    for losses in evaluated.values():
        assert list(losses) == pytest.approx(whole * len(losses), rel=1e-8)
