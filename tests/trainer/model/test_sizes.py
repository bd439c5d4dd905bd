"""Passes of any size are the library's: one sample, odd last batches, tails of one, packs of one to four runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support import checkpoints, peft_reference
from tests.support.tiny import tiny_batch, tiny_model
from tests.trainer.model.test_base import library_forward
from tests.trainer.model.test_forms import old_config
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
FEW = settings(derandomize=True, deadline=None, database=None)
"""The same examples each time: every one trains."""
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
@settings(FEW, max_examples=3)
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
@example(sizes=[1])
@example(sizes=[1, 3, 1, 2])
def test_a_pass_of_any_size_equals_the_library_with_peft(kind: str, sizes: list[int]) -> None:
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


# test_forms.py has that those with old config files train bit for bit as the others.
OLD = [pytest.param(f"old {kind}", marks=pytest.mark.slow) for kind in ("t5-untied", "llama")]


@pytest.fixture(scope="module", params=["t5-untied", "llama", "llama-gqa", *OLD])
def form(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Workbench, str]]:
    """(a workbench in float64, a checkpoint of this form); `old` ones have the config files of 2023."""
    folder = tmp_path_factory.mktemp("form")
    checkpoints.write(folder, request.param.removeprefix("old "))
    if request.param.startswith("old "):
        old_config(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(runtime.DTYPES, "float32", torch.float64)
        yield Workbench(), str(folder)


@settings(FEW, max_examples=2)
@given(
    batch=st.integers(1, 4),
    micro=st.integers(1, 4),
    tail=st.integers(1, 3),
    together=st.integers(1, 2),
    rows=st.integers(8, 11),
    runs=st.integers(1, 4),
)
@example(batch=1, micro=1, tail=2, together=1, rows=10, runs=1)
@example(batch=3, micro=1, tail=2, together=1, rows=10, runs=2)  # 7 rows train, so the last batch has one; 3 validate
def test_training_of_any_size_equals_peft_and_adamw(
    form: tuple[Workbench, str], batch: int, micro: int, tail: int, together: int, rows: int, runs: int
) -> None:
    """A pack of up to four, cut into micro-batches, against PEFT, AdamW and a plain loop; any evaluation batches."""
    bench, checkpoint = form
    config = TrainConfig.parse(
        {
            "model": checkpoint,
            "max_samples": rows,
            "num_epochs": 1,
            "batch_size": batch,
            "micro_batch_size": min(micro, batch),
            "gradient_accumulation_steps": together,
            "eval_batch_size": tail,
            "lora_dropout": 0.0,
            "lora_r": 3,
            "learning_rate": 1e-2,
            "warmup_steps": 1,
            "device": "cpu",
            "val_fraction": 0.3,
        }
    )
    expected = alone_with_peft(bench, config)
    with tempfile.TemporaryDirectory() as folder:
        with Pack(bench) as pack:
            for run in range(runs):
                pack.add(config, Path(folder) / str(run))
            events = [event for _ in iter(lambda: bool(pack.members), False) for _, event in pack.round()]
        # The validation loss is that of all rows in one pass, whatever runs beside.
        alone = train(config.model_copy(update={"eval_batch_size": 16}), bench, Path(folder) / "whole")
        whole = [event.val_loss for event in alone if isinstance(event, EpochEnded)]
    steps = [event for event in events if isinstance(event, StepEnded)]
    assert len(steps) == runs * len(expected)
    for step in steps:
        assert (step.loss, step.grad_norm) == pytest.approx(expected[step.step - 1], rel=1e-8)
    losses = [event.val_loss for event in events if isinstance(event, EpochEnded)]
    assert losses == pytest.approx(whole * runs, rel=1e-8)
