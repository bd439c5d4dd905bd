"""DataLoader worker processes: the shared memory they need, and their end with the process that they serve."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from trainer.common.errors import UserError
from trainer.config import TrainConfig

SHARED = Path("/dev/shm")  # noqa: S108 - its room is looked at, nothing is written
"""Where PyTorch puts tensors that pass from a process to another (on Linux)."""
VISION_MODULES = ("qkv", "projection", "fc1", "fc2")
"""Endings of the linear modules of InstructBLIP's vision tower; no other part has modules of these names."""
SPARE = 1.1
"""Room asked for beside the pixels: ids, masks and labels."""


def end_with_parent(worker: int) -> None:
    """End this process when the one that started it is gone, even by SIGKILL. A DataLoader's `worker_init_fn`.

    PyTorch's own watch compares the parent's id, which under a fork server is the server's and never changes; and
    PR_SET_PDEATHSIG would wait for the server, which lives as long as its children do.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()  # waits for the other end of a pipe to close
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


def shared_need(workers: int, prefetch: int, batch_size: int, sample_bytes: int) -> int:
    """Bytes of shared memory that the batches take which a loader's workers hold ready.

    Args:
        workers: processes of the loader; with 0 nothing is shared.
        prefetch: batches that each holds ready.
        batch_size: samples in a batch.
        sample_bytes: bytes of a sample's pixels.
    """
    return round(SPARE * (workers * prefetch + 1) * batch_size * sample_bytes) if workers else 0


def takes_vision_from_disk(cache_features: bool, target_modules: Iterable[str]) -> bool:
    """Whether a run takes vision outputs from disk, and so has no workers, whatever `num_workers` says.

    Judged by names, without the model: an adapter in the vision tower changes its outputs.

    Args:
        cache_features: of the run's configuration.
        target_modules: the same.
    """
    return cache_features and not any(target.rpartition(".")[2] in VISION_MODULES for target in target_modules)


def run_need(config: TrainConfig, sample_bytes: int, train: int, val: int) -> int:
    """The same of a whole run: its workers of training and of validation live side by side.

    Args:
        config: of the run.
        sample_bytes: bytes of a sample's pixels.
        train: number of training samples.
        val: number of validation samples.
    """
    if takes_vision_from_disk(config.cache_features, config.target_modules):
        return 0
    sizes = (min(config.batch_size, train), min(config.eval_batch_size, val))
    return sum(shared_need(config.num_workers, config.prefetch_factor, size, sample_bytes) for size in sizes)


def check_shared_memory(need: int, whose: str) -> None:
    """Make sure that the batches which workers hold ready fit: without room they die of SIGBUS or wait for ever.

    Args:
        need: bytes.
        whose: who needs them, the beginning of the message.

    Raises:
        UserError: there is less room, with the ways out.
    """
    if need == 0 or not SHARED.is_dir():
        return
    usage = shutil.disk_usage(SHARED)
    if usage.free < need:
        raise UserError(
            f"{whose} need {need / 1e6:.0f} MB of shared memory for their batches, but {SHARED} "
            f"has {usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free (64 MB is Docker's default); give the "
            "container more (docker run --shm-size=2g, or shm_size in a compose file), or use less: "
            "--set num_workers=0, or a smaller prefetch_factor or batch size"
        )
