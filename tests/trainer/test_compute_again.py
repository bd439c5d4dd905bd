"""Layers of the frozen language model that are computed again in the backward pass: the same bits in less memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.tiny import tiny_batch, tiny_model
from trainer.config import TrainConfig
from trainer.events import Event, MicroBatchReduced, StepEnded
from trainer.loop import train
from trainer.model import forward as forwards
from trainer.model.base import Forward, forward
from trainer.model.batch import Batch
from trainer.model.forward import layers_again
from trainer.model.fused import fuse
from trainer.model.lora import Adapter, Hooks, Segment
from trainer.passes import Passes
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]


def step(kind: str, again: bool, config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(losses, gradients, bytes kept for the backward pass) of one step with dropout in the adapters."""
    model, batch = tiny_model(kind), tiny_batch(kind, size=4)
    fuse(model)
    adapter = Adapter(model, config)
    adapter.weights.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    hooks = Hooks(model)
    hooks.cover(adapter.modules)
    hooks.segments, hooks.training = (Segment(adapter, 0, len(batch), 0, batch.num_tokens()),), True
    adapter.generator.manual_seed(1)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), layers_again(again):
        out = forward(model, batch)
    out.loss_sum.backward()
    return out.token_losses.detach(), adapter.grads, sum(kept.values())


@pytest.mark.parametrize("kind", ["t5", "llama", "llama-gqa"])
def test_the_same_bits_in_less_memory(kind: str, small: Small) -> None:
    config = small(lora_dropout=0.2)
    (losses, grads, kept), (others, theirs, less) = (step(kind, again, config) for again in (False, True))
    assert torch.equal(losses, others) and torch.equal(grads, theirs)
    assert grads.count_nonzero() > 0
    assert less < kept


def steps(config: TrainConfig, bench: Workbench, out: Path) -> list[Event]:
    return [event for event in train(config, bench, out) if isinstance(event, StepEnded)]


def test_a_run_is_the_same_and_keeps_its_identity(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[bool] = []
    real = forwards._layer
    monkeypatch.setattr(forwards, "_layer", lambda *a: (computed.append(forwards._again.get()), real(*a))[1])
    found = {}
    for name in ("never", "always"):
        computed.clear()
        config = small(gradient_checkpointing=name, lora_dropout=0.2)
        found[name] = steps(config, bench, tmp_path / name)
        assert any(computed) == (name == "always")
    assert found["always"] == found["never"]
    assert small(gradient_checkpointing="always").identity() == small().identity()


def test_adapters_in_the_language_model_are_computed_once(bench: Workbench, small: Small, tmp_path: Path) -> None:
    """Their dropout would be drawn a second time."""
    more: dict[str, Any] = {"target_modules": ("query", "q", "v"), "lora_dropout": 0.2}
    plain = steps(small(gradient_checkpointing="never", **more), bench, tmp_path / "plain")
    assert steps(small(gradient_checkpointing="always", **more), bench, tmp_path / "asked") == plain


class FullMemory:
    """A forward that finds no memory for training while layers keep their activations."""

    def __init__(self) -> None:
        self.passes: list[tuple[int, bool]] = []

    def __call__(self, model: Any, batch: Batch) -> Forward:
        again = forwards._again.get()
        if torch.is_grad_enabled():
            self.passes.append((len(batch), again))
            if not again:
                raise torch.OutOfMemoryError
        return forward(model, batch)


def test_a_single_sample_that_does_not_fit_is_computed_again(
    bench: Workbench, small: Small, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = steps(small(), bench, tmp_path / "plain")
    full = FullMemory()
    with caplog.at_level(logging.WARNING, "trainer.passes"):
        events = list(train(small(), bench, tmp_path / "full", forward=full))
    assert [size for size, again in full.passes if not again] == [4, 2, 1]
    assert full.passes[3:5] == [(1, True), (1, True)]
    assert [e.micro_batch_size for e in events if isinstance(e, MicroBatchReduced)] == [2, 1]
    assert "computed again in the backward pass from now on" in caplog.text
    got = [e for e in events if isinstance(e, StepEnded)]
    assert [e.loss for e in got] == pytest.approx([e.loss for e in plain if isinstance(e, StepEnded)], rel=1e-4)


def test_where_launches_are_waited_for_a_batch_stays_whole(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Passes, "_waits_for_launches", lambda self: True)
    full = FullMemory()
    events = list(train(small(), bench, tmp_path / "full", forward=full))
    assert full.passes[:2] == [(4, False), (4, True)] and all(again for _, again in full.passes[1:])
    assert [e for e in events if isinstance(e, StepEnded)] == steps(small(), bench, tmp_path / "plain")


def test_who_forbids_it_gets_smaller_batches_alone(bench: Workbench, small: Small, tmp_path: Path) -> None:
    full = FullMemory()
    events = list(train(small(gradient_checkpointing="never"), bench, tmp_path, forward=full))
    assert full.passes == [(4, False), (2, False), (1, False)]
    assert type(events[-1]).__name__ == "OutOfMemory"
