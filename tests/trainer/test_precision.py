"""Precisions against the libraries on the same batches: the library's forward, PEFT's adapters, PyTorch's AdamW."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks.bare import ready_batches
from tests.support import library_run
from tests.support.first_steps import apart, distance, first_steps
from tests.support.library_run import Ran
from trainer import runtime
from trainer.common.errors import ConfigError
from trainer.config import TrainConfig, identity_of
from trainer.loop import Pack
from trainer.model.base import load_base
from trainer.workbench import Workbench

Small = Callable[..., TrainConfig]
Libraries = Callable[[Workbench, TrainConfig], Ran]
STEPS = 6
LOSS = {None: 1e-5, "bfloat16": 0.02}
"""Largest relative difference of a step's loss: the libraries' own is rounded to bfloat16 itself, to 1 in 256."""
NORM = {None: 1e-4, "bfloat16": 0.1}


@pytest.fixture(scope="module")
def own_bench(embedded: Any) -> Workbench:
    """A workbench whose base may change its dtype: the session's would load and encode again for all other tests."""
    return Workbench(embedded, "mini")


def configuration(small: Small, dtype: str | None, **more: Any) -> TrainConfig:
    fields = {"max_samples": 40, "learning_rate": 1e-3, "warmup_steps": 0, "base_dtype": dtype}
    return small(cache_features=False, **{**fields, **more})


@pytest.fixture(scope="module")
def by_the_libraries() -> Callable[[Workbench, TrainConfig], Ran]:
    """The libraries' first steps of a configuration, made once."""
    return cache(_by_the_libraries)


def _by_the_libraries(bench: Workbench, config: TrainConfig) -> Ran:
    base = load_base(config.model, dtype=runtime.DTYPES[config.dtype_of_base], device=torch.device("cpu"), fused=False)
    return library_run.run(base.model, config, ready_batches(bench, config)[:STEPS])


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_steps_equal_the_libraries(
    own_bench: Workbench, small: Small, tmp_path: Path, by_the_libraries: Libraries, dtype: str | None
) -> None:
    config = configuration(small, dtype)
    theirs = by_the_libraries(own_bench, config)
    (alone,) = first_steps(own_bench, [config], STEPS, tmp_path / "alone")
    assert apart(alone.losses, theirs.losses) < LOSS[dtype]
    assert apart(alone.norms, theirs.norms) < NORM[dtype]
    others = [configuration(small, dtype, seed=k, lora_r=2 * k, batch_size=k + 2) for k in range(1, 4)]
    packed, *_ = first_steps(own_bench, [config, *others], STEPS, tmp_path / "packed")
    assert apart(packed.losses, alone.losses) < LOSS[dtype]
    assert apart(packed.norms, alone.norms) < NORM[dtype]
    assert {w.dtype for w in alone.weights.values()} == {w.dtype for w in theirs.weights.values()} == {torch.float32}


def test_a_bfloat16_base_is_no_further_from_float32_than_pefts_own(
    own_bench: Workbench, small: Small, tmp_path: Path, by_the_libraries: Libraries
) -> None:
    exact = by_the_libraries(own_bench, configuration(small, None))
    theirs = by_the_libraries(own_bench, configuration(small, "bfloat16"))
    (mine,) = first_steps(own_bench, [configuration(small, "bfloat16")], STEPS, tmp_path)
    assert apart(mine.losses, exact.losses) <= 1.1 * apart(theirs.losses, exact.losses)
    assert distance(mine, exact) <= 1.1 * distance(theirs, exact)


def test_moments_and_gradients_are_in_float32(own_bench: Workbench, small: Small, tmp_path: Path) -> None:
    with Pack(own_bench) as pack:
        member = pack.add(configuration(small, "bfloat16", lora_dropout=0.1), tmp_path)
        list(pack.round())
        assert own_bench.base(member.config).model.dtype == torch.bfloat16
        for each in member.adapter.named().values():
            assert each.exp_avg is not None
            assert each.weight.dtype == each.grad.dtype == each.exp_avg.dtype == torch.float32
        assert member.adapter.fused  # updates are made on the device, and a step that is not finite is skipped there


def test_a_lower_base_is_a_choice_of_its_own() -> None:
    plain = TrainConfig()
    lower = TrainConfig(base_dtype="bfloat16")
    assert (plain.dtype_of_base, lower.dtype_of_base) == ("float32", "bfloat16")
    assert plain.identity() != lower.identity()
    values = plain.model_dump(mode="json")
    del values["base_dtype"]
    assert identity_of(values) == plain.identity()  # as an older version recorded it
    with pytest.raises(ConfigError, match="leave torch_dtype at float32"):
        TrainConfig.parse({"torch_dtype": "float16", "base_dtype": "bfloat16"})
