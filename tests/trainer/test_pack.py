"""Runs in one pass: each as if alone, whatever its neighbours do, whenever they come and go."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import peft_reference
from trainer import kernels, runtime
from trainer.common.errors import ConfigError
from trainer.config import TrainConfig
from trainer.data import batches as data
from trainer.events import (
    CheckpointSaved,
    Diverged,
    EpochEnded,
    Event,
    MicroBatchReduced,
    OutOfMemory,
    RunStarted,
    StepEnded,
)
from trainer.loop import ForwardPass, Pack, train
from trainer.member import Member
from trainer.model.base import Forward, forward
from trainer.model.batch import IGNORE, Batch
from trainer.schedule import learning_rate
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]

FOUR: tuple[dict[str, Any], ...] = (
    {"lora_r": 2, "lora_alpha": 8, "batch_size": 2, "learning_rate": 3e-2, "seed": 1},
    {"lora_r": 4, "batch_size": 4, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "max_grad_norm": 0.05},
    {"lora_r": 8, "batch_size": 5, "learning_rate": 2e-3, "warmup_steps": 0, "weight_decay": 0.3},
    {"lora_r": 16, "batch_size": 3, "learning_rate": 5e-3, "num_epochs": 3, "gradient_accumulation_steps": 2},
)
"""Runs that differ in everything that runs of a pack may differ in."""


def together(pack: Pack) -> dict[Member, list[Event]]:
    """All events of a pack's runs, by run."""
    events: dict[Member, list[Event]] = defaultdict(list)
    while pack.members:
        for member, event in pack.round():
            events[member].append(event)
    return events


def run(bench: Workbench, configs: list[TrainConfig], out: Path, forward: ForwardPass = forward) -> list[list[Event]]:
    with Pack(bench, forward=forward) as pack:
        members = [pack.add(config, out / str(i)) for i, config in enumerate(configs)]
        events = together(pack)
    return [events[member] for member in members]


def figures(events: list[Event]) -> list[float]:
    """Losses and gradient norms by step, losses by epoch."""
    values = []
    for event in events:
        if isinstance(event, StepEnded):
            values += [event.loss, event.grad_norm]
        if isinstance(event, EpochEnded):
            values += [event.train_loss, event.val_loss]
    return values


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A workbench whose bases are in float64."""
    monkeypatch.setitem(runtime.DTYPES, "float32", torch.float64)
    return Workbench()


def alone_with_peft(bench: Workbench, config: TrainConfig) -> list[tuple[float, float]]:
    """(loss, gradient norm) by step of a plain loop: PEFT, PyTorch's AdamW, clip_grad_norm_, the base's forward."""
    train_set, _ = bench.datasets(config)
    collate = data.Collator(bench.tokenizer(config))
    found = []
    with peft_reference.attached(bench.base(config).model, config) as (peft_model, _):
        model = peft_model.get_base_model()
        parameters = [p for p in peft_model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, weight_decay=config.weight_decay, foreach=False, fused=False)
        size, together = config.batch_size, config.gradient_accumulation_steps
        total = math.ceil(math.ceil(len(train_set) / size) / together) * config.num_epochs
        for epoch in range(1, config.num_epochs + 1):
            sampler = data.EpochSampler(len(train_set), config.seed)
            sampler.epoch = epoch
            order = list(sampler)
            batches = [collate([train_set[i] for i in order[at : at + size]]) for at in range(0, len(order), size)]
            for at in range(0, len(batches), together):
                group: list[Any] = batches[at : at + together]
                optimizer.param_groups[0]["lr"] = learning_rate(config, len(found) + 1, total)
                loss = sum(forward(model, b.to(torch.device("cpu"))).loss_sum for b in group)
                loss = loss / sum(b.num_tokens() for b in group)
                loss.backward()
                norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
                found.append((float(loss.detach()), float(norm)))
    return found


def test_in_float64_each_run_equals_peft_and_adamw_alone(double: Workbench, small: Small, tmp_path: Path) -> None:
    """Ranks 2 to 16, batches 2 to 5, three schedules, clipped and not: to 1e-12 over all steps."""
    configs = [small(cache_features=False, **fields) for fields in FOUR]
    packed = run(double, configs, tmp_path)
    for config, events in zip(configs, packed, strict=True):
        expected = alone_with_peft(double, config)
        found = [(e.loss, e.grad_norm) for e in events if isinstance(e, StepEnded)]
        assert len(found) == len(expected) >= 6
        for (loss, norm), (loss_expected, norm_expected) in zip(found, expected, strict=True):
            assert loss == pytest.approx(loss_expected, rel=1e-12)
            assert norm == pytest.approx(norm_expected, rel=1e-9)  # a norm of gradients near 0 loses digits


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_in_float32_the_losses_are_those_of_runs_alone(
    bench: Workbench, small: Small, tmp_path: Path, dropout: float
) -> None:
    """With dropout, too: a run's masks do not depend on its company."""
    configs = [small(lora_dropout=dropout, **fields) for fields in FOUR]
    packed = run(bench, configs, tmp_path / "packed")
    for i, (config, events) in enumerate(zip(configs, packed, strict=True)):
        alone = list(train(config, bench, tmp_path / "alone" / str(i)))
        assert [type(e) for e in events] == [type(e) for e in alone]
        assert figures(events) == pytest.approx(figures(alone), rel=2e-4)


def test_dropout_in_the_language_model_is_drawn_for_the_runs_own_lengths(
    double: Workbench, small: Small, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"lora_dropout": 0.3, "target_modules": ("q", "v", "query", "wo"), "cache_features": False}
    configs = [small(**{**fields, **more}) for fields in FOUR]
    for i, events in enumerate(run(double, configs, tmp_path / "packed")):
        alone = list(train(configs[i], double, tmp_path / "alone" / str(i)))
        assert figures(events) == pytest.approx(figures(alone), rel=1e-9)


def test_the_same_pack_gives_the_same_bits(bench: Workbench, small: Small, tmp_path: Path) -> None:
    configs = [small(lora_dropout=0.2, **fields) for fields in FOUR]
    assert run(bench, configs, tmp_path / "a") == run(bench, configs, tmp_path / "b")


def with_neighbour(bench: Workbench, small: Small, out: Path, *, poisoned: bool = False, **fields: Any) -> list[Event]:
    """The events of two runs beside a third, whose weights may be made NaN before each pass of all three."""

    def poison(model: Any, batch: Batch) -> Forward:
        if poisoned and len(pack.members) == 3:
            members[1].adapter.weights.fill_(float("nan"))
        return forward(model, batch)

    neighbour = small(**{"batch_size": 4, "lora_r": 4, "max_nonfinite_steps": 99, **fields})
    configs = [small(lora_dropout=0.2, **FOUR[0]), neighbour, small(lora_dropout=0.2, **FOUR[1])]
    with Pack(bench, forward=poison) as pack:
        members = [pack.add(config, out / str(i)) for i, config in enumerate(configs)]
        events = together(pack)
    if poisoned:
        assert any(step.nonfinite for step in steps(events[members[1]]))
    return events[members[0]] + events[members[2]]


def test_a_disturbed_neighbour_changes_no_bit(bench: Workbench, small: Small, tmp_path: Path) -> None:
    undisturbed = with_neighbour(bench, small, tmp_path / "a")
    assert with_neighbour(bench, small, tmp_path / "b", learning_rate=9.0, lora_alpha=1e6) == undisturbed
    assert with_neighbour(bench, small, tmp_path / "c", poisoned=True) == undisturbed


def test_runs_come_and_go(bench: Workbench, small: Small, tmp_path: Path) -> None:
    """One is dropped after its first epoch, another takes its place at once; a third goes on as if alone."""
    lasting = small(lora_dropout=0.2, **FOUR[3])
    with Pack(bench) as pack:
        kept = pack.add(lasting, tmp_path / "kept")
        pruned = pack.add(small(**FOUR[0]), tmp_path / "pruned")
        late = None
        events: dict[Member, list[Event]] = defaultdict(list)
        while pack.members:
            for member, event in pack.round():
                events[member].append(event)
                if member is pruned and isinstance(event, EpochEnded):
                    pack.remove(pruned)
                    late = pack.add(small(**FOUR[1]), tmp_path / "late")
    assert [type(e) for e in events[pruned]][-1] in (EpochEnded, CheckpointSaved)
    assert late is not None and events[late][0] == next(iter(train(small(**FOUR[1]), bench, tmp_path / "x")))
    for member, config in ((kept, lasting), (late, small(**FOUR[1]))):
        alone = list(train(config, bench, tmp_path / f"alone{config.lora_r}"))
        assert figures(events[member]) == pytest.approx(figures(alone), rel=2e-4)


class CudaMemory:
    """torch.cuda's two functions for the most memory in use."""

    def __init__(self) -> None:
        self.peak = 0

    def max_memory_allocated(self, _: torch.device) -> int:
        return self.peak

    def reset_peak_memory_stats(self, _: torch.device) -> None:
        self.peak = 0


def test_a_run_that_comes_later_takes_no_peak_from_those_before(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, memory = torch.device("cuda"), CudaMemory()
    prepare, peak_gib = runtime.prepare, runtime.peak_memory_gib

    def prepare_for_cuda(config: TrainConfig) -> torch.device:
        with monkeypatch.context() as patched:
            patched.setattr(runtime, "resolve_device", lambda _: cuda)
            patched.setattr(kernels, "allow_fused_attention", lambda _: None)
            return prepare(config)

    monkeypatch.setattr(runtime, "prepare", prepare_for_cuda)
    monkeypatch.setattr(runtime, "peak_memory_gib", lambda _: peak_gib(cuda))
    for name in ("max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, getattr(memory, name))
    with Pack(bench) as pack:
        memory.peak = 9 * 2**30  # of whatever was in this process before
        first = pack.add(small(), tmp_path / "first")
        memory.peak = 5 * 2**30
        second = pack.add(small(seed=2), tmp_path / "second")
        memory.peak = 3 * 2**30
        ended = {m: [e for e in events if isinstance(e, EpochEnded)] for m, events in together(pack).items()}
    assert {event.timing.peak_memory_gib for event in ended[first]} == {5.0}
    assert {event.timing.peak_memory_gib for event in ended[second]} == {3.0}


def test_a_run_that_diverges_leaves_the_pack(bench: Workbench, small: Small, tmp_path: Path) -> None:
    first, second, third = run(bench, [small(), small(seed=2), small(seed=3)], tmp_path, spoil(1))
    assert isinstance(second[-1], Diverged) and second[-1].step == 3
    assert len([e for e in first if isinstance(e, StepEnded)]) == 8
    assert len([e for e in third if isinstance(e, StepEnded)]) == 8


def spoil(which: int) -> Callable[[Any, Batch], Forward]:
    """The forward with NaN in the losses of one of three runs of four samples each."""

    def spoiled(model: Any, batch: Batch) -> Forward:
        out = forward(model, batch)
        if torch.is_grad_enabled() and len(batch) == 12:
            counts = (batch.labels != IGNORE).sum(dim=1).split(4)
            parts = list(out.token_losses.split([int(n.sum()) for n in counts]))
            parts[which] = parts[which] * float("nan")
            return Forward(torch.cat(parts), out.query_output)
        return out

    return spoiled


class Hungry:
    """Our forward, out of memory above a number of samples."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.sizes: list[int] = []

    def __call__(self, model: Any, batch: Batch) -> Forward:
        self.sizes.append(len(batch))
        if len(batch) > self.most:
            raise torch.OutOfMemoryError
        return forward(model, batch)


def test_out_of_memory_halves_the_runs_in_a_pass_and_fails_none(
    bench: Workbench, small: Small, tmp_path: Path
) -> None:
    configs = [small(lora_dropout=0.2, seed=seed, num_epochs=1, eval_batch_size=2) for seed in range(4)]
    expected = run(bench, configs, tmp_path / "expected")
    hungry = Hungry(8)
    found = run(bench, configs, tmp_path / "found", hungry)
    assert sorted(set(hungry.sizes)) == [2, 4, 8, 16]  # the last batch has one sample, the evaluation two by two
    assert hungry.sizes.count(16) == 1
    for one, other in zip(found, expected, strict=True):
        assert [type(e) for e in one] == [type(e) for e in other]
        assert figures(one) == pytest.approx(figures(other), rel=2e-4)


def test_only_where_one_run_alone_does_not_fit_its_batch_is_cut(
    bench: Workbench, small: Small, tmp_path: Path
) -> None:
    found = run(bench, [small(batch_size=2), small(batch_size=4, seed=3)], tmp_path, Hungry(2))
    assert not [e for e in found[0] if isinstance(e, MicroBatchReduced | OutOfMemory)]
    assert [e for e in found[1] if isinstance(e, MicroBatchReduced)] == [MicroBatchReduced(step=1, micro_batch_size=2)]
    assert len([e for e in found[1] if isinstance(e, EpochEnded)]) == 2


def test_figures_fetched_later_are_the_same(bench: Workbench, small: Small, tmp_path: Path) -> None:
    """As on a GPU, where losses are fetched once in several rounds: a divergence is found later, but is the same."""

    def windowed(window: int, out: Path) -> list[list[Event]]:
        with Pack(bench, forward=spoil(2)) as pack:
            pack.window = window
            members = [pack.add(small(seed=seed, num_epochs=3), out / str(seed)) for seed in range(3)]
            events = together(pack)
        return [events[member] for member in members]

    at_once, later = windowed(1, tmp_path / "a"), windowed(3, tmp_path / "b")
    assert later[:2] == at_once[:2]
    assert [type(e) for e in later[2]] == [type(e) for e in at_once[2]]
    assert isinstance(later[2][-1], Diverged)


def test_what_cannot_train_together_is_refused(bench: Workbench, small: Small, tmp_path: Path) -> None:
    with Pack(bench) as pack:
        pack.add(small(), tmp_path / "a")
        base = bench.base(small())
        for fields in ({"torch_dtype": "float16"}, {"cache_features": False}, {"matmul_precision": "high"}):
            assert not pack.accepts(small(**fields))
            with pytest.raises(ConfigError, match="runs that train together"):
                pack.add(small(**fields), tmp_path / "b")
        assert bench.base(small()) is base, "another was loaded beside the one that trains"
        assert pack.accepts(small(target_modules=("query",), lora_r=1, max_samples=20))


def test_time_is_shared_by_samples(bench: Workbench, small: Small, tmp_path: Path) -> None:
    one, other = run(bench, [small(batch_size=1, num_epochs=1), small(batch_size=4, num_epochs=1)], tmp_path)
    for a, b in zip(steps(one)[:3], steps(other)[:3], strict=True):
        shares = [e.timing.step_s - e.timing.data_wait_s for e in (a, b)]
        assert shares[1] == pytest.approx(4 * shares[0], rel=1e-6)


def steps(events: list[Event]) -> list[StepEnded]:
    return [e for e in events if isinstance(e, StepEnded)]


def test_events_start_with_the_start(bench: Workbench, small: Small, tmp_path: Path) -> None:
    started: Iterator[Event] = (events[0] for events in run(bench, [small(), small(seed=2)], tmp_path))
    assert all(isinstance(event, RunStarted) for event in started)


def test_waiting_for_the_figures_of_a_window_is_time_of_its_steps(
    bench: Workbench, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, whose host launches a window's rounds and then waits for it."""
    real = torch.stack

    def waits(tensors: Any, *args: Any, **options: Any) -> torch.Tensor:
        if len(tensors) > 3 and tensors[0].shape == (3,):  # the figures of a window, not of a step
            time.sleep(0.2)
        return real(tensors, *args, **options)

    monkeypatch.setattr(torch, "stack", waits)
    with Pack(bench) as pack:
        pack.window = 4
        for number, size in enumerate((2, 4)):
            pack.add(small(batch_size=size, max_samples=40), tmp_path / str(number))
        told: dict[Member, list[float]] = defaultdict(list)
        while sum(map(len, told.values())) < 8:
            for member, event in pack.round():
                if isinstance(event, StepEnded):
                    told[member].append(event.timing.step_s)
    fewer, more = (sum(seconds) for seconds in told.values())
    assert fewer + more > 0.2 and more > 1.5 * fewer  # by samples


def test_runs_that_may_take_any_kernel_are_no_company_for_those_that_may_not(
    bench: Workbench, small: Small, tmp_path: Path
) -> None:
    free = small(deterministic=False)
    with Pack(bench) as pack:
        pack.add(free, tmp_path / "free")
        assert not torch.are_deterministic_algorithms_enabled()
        assert not pack.accepts(small()) and pack.accepts(free)
    with Pack(bench) as pack:
        pack.add(small(), tmp_path / "bound")
        assert torch.are_deterministic_algorithms_enabled()
    assert free.identity() != small().identity()
