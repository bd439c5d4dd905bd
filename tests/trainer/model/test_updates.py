"""The updates of a pack's runs, made together: the bits of clipping and PyTorch's AdamW of each run by itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny import tiny_model
from trainer.config import TrainConfig
from trainer.model import updates
from trainer.model.lora import Adapter

SETTINGS: list[dict[str, Any]] = [
    {"lora_r": 2, "weight_decay": 0.0, "max_grad_norm": 0.5},
    {"lora_r": 5, "weight_decay": 0.1, "max_grad_norm": 100.0},
    {"lora_r": 3, "weight_decay": 0.01, "adam_epsilon": 1e-6, "max_grad_norm": 2.0},
]
BAD = {(1, 0), (3, 2), (4, 2)}
"""(round, run) whose loss is not finite."""


def _runs(dtype: str = "float32") -> list[Adapter]:
    model = tiny_model("t5")
    if dtype != "float32":
        model = model.to(getattr(torch, dtype))
    return [Adapter(model, TrainConfig.parse({**fields, "seed": i})) for i, fields in enumerate(SETTINGS)]


def _make_gradients(adapters: list[Adapter], seed: int) -> None:
    for number, adapter in enumerate(adapters):
        generator = torch.Generator().manual_seed(100 * seed + number)
        adapter.grads.copy_(torch.randn(len(adapter), generator=generator) / 10)


def _figures(adapters: list[Adapter], number: int) -> torch.Tensor:
    losses = [float("nan") if (number, run) in BAD else 1.0 for run in range(len(adapters))]
    rows = [torch.stack([n.new_tensor(loss), n, n]) for loss, n in zip(losses, updates.norms(adapters), strict=True)]
    return torch.stack(rows).float() if rows[0].dtype == torch.float16 else torch.stack(rows)


def _same(one: torch.Tensor, other: torch.Tensor) -> None:
    """To the last bit; in float16, AdamW's weights become NaN, as the hand-run log has it."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_each_run_gets_the_bits_of_its_own_adamw(dtype: str) -> None:
    ours, alone = _runs(dtype), _runs(dtype)
    optimizers = [
        torch.optim.AdamW(
            [a.parameter], lr=1, weight_decay=a.config.weight_decay, eps=a.config.adam_epsilon, fused=a.fused
        )
        for a in alone
    ]
    for number in range(6):
        rates = [1e-3 * (run + 1) / (number + 1) for run in range(3)]
        _make_gradients(ours, number)
        _make_gradients(alone, number)
        updates.update(ours, rates, _figures(ours, number))
        for run, (adapter, optimizer) in enumerate(zip(alone, optimizers, strict=True)):
            if (number, run) in BAD:
                continue
            if dtype != "float16":  # its norm is rounded by PyTorch's own clipping, and here it is not
                torch.nn.utils.clip_grad_norm_([adapter.parameter], adapter.config.max_grad_norm)
            else:
                adapter.grads.mul_((adapter.config.max_grad_norm / (adapter.grads.norm().float() + 1e-6)).clamp(max=1))
            optimizer.param_groups[0]["lr"] = rates[run]
            optimizer.step()
        for run, (one, other) in enumerate(zip(ours, alone, strict=True)):
            assert torch.equal(one.grads, other.grads), "a bad step's gradients stay as they are"
            _same(one.weights, other.weights)
            state = optimizers[run].state[other.parameter]
            for name, value in one.optimizer.state[one.parameter].items():
                _same(value, state[name].to(value))
    assert [adapter.updates() for adapter in ours] == [5, 6, 4]


def test_it_goes_on_from_a_checkpoint_and_beside_others() -> None:
    """Moments and counts come from `restore_optimizer`; a run that has just begun counts from one."""
    ours = _runs()
    for number in range(3):
        _make_gradients(ours, number)
        updates.update(ours, [1e-3] * 3, _figures(ours, 9))
    again = _runs()[:2]
    for one, other in zip(ours, again, strict=False):
        other.weights.copy_(one.weights)
        other.restore_optimizer(copy.deepcopy(one.optimizer_tensors()))
    fresh = _runs()[2]
    _make_gradients([*ours[:2], fresh], 7)
    updates.update(ours[:2], [1e-3] * 2, _figures(ours[:2], 9))
    _make_gradients([*again, fresh], 7)
    updates.update([*again, fresh], [1e-3] * 3, _figures([*again, fresh], 9))
    for one, other in zip(ours, again, strict=False):
        assert torch.equal(one.weights, other.weights) and one.updates() == other.updates() == 4
    assert fresh.updates() == 1


class _Counting(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_further_run_costs_two_operations() -> None:
    adapters = _runs()
    numbers = []
    for k in (1, 3):
        _make_gradients(adapters, 0)
        figures = _figures(adapters, 9)[:k]
        updates.update(adapters[:k], [1e-3] * k, figures)
        with _Counting() as counting:
            updates.update(adapters[:k], [1e-3] * k, figures)
        numbers.append(counting.number)
    assert numbers[1] - numbers[0] == 4
