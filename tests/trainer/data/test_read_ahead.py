"""Vision outputs read ahead: the same values, begun before they are wanted, and a fault costs no step.

On the CPU the thread and the order are the real ones; streams and pinned memory are a GPU's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import TrainConfig
from trainer.data.features import Features
from trainer.data.read_ahead import Ahead, Reader, begun_ahead
from trainer.events import EpochEnded, MicroBatchReduced, StepEnded
from trainer.loop import Pack
from trainer.model.base import forward
from trainer.model.batch import Batch
from trainer.workbench import Workbench

CPU = torch.device("cpu")


def _batch(rows: list[int]) -> Batch:
    ids = torch.zeros(len(rows), 1, dtype=torch.long)
    return Batch(None, *[ids] * 5, image_rows=torch.tensor(rows))


def _features() -> Features:
    rows = [torch.full((2, 3), float(number)) for number in range(6)]
    return Features(rows, {}, CPU, computed=0)


def test_without_a_gpu_nothing_is_read_ahead() -> None:
    found, batch = _features(), _batch([1, 2])
    assert found.reader is None
    assert next(found.ahead([batch], 1)) is batch and batch.ahead is None


def test_each_is_begun_before_it_is_wanted() -> None:
    found = _features()
    found.reader = Reader(CPU)
    begun: list[list[int]] = []

    def begin(rows: torch.Tensor) -> Ahead:
        begun.append(rows.tolist())
        return found._begin(rows)

    source = [_batch([0, 1]), _batch([2]), _batch([3, 3]), _batch([4]), _batch([5])]
    seen = []
    for batch in begun_ahead(source, 2, begin):
        assert batch.ahead is not None and batch.image_rows is not None
        seen.append((batch.image_rows.tolist(), len(begun)))
        here = batch.ahead.take()
        assert here is not None and torch.equal(here, found.take(batch.image_rows))
    assert seen == [([0, 1], 3), ([2], 4), ([3, 3], 5), ([4], 5), ([5], 5)]


def test_a_part_of_a_batch_has_nothing_on_its_way() -> None:
    batch = _batch([0, 1, 2])
    batch.ahead = Reader(CPU).begin([torch.ones(1, 1)])
    assert [part is batch for part in batch.micro(3)] == [True]
    assert [part.ahead for part in batch.micro(2)] == [None, None]


class _Fails(Reader):
    def _fetch(self, rows: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")


def _figures(bench: Workbench, configs: list[TrainConfig], out: Path, pass_: Any = forward) -> Iterator[float]:
    with Pack(bench, forward=pass_) as pack:
        for number, config in enumerate(configs):
            pack.add(config, out / str(number))
        while pack.members:
            for _, event in pack.round():
                if isinstance(event, StepEnded):
                    yield from (event.loss, event.grad_norm)
                if isinstance(event, EpochEnded):
                    yield event.val_loss
                if isinstance(event, MicroBatchReduced):
                    yield -1.0


@pytest.mark.parametrize("kind", [Reader, _Fails])
def test_training_is_the_same_to_the_last_bit(
    bench: Workbench, small: Callable[..., TrainConfig], tmp_path: Path, kind: type[Reader]
) -> None:
    """Also where the thread fails, where memory runs out and a batch is cut, and where steps have several batches."""
    configs = [small(), small(batch_size=2, gradient_accumulation_steps=2, seed=1)]
    calls = [0]

    def sometimes(model: Any, batch: Batch) -> Any:
        calls[0] += 1
        if calls[0] in (2, 3):
            raise torch.OutOfMemoryError("out of memory")
        return forward(model, batch)

    expected = list(_figures(bench, configs, tmp_path / "plain", sometimes))
    assert -1.0 in expected
    store = bench.features(configs[0])
    assert store is not None and store.reader is None
    store.reader, calls[0] = kind(CPU), 0
    try:
        assert list(_figures(bench, configs, tmp_path / "ahead", sometimes)) == expected
    finally:
        store.reader = None
