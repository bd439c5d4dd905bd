"""DataLoader worker processes: the shared memory they need, and their end with the process that they serve."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
from pathlib import Path

from trainer.common.errors import UserError

SHARED = Path("/dev/shm")  # noqa: S108 - its room is looked at, nothing is written
"""Where PyTorch puts tensors that pass from a process to another (on Linux)."""
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


def check_shared_memory(workers: int, prefetch: int, batch_size: int, sample_bytes: int) -> None:
    """Make sure that the batches which workers hold ready fit: without room they die of SIGBUS or wait for ever.

    Args:
        workers: processes of the loader; with 0 nothing is shared.
        prefetch: batches that each holds ready.
        batch_size: samples in a batch.
        sample_bytes: bytes of a sample's pixels.

    Raises:
        UserError: there is less room, with the ways out.
    """
    if workers == 0 or not SHARED.is_dir():
        return
    need = round(SPARE * (workers * prefetch + 1) * batch_size * sample_bytes)
    usage = shutil.disk_usage(SHARED)
    if usage.free < need:
        raise UserError(
            f"{workers} DataLoader workers need {need / 1e6:.0f} MB of shared memory for their batches, but {SHARED} "
            f"has {usage.free / 1e6:.0f} of {usage.total / 1e6:.0f} MB free (64 MB is Docker's default); give the "
            "container more (docker run --shm-size=2g, or shm_size in a compose file), or use less: "
            "--set num_workers=0, or a smaller prefetch_factor or batch size"
        )
