"""Where workers run: `--executor`, `--workers`, `--gpus-per-worker`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from search.errors import StudyError
from search.study import Study
from search.workers.pool import WorkerPool, device_groups, gpus


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Where a search's workers run, and what each gets."""

    kind: Literal["local", "ray"] = "local"
    workers: int | None = None
    """None for one worker for each `gpus_per_worker` GPUs; without GPUs one, or on Ray one for each node."""
    gpus_per_worker: int = 1
    ray_address: str | None = None

    def check(self, study: Study) -> None:
        """Refuse options that contradict each other or the study.

        Raises:
            StudyError: they do; the message names them.
        """
        if self.ray_address is not None and self.kind != "ray":
            raise StudyError(f"--ray-address {self.ray_address} needs --executor ray")
        if self.gpus_per_worker > 1 and study.base_config().device_map == "single":
            raise StudyError(
                f"--gpus-per-worker {self.gpus_per_worker}: a base on one GPU leaves the others idle; spread it with "
                "--set device_map=auto, or start one worker for each GPU"
            )

    def sees(self) -> str | None:
        """CUDA_VISIBLE_DEVICES of the first worker, "" without GPUs; None on Ray, whose nodes have their own.

        Raises:
            StudyError: the machine has fewer GPUs than one worker is to see.
        """
        return None if self.kind == "ray" else next(iter(device_groups(gpus(), self.gpus_per_worker)), "")

    def workers_here(self) -> int | None:
        """Worker processes on this machine; None on Ray, whose nodes have their own."""
        return None if self.kind == "ray" else self.workers or max(1, len(gpus()) // self.gpus_per_worker)

    def pool(self, databases: Mapping[str, str]) -> WorkerPool:
        """The worker processes, not yet started.

        Args:
            databases: URLs of what they share, each by the option that sets it.

        Raises:
            StudyError: the machine or cluster cannot have such workers.
        """
        if self.kind == "ray":
            from search.workers.ray_pool import RayPool

            return RayPool(self.workers, self.gpus_per_worker, self.ray_address, databases)
        count = self.workers_here() or 1
        return WorkerPool(count, max(1, len(os.sched_getaffinity(0)) // count), self.gpus_per_worker)
