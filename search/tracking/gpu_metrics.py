"""What a worker's GPUs do while it trains, as metrics of its runs under MLflow's own names for them.

MLflow's system metrics monitor is not used: it writes to the store itself, ends at the first call that fails, asks the
store for the run at every sample, needs a package (nvidia-ml-py), and records every GPU of the machine in every run.
Here one thread of the worker asks nvidia-smi, and each run takes the means since it last did, on the way that all its
metrics take. At step = optimizer step, so that a run that is resumed continues them.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from trainer.common.nvidia import Gpu, visible

EVERY_S = 10.0
"""Seconds between two looks, as MLflow's monitor has it: nvidia-smi takes 0.02 to 0.1 s (estimated) in a process
of its own."""
SHARE = 1 / 50
"""Time between two points of a run, as a share of its time so far if that is longer: 10 hours are 264 points."""


def values(gpus: Sequence[Gpu]) -> dict[str, float]:
    """MLflow's metrics of the GPUs, numbered as nvidia-smi does; what is not known is left out."""
    found: dict[str, float | None] = {}
    for gpu in gpus:
        of = f"system/gpu_{gpu.index}"
        found[f"{of}_utilization_percentage"] = gpu.utilization
        found[f"{of}_power_usage_watts"] = gpu.power_w
        found[f"{of}_power_usage_percentage"] = _percent(gpu.power_w, gpu.power_limit_w)
        found[f"{of}_memory_usage_percentage"] = _percent(gpu.memory_used_mib, gpu.memory_mib)
        used = gpu.memory_used_mib
        found[f"{of}_memory_usage_megabytes"] = None if used is None else used * 2**20 / 1e6
    return {key: value for key, value in found.items() if value is not None and math.isfinite(value)}


def _percent(part: float | None, whole: float | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None


class GpuWatch(threading.Thread):
    """Looks at this process's GPUs now and then, until it is closed."""

    def __init__(self, look: Callable[[], Sequence[Gpu]] = visible, every_s: float = EVERY_S) -> None:
        super().__init__(name="gpu-watch", daemon=True)
        self._look, self.every_s = look, every_s
        self._closing = threading.Event()
        self.sums: Mapping[str, tuple[int, float]] = {}
        """(looks, sum of their values) of each metric since the start. Replaced whole: read without a lock."""

    def run(self) -> None:
        """The thread's work."""
        while not self._closing.is_set():
            sums = dict(self.sums)
            for key, value in values(self._look()).items():
                looks, total = sums.get(key, (0, 0.0))
                sums[key] = (looks + 1, total + value)
            self.sums = sums
            self._closing.wait(self.every_s)

    def close(self) -> None:
        """Look no more; a look that is under way is not waited for."""
        self._closing.set()


class GpuMetrics:
    """The GPUs' metrics of one run."""

    def __init__(self, watch: GpuWatch, clock: Callable[[], float] = time.monotonic) -> None:
        self._watch, self._clock = watch, clock
        self._began = self._last = clock()
        self._seen = watch.sums

    def due(self) -> dict[str, float]:
        """The means since the last time, if it is time for new ones; called with every step, and then mostly empty."""
        now = self._clock()
        if now - self._last < max(self._watch.every_s, SHARE * (now - self._began)):
            return {}
        self._last = now
        before, self._seen = self._seen, self._watch.sums
        means = {}
        for key, (looks, total) in self._seen.items():
            earlier, sum_then = before.get(key, (0, 0.0))
            if looks > earlier:
                means[key] = (total - sum_then) / (looks - earlier)
        return means
