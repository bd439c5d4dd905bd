"""How many trials train at once on one base: `--slots auto`.

Packing pays for as long as a pass is too small to keep the machine busy: below that, a pass with twice the rows takes
hardly longer. So `auto` takes trials in until a pass has the token positions from which the machine is busy, and no
more of them than memory allows: many with small batches, few with large ones. More would only make the search learn
later from what it has tried. On a CPU nothing here depends on the clock, and on a GPU what was probed is kept
(`search.workers.busy`): the same machine and study give the same packs.
"""

from __future__ import annotations

import logging
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from search.space import Multiple, Param
from search.workers import busy

if TYPE_CHECKING:
    import torch

    from search.study import Study
    from trainer.config import TrainConfig
    from trainer.workbench import Workbench

MOST = 16
"""Slots that `auto` chooses at most."""
BUSY_CPU = 2.2e7
"""Token positions in a pass, times the square of the model's width, from which a thread is busy. Two threads count at
most: with more, nothing was measured.

On a CPU core, dispatch costs some 10 microseconds an operation; a product of T rows with a matrix of d x d takes as
long at T d^2 = 3e5. The embedded model (d = 128) gains 52 % from 4 samples in a pass to 16, and one of d = 768 nothing
(docs/benchmarks.md): 75 times that break-even, 1,350 rows and 37. One process alone gains 11 % more from 32 samples,
two that share a cache nothing: a study of 32 trials takes 75.6 s with passes of 16, 76.8 with 24 or 33, and 84.0 with
11. And the fewer trials at once, the sooner each is judged: with successive halving 31.9 s, 37.0 and 37.8."""
MEMORY_SHARE = 0.8
"""Share of the free memory that trials may take."""

log = logging.getLogger("search.workers.slots")


@dataclass(frozen=True)
class Slots:
    """The limits up to which a worker takes trials into its pack."""

    most: int
    """Trials at once, at most."""
    samples: float = math.inf
    """Samples in a pass from which no further trial is taken in."""

    def room(self, batch_sizes: Sequence[int]) -> bool:
        """Whether there is room beside trials of these batch sizes."""
        return len(batch_sizes) < self.most and sum(batch_sizes) < self.samples


@dataclass
class Room:
    """Whether a worker takes another trial in beside those that it trains."""

    slots: Slots
    one_by_one: int = 0
    """Trials still to be run alone, after a fault that no single one could be blamed for."""

    def beside(self, batch_sizes: Sequence[int]) -> bool:
        """Whether there is room beside trials of these batch sizes."""
        return (Slots(1) if self.one_by_one else self.slots).room(batch_sizes)

    def one_ended(self) -> None:
        """Count a trial that has ended."""
        self.one_by_one = max(0, self.one_by_one - 1)


def resolve(wanted: int | None, study: Study, bench: Workbench) -> Slots:
    """The number of slots asked for, or for None as many as pay and fit, 1 to `MOST`."""
    if wanted is not None:
        return Slots(wanted)
    config = study.base_config()
    smallest = min([*_edges(study.space.get("batch_size")), config.batch_size])
    samples = busy_samples(config, bench, smallest)
    if samples <= smallest:
        return Slots(1)
    fitting = that_fit(study, bench)
    log.info("slots: a pass of %.0f samples keeps the machine busy; memory for %d trials", samples, fitting)
    return Slots(max(1, min(fitting, math.ceil(samples / smallest), MOST)), samples)


def _edges(param: Param | None) -> list[int]:
    """The edges of a parameter's range, as far as they are whole numbers."""
    if param is None or isinstance(param, Multiple):
        return []
    return [edge for edge in param.edges() if isinstance(edge, int)]


def busy_samples(config: TrainConfig, bench: Workbench, smallest: int) -> float:
    """Samples in a pass from which the machine is busy, trials of the smallest batch size in it."""
    import torch

    from trainer import runtime

    if runtime.resolve_device(config.device).type == "cuda":
        return busy.samples_when_busy(config, bench, smallest)
    model = bench.base(config).model
    width = min(model.config.qformer_config.hidden_size, model.config.text_config.hidden_size)
    positions: float = BUSY_CPU * min(2, torch.get_num_threads()) / width**2
    return positions / _rows(config, bench)


def _rows(config: TrainConfig, bench: Workbench) -> float:
    """Mean token positions of a sample on its way through Q-Former and language model, a third of them at a time."""
    train_set, _ = bench.datasets(config)
    queries = bench.base(config).num_query_tokens
    tokens = [len(t.qformer) + len(t.prompt) + len(t.target) + 2 * queries for t in train_set.tokens]
    return statistics.fmean(tokens)


def that_fit(study: Study, bench: Workbench) -> int:
    """How many trials memory suffices for, by what a step of the largest batch and rank takes on this device.

    On a GPU that is told from the model's sizes, where they are known; else it is measured.
    """
    from trainer import runtime

    config = study.base_config()
    device = runtime.resolve_device(config.device)
    largest = {name: _edges(study.space.get(name)) for name in ("batch_size", "lora_r")}
    values = {name: max(edges) for name, edges in largest.items() if edges}
    config = config.model_copy(update=values)
    needed = None
    if device.type == "cuda":
        needed = _told(config, bench)
        # What is free is asked for with all vision outputs where they will lie, and without what a probe has left: so
        # that whoever probes and whoever reads a probe back come to the same packs.
        bench.inputs(config)
        runtime.release_memory(device)
    if needed is None:
        needed = _measure(config, bench, device)
    return max(1, int(MEMORY_SHARE * runtime.free_memory(device) / max(needed, 1)))


def _told(config: TrainConfig, bench: Workbench) -> int | None:
    """Bytes that a run takes beside the base, as `trainer.model.peak` estimates; None for a model unknown there.

    What a step keeps counts twice where passes are recorded: recordings have memory of their own, and a pass of
    another shape is carried out beside them. Without room for both, memory runs out at the first recording, and
    steps are launched from then on: three times slower on an H200.
    """
    from trainer.model import peak

    sizes = peak.Sizes.of(bench.base(config).model.config.to_dict())
    if sizes is None:
        return None
    train_set, _ = bench.datasets(config)
    found = peak.estimate(sizes, [config], peak.Lengths.of(train_set.tokens), weights=0)
    return found.total + (found.kept + found.passing if bench.uses_features(config) else 0)


def _measure(config: TrainConfig, bench: Workbench, device: torch.device) -> int:
    """Bytes that one step of this configuration takes above the base, at its peak."""
    import resource

    import torch

    from trainer.events import StepEnded
    from trainer.loop import Pack

    with tempfile.TemporaryDirectory() as folder, Pack(bench) as pack:
        pack.window = 1
        before = _used(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        pack.add(config, Path(folder))
        for _, event in pack.round():
            if isinstance(event, StepEnded):  # the step is made; the epoch's evaluation is not waited for
                break
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device) - before
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def _used(device: torch.device) -> int:
    """Bytes in use: on the GPU, or by this process on the host."""
    import psutil
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
