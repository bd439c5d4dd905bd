"""DataLoader workers end with the process they serve, and a small /dev/shm is named before they start."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch

from tests.support.template import Forked
from trainer.common.errors import UserError
from trainer.config import TrainConfig
from trainer.data import batches as data
from trainer.data.batches import CaptionDataset, Pixels
from trainer.data.dataset import examine
from trainer.data.loading import VISION_MODULES, check_shared_memory, run_need, shared_need

LOADS = """
import multiprocessing, sys, time
import torch
from torch.utils.data import DataLoader
from trainer.data.loading import end_with_parent

def main():
    multiprocessing.set_start_method(sys.argv[1])
    loader = DataLoader(range(1000), num_workers=2, persistent_workers=True, worker_init_fn=end_with_parent)
    next(iter_ := iter(loader))
    print("loading", flush=True)
    time.sleep(600)

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_nothing_of_a_killed_process_is_left(method: str, tmp_path: Path) -> None:
    (tmp_path / "loads.py").write_text(LOADS)
    process = Forked([sys.executable, str(tmp_path / "loads.py"), method], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 20
    while time.monotonic() < end and any(child.is_running() and child.status() != "zombie" for child in family):
        time.sleep(0.1)
    left = [child for child in family if child.is_running() and child.status() != "zombie"]
    for child in left:
        child.kill()
    assert left == []


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_small_shared_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64_000_000, 63_000_000, 1_000_000))
    check_shared_memory(shared_need(0, 2, 16, 3 * 224 * 224 * 4), "Workers")
    check_shared_memory(shared_need(2, 2, 16, 8), "Workers")  # row numbers of the vision store
    with pytest.raises(UserError, match=r"need 53 MB .* has 1 of 64 MB free .*--shm-size=2g.*--set num_workers=0"):
        check_shared_memory(shared_need(2, 2, 16, 3 * 224 * 224 * 4), "Workers")


def test_a_run_needs_room_for_both_its_loaders() -> None:
    config = TrainConfig(num_workers=2, batch_size=4, eval_batch_size=16, cache_features=False)
    assert run_need(config, 1000, 100, 100) == shared_need(2, 2, 4, 1000) + shared_need(2, 2, 16, 1000)
    assert run_need(config, 1000, 3, 1) == shared_need(2, 2, 3, 1000) + shared_need(2, 2, 1, 1000)
    kept = config.model_copy(update={"cache_features": True})
    assert run_need(kept, 1000, 100, 100) == 0
    assert run_need(kept.model_copy(update={"target_modules": ("query", "self_attn.qkv")}), 1000, 100, 100) > 0


def test_modules_of_these_names_are_in_the_vision_tower_alone(bench: Any) -> None:
    model = bench.base(TrainConfig(model="mini")).model
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    inside = {name for name in linear if name.startswith("vision_model.")}
    assert inside == {name for name in linear if name.rpartition(".")[2] in VISION_MODULES}


def test_the_loaders_ask(monkeypatch: pytest.MonkeyPatch, bench: Any, small: Callable[..., TrainConfig]) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64_000_000, 64_000_000, 0))
    config = small(num_workers=2)
    tokenizer = bench.tokenizer(config)
    rows = examine("mini").rows[:8]
    dataset = CaptionDataset(rows, tokenizer, Pixels(bench.base(config).processor.image_processor))
    for loader in (data.train_loader, data.eval_loader):
        with pytest.raises(UserError, match="of shared memory"):
            loader(dataset, tokenizer, config, pin=False)
        loader(dataset, tokenizer, small(num_workers=0), pin=False)
