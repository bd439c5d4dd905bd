"""The loss of an adapter on rows of one's choice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer import checkpoint, held_out
from trainer.config import TrainConfig
from trainer.events import EpochEnded
from trainer.held_out import loss_sums
from trainer.loop import train
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]


@pytest.fixture
def trained(small: Small, bench: Workbench, tmp_path: Path) -> tuple[TrainConfig, Path, float]:
    """A run's configuration, its best adapter and what validation came to there."""
    config = small(num_epochs=2, learning_rate=1e-2, lora_dropout=0.1)
    ended = [event for event in train(config, bench, tmp_path) if isinstance(event, EpochEnded)]
    best = min(ended, key=lambda event: event.val_loss)
    return config, checkpoint.folder_of(tmp_path, best.epoch) / "adapter", best.val_loss


def test_on_validation_rows_it_is_the_validation_loss(trained: Any, bench: Workbench) -> None:
    config, adapter, val_loss = trained
    _, val = bench.datasets(config)
    sums = loss_sums(bench, config, adapter, val.rows)
    assert sums.shape == (len(val.rows), 2)
    assert sums[:, 0].sum() / sums[:, 1].sum() == pytest.approx(val_loss, rel=1e-12)
    backwards = loss_sums(bench, config, adapter, val.rows[::-1])
    assert np.allclose(backwards[::-1], sums, rtol=1e-5), "a row's loss is its own"


def test_every_caption_of_a_row_counts(trained: Any, bench: Workbench) -> None:
    config, adapter, _ = trained
    train_rows, val = bench.datasets(config)
    one, other = val.rows[0], train_rows.rows[0]
    both = replace(one, more_captions=(other.caption,))
    alone = loss_sums(bench, config, adapter, [one, replace(one, caption=other.caption)])
    assert np.allclose(loss_sums(bench, config, adapter, [both])[0], alone.sum(0), rtol=1e-6)


def test_where_memory_runs_out_it_comes_to_the_same(
    trained: Any, bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, adapter, _ = trained
    rows = bench.datasets(config)[0].rows
    whole = loss_sums(bench, config, adapter, rows)
    original, sizes = held_out.forward, []

    def small_memory(model: Any, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return original(model, batch)

    monkeypatch.setattr(held_out, "forward", small_memory)
    assert np.allclose(loss_sums(bench, config, adapter, rows), whole, rtol=1e-5)
    assert max(sizes) > 3


def test_it_can_be_ended_and_leaves_the_base_as_it_was(trained: Any, bench: Workbench) -> None:
    config, adapter, _ = trained
    rows = bench.datasets(config)[1].rows

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loss_sums(bench, config, adapter, rows, stop)
    assert not any("forward" in vars(module) for module in bench.base(config).model.modules())
