"""Adapters of several runs computed together: what they are run by run, and no run reaches another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.first_steps import apart, distance, first_steps
from tests.support.spoiling import spoiling
from trainer import passes, runtime
from trainer.config import TrainConfig
from trainer.loop import Pack
from trainer.model import peak, stacked
from trainer.model.base import forward
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]
RUNS: tuple[dict[str, Any], ...] = (
    {"lora_r": 2, "lora_alpha": 8, "lora_dropout": 0.3, "seed": 1},
    {"lora_r": 4, "max_grad_norm": 0.05},
    {"lora_r": 8, "weight_decay": 0.3, "lora_dropout": 0.1, "seed": 2},
)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "STACKED", ("cpu",))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, embedded: Any) -> Workbench:
    monkeypatch.setitem(runtime.DTYPES, "float32", torch.float64)
    return Workbench(embedded, "mini")


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
        {"target_modules": ("query", "key", "value", "dense", "q", "v", "wo")},
    ],
)
def test_steps_are_those_of_runs_one_by_one(
    double: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """To 1e-12 in float64; rows of the language model are not equally many, so that both ways act in one pass."""
    configs = [small(**{**fields, **more}) for fields in RUNS]
    plain = first_steps(double, configs, 3, tmp_path / "plain")
    monkeypatch.setattr(stacked, "STACKED", ("cpu",))
    used: list[str] = []
    apply = stacked.Stack.apply
    monkeypatch.setattr(stacked.Stack, "apply", lambda *a: used.append(a[4]) or apply(*a))
    together = first_steps(double, configs, 3, tmp_path / "together")
    assert used
    for one, other in zip(together, plain, strict=True):
        assert apart(one.losses, other.losses) < 1e-12 and apart(one.norms, other.norms) < 1e-12
        assert distance(one, other) < 1e-12


def test_a_lower_base(embedded: Any, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(embedded, "mini")
    configs = [small(base_dtype="bfloat16", **fields) for fields in RUNS]
    plain = first_steps(bench, configs, 2, tmp_path / "plain")
    monkeypatch.setattr(stacked, "STACKED", ("cpu",))
    for one, other in zip(first_steps(bench, configs, 2, tmp_path / "together"), plain, strict=True):
        assert apart(one.losses, other.losses) < 0.01


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize("where", ["weights", "rows"])
def test_what_is_not_finite_in_one_run_changes_no_bit_of_the_others(
    bench: Workbench, small: Small, tmp_path: Path, where: str
) -> None:
    configs = [small(**fields) for fields in RUNS]

    spoil = spoiling(slice(4, 8))  # the second run's
    ends = []
    for spoiled in (False, True):
        with Pack(bench, forward=spoil if spoiled and where == "rows" else forward) as pack:
            members = [pack.add(config, tmp_path / f"{spoiled}{i}") for i, config in enumerate(configs)]
            if spoiled and where == "weights":
                members[1].adapter.weights[3] = float("inf")
            for _ in range(2):
                list(pack.round())
            ends.append([member.adapter.weights.clone() for member in members])
            assert members[1].adapter.updates() == (0 if spoiled else 2)
    assert torch.equal(ends[0][0], ends[1][0]) and torch.equal(ends[0][2], ends[1][2])


class _Counting(TorchDispatchMode):
    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def test_a_further_run_costs_few_operations(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by run, each has six or seven in every adapted module, without dropout; together none."""
    used: set[str] = set()
    apply = stacked.Stack.apply
    monkeypatch.setattr(stacked.Stack, "apply", lambda *a: used.add(a[4]) or apply(*a))  # type: ignore[func-returns-value]
    further = []
    for kinds in ((), ("cpu",)):
        monkeypatch.setattr(stacked, "STACKED", kinds)
        numbers = []
        for k in (2, 3):
            with Pack(bench) as pack:
                for number in range(k):
                    pack.add(small(target_modules=("value",), seed=number), tmp_path / f"{kinds}-{k}-{number}")
                list(pack.round())
                with _Counting() as counting:
                    list(pack.round())
            numbers.append(counting.number)
        further.append(numbers[1] - numbers[0])
    assert used and further[0] - further[1] >= 4 * len(used)


@pytest.mark.usefixtures("on")
def test_a_stack_is_kept_while_the_runs_are_the_same(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in passes of half the runs each: to lay one out takes tenths of a second at the real size."""
    made: list[int] = []
    stack = passes.Stack
    monkeypatch.setattr(passes, "Stack", lambda adapters: made.append(len(adapters)) or stack(adapters))
    with Pack(bench) as pack:
        for number in range(4):
            pack.add(small(seed=number), tmp_path / str(number))
        list(pack.round())
        pack.passes.at_once = 2
        for _ in range(2):
            list(pack.round())
        assert made == [4, 2, 2]
        pack.remove(pack.members[0])
        assert not pack.passes._stacks


@pytest.mark.usefixtures("on")
def test_runs_that_leave_or_differ_are_not_stacked(bench: Workbench, small: Small, tmp_path: Path) -> None:
    with Pack(bench) as pack:
        first = pack.add(small(), tmp_path / "first")
        other = pack.add(small(lora_r=2), tmp_path / "other")
        list(pack.round())
        assert pack.passes._stack is not None and pack.passes._stack.adapters == (first.adapter, other.adapter)
        pack.remove(other)
        list(pack.round())
        assert pack.passes._stack is None
        pack.add(small(target_modules=("query",)), tmp_path / "third")
        list(pack.round())
        assert pack.passes._stack is None


def test_its_memory_is_told(bench: Workbench, small: Small, tmp_path: Path) -> None:
    configs = [small(lora_r=2), small(lora_r=7)]
    sizes = peak.sizes_of(configs[0].model)
    assert sizes is not None
    with Pack(bench) as pack:
        members = [pack.add(config, tmp_path / str(config.lora_r)) for config in configs]
        stack = stacked.Stack([member.adapter for member in members])
    held = [*vars(stack).values(), *vars(stack.room).values()]
    tensors = [value for value in held if isinstance(value, torch.Tensor)]
    told = peak.estimate(sizes, configs, peak.TYPICAL, weights=0).adapters
    told -= peak.estimate(sizes, configs, peak.TYPICAL, weights=0, on_cpu=True).adapters
    assert told == pytest.approx(sum(tensor.nbytes for tensor in tensors), rel=0.01)
