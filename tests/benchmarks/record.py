"""Records tables of real training runs, on which strategies are compared without training: a benchmark of their own.

    python -m tests.benchmarks.record --task aerial       # hours on one core; goes on where it was stopped, and from
                                                          # the runs that the repository's table has already
    python -m tests.benchmarks.record --task aerial --finish

A table has random configurations of one task, each trained to its last epoch, some with several seeds. By epoch it has
the validation loss that a search sees, and the test loss on 512 fresh scenes that no search sees: whether a strategy
found the best configuration is judged by that one. Columns, units and licence: tests/benchmarks/tables/README.md.

The embedded model trains on two tasks:

    aerial   rsicap_mini's: 160 tiles of one archive, adapters in the Q-Former
    mixed    four times the tiles, of an archive with another look and wording; adapters in the language model too
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.sides import machine
from tests.benchmarks.stored_tables import load, names, save
from trainer.common.cache import cache_folder
from trainer.common.files import whole_folder
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.batches import CaptionDataset, Pixels, batches, eval_loader
from trainer.data.features import Features, compute_or_open, default_folder
from trainer.events import Diverged, EpochEnded, Event
from trainer.loop import Pack, RunError
from trainer.member import Member
from trainer.mini import scenes
from trainer.mini.captions import Voice
from trainer.mini.drawing import Look
from trainer.model.batch import Batch
from trainer.workbench import Workbench

TEST_SCENES = 512
TEST_SEED = 777
TEST_BATCH = 64
AT_ONCE = 8
"""Runs in a pack."""
WORTH_TESTING = 1.1
"""The test loss is taken where the validation loss is within this factor of the lowest so far: 512 scenes cost as much
as the epoch's training, and by how much a hopeless run is hopeless decides nothing."""
DIGITS = 7
"""Significant digits of a loss that are kept."""


def _log_int(rng: random.Random, low: int, high: int) -> int:
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, and how many configurations of it."""

    name: str
    style: scenes.Style
    data: tuple[int, int, int]
    """Scenes, tiles a scene, seed of the data folder."""
    base: dict[str, Any]
    configurations: int
    repeated: int
    """So many of the configurations are trained with three seeds instead of one."""
    warmup: int
    rates: tuple[float, float] = (1e-5, 3e-3)
    seed: int = 0
    only_lowest: bool = False
    """Whether the test loss is taken only where a run's validation loss is its lowest so far."""

    def jobs(self) -> list[dict[str, Any]]:
        """Values over the base, in the order in which they are trained: any beginning of it is a smaller table.

        Seeds two and three of a configuration come right after its first, spread over the whole table.
        """
        rng = random.Random(self.seed)
        every = max(1, self.configurations // self.repeated) if self.repeated else 0
        found = []
        for number in range(self.configurations):
            rank = _log_int(rng, 4, 32)
            low, high = self.rates
            values = {
                "learning_rate": float(f"{math.exp(rng.uniform(math.log(low), math.log(high))):.4g}"),
                "lora_r": rank,
                "lora_alpha": rank * rng.choice((1, 2, 4)),
                "lora_dropout": round(rng.uniform(0, 0.2), 3),
                "batch_size": _log_int(rng, 2, 16),
                "warmup_steps": rng.randint(0, self.warmup),
            }
            seeds = (42, 43, 44) if every and number % every == 0 else (42,)
            found += [{"configuration": number, **values, "seed": seed} for seed in seeds]
        return found

    def folder(self, part: str, shape: tuple[int, int, int]) -> Path:
        """The data of one part, generated at first use."""
        count, tiles, seed = shape
        target = cache_folder() / f"table-{self.name}-{part}-{count}x{tiles}-{seed}-v{scenes.GENERATOR_VERSION}"
        if not target.is_dir():
            with whole_folder(target, replace=False, flush=False) as folder:
                scenes.write_dataset(folder, scenes=count, tiles_per_scene=tiles, seed=seed, style=self.style)
        return target


TASKS = {
    task.name: task
    for task in (
        Task(
            name="aerial",
            style=scenes.STUDY,
            data=(160, 4, 20260101),
            base={"max_samples": 160, "num_epochs": 20},
            configurations=256,
            repeated=32,
            warmup=20,
        ),
        Task(
            name="mixed",
            style=scenes.Style(
                Look(gain=(0.7, 0.85, 1.0), bias=(10, 20, 40), saturation=1.3, contrast=0.9, noise=14, scale=0.9),
                Voice(
                    (1, 0, 1, 2, 1, 0, 0, 2, 0), 0.7
                ),  # no archive of the pretraining has this combination of wordings
                0.1,
            ),
            data=(200, 4, 4711),
            base={
                "max_samples": 640,
                "num_epochs": 8,
                "target_modules": ("query", "key", "value", "dense", "q", "v"),
            },
            configurations=128,
            repeated=16,
            warmup=80,
            rates=(5e-6, 2e-3),
            seed=1,
        ),
    )
}


@dataclass
class Recorder:
    """Trains a task's jobs in packs and appends every epoch to a file of lines."""

    task: Task
    work: Path
    """Checkpoints and lines; can go once the table is finished."""
    bench: Workbench = field(default_factory=Workbench)

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True, exist_ok=True)
        self.lines = self.work / "epochs.jsonl"
        common = {"data": str(self.task.folder("train", self.task.data)), "max_grad_norm": 1.0, **self.task.base}
        self.common = TrainConfig.parse(common).model_dump()
        config = TrainConfig.parse(self.common)
        base = self.bench.base(config)
        test = dataset.examine(str(self.task.folder("test", (TEST_SCENES, 1, TEST_SEED))))
        rows = list(test.rows)[:TEST_SCENES]
        pixels = Pixels(base.processor.image_processor)
        tokenizer = self.bench.tokenizer(config)
        self.test_features: Features = compute_or_open(default_folder(), base, [row.image for row in rows], pixels)
        index = self.test_features.index
        test_set = CaptionDataset(rows, tokenizer, pixels).seen_through(lambda path: torch.tensor(index(path)))
        loading = config.model_copy(update={"eval_batch_size": TEST_BATCH})
        self.test_batches: list[Batch] = list(batches(eval_loader(test_set, tokenizer, loading, pin=False)))

    def run(self, limit: int | None = None) -> None:
        """Train what is not there yet; `limit` jobs at most are taken from the front of the list."""
        done = {(r["configuration"], r["seed"]) for r in read(self.lines) if r.get("end")} | set(stored(self.task))
        jobs = [job for job in self.task.jobs()[:limit] if (job["configuration"], job["seed"]) not in done]
        total, began = len(jobs), time.monotonic()
        waiting = iter(jobs)
        with _TestedPack(self) as pack:
            running: dict[Member, dict[str, Any]] = {}
            self._fill(pack, running, waiting)
            left = total
            while running:
                for member, event in pack.round():
                    ended = self._note(running.get(member), member, event, pack)
                    if ended:
                        running.pop(member, None)
                        pack.remove(member)
                        shutil.rmtree(member.out_dir, ignore_errors=True)
                        left -= 1
                        rate = (time.monotonic() - began) / (total - left)
                        print(f"{total - left}/{total}, about {rate * left / 60:.0f} min left", flush=True)
                self._fill(pack, running, waiting)

    def _fill(self, pack: Pack, running: dict[Member, dict[str, Any]], waiting: Iterator[dict[str, Any]]) -> None:
        while len(running) < AT_ONCE:
            job = next(waiting, None)
            if job is None:
                return
            values = {**self.common, **{k: v for k, v in job.items() if k != "configuration"}}
            folder = self.work / f"{job['configuration']:04d}-{job['seed']}"
            running[pack.add(TrainConfig.parse(values), folder)] = job

    def _note(self, job: dict[str, Any] | None, member: Member, event: Event | RunError, pack: _TestedPack) -> bool:
        """Append an epoch's figures; whether the run has ended."""
        if job is None:
            return False
        if isinstance(event, Exception):
            raise event
        key = {"configuration": job["configuration"], "seed": job["seed"]}
        with self.lines.open("a", encoding="utf-8") as lines:
            if isinstance(event, EpochEnded):
                figures = {
                    "val": event.val_loss,
                    "test": pack.test_loss.pop(member, None),
                    "train": event.train_loss,
                    "norm": event.grad_norm_mean,
                    "seconds": event.timing.train_s,
                }
                lines.write(json.dumps({**key, "epoch": event.epoch, **figures}) + "\n")
            ended = isinstance(event, Diverged) or (
                isinstance(event, EpochEnded) and event.epoch >= member.config.num_epochs
            )
            if ended:
                lines.write(json.dumps({**key, "end": type(event).__name__}) + "\n")
        return ended


class _TestedPack(Pack):
    """A pack that evaluates its runs on the test scenes too, after each epoch."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__(recorder.bench)
        self._recorder = recorder
        self.test_loss: dict[Member, float] = {}
        self._own_lowest: dict[Member, float] = {}
        before = [line["val"] for line in read(recorder.lines) if "val" in line]
        before += [loss for run in stored(recorder.task).values() for loss in run["val"] if loss is not None]
        self.lowest = min((loss for loss in before if math.isfinite(loss)), default=math.inf)

    def _evaluate(self, members: Sequence[Member]) -> list[float]:
        losses = super()._evaluate(members)
        self.lowest = min([self.lowest, *(loss for loss in losses if math.isfinite(loss))])
        good = [m for m, loss in zip(members, losses, strict=True) if self._is_worth_testing(m, loss)]
        kept = [member.features for member in good]
        for member in good:
            member.features = self._recorder.test_features
        with torch.no_grad():
            totals, tokens = [0.0] * len(good), 0
            for batch in self._recorder.test_batches if good else ():
                sums = self.passes.losses([(member, batch) for member in good])
                totals = [total + each for total, each in zip(totals, sums, strict=True)]
                tokens += batch.num_tokens()
        for member, features, total in zip(good, kept, totals, strict=True):
            member.features = features
            self.test_loss[member] = total / tokens
        return losses

    def _is_worth_testing(self, member: Member, loss: float) -> bool:
        """Whether its test loss is taken after this epoch."""
        before = self._own_lowest.get(member, math.inf)
        self._own_lowest[member] = min(before, loss)
        return loss < WORTH_TESTING * self.lowest and (loss < before or not self._recorder.task.only_lowest)


def read(lines: Path) -> list[dict[str, Any]]:
    """The lines of a recording; a last one that was cut short is left out."""
    found = []
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def stored(task: Task) -> dict[tuple[int, int], dict[str, Any]]:
    """The runs that the repository's table of this task has, by configuration and seed."""
    runs = load(task.name)["runs"] if task.name in names() else []
    return {(run["configuration"], run["seed"]): run for run in runs}


def table(task: Task, lines: Path) -> dict[str, Any]:
    """The finished runs, stored before or recorded now, as `tests/benchmarks/tables/README.md` describes them."""
    before = stored(task)
    epochs: dict[tuple[int, int], dict[int, dict[str, Any]]] = {}
    ends: dict[tuple[int, int], str] = {}
    for line in read(lines):
        key = (line["configuration"], line["seed"])
        if "end" in line:
            ends[key] = line["end"]
        else:
            epochs.setdefault(key, {})[line["epoch"]] = line
    runs = []
    for job in task.jobs():
        key = (job["configuration"], job["seed"])
        if key not in ends:
            runs += [before[key]] if key in before else []
            continue
        rows = [epochs.get(key, {})[epoch] for epoch in sorted(epochs.get(key, {}))]
        curves = {name: [_short(row[name]) for row in rows] for name in ("val", "test", "train", "norm")}
        seconds = round(sum(row["seconds"] for row in rows), 2)
        runs.append({**job, "diverged": ends[key] == "Diverged", **curves, "train_seconds": seconds})
    return {
        "task": task.name,
        "base": {**task.base, "warmup_most": task.warmup, "rates": task.rates},
        "machine": machine(),
        "runs": runs,
    }


def _short(value: float | None) -> float | None:
    return float(f"{value:.{DIGITS}g}") if value is not None and math.isfinite(value) else None


def main() -> int:
    """Record, or finish a recording."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--work", type=Path, help="folder of the recording (default: in the cache)")
    parser.add_argument("--limit", type=int, help="take only so many runs from the front of the list")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--finish", action="store_true", help="write what is recorded as a table of the repository")
    args = parser.parse_args()
    task = TASKS[args.task]
    work = args.work or cache_folder() / f"recording-{task.name}"
    if args.finish:
        found = table(task, work / "epochs.jsonl")
        path = save(found)
        print(f"{path}: {len(found['runs'])} of {len(task.jobs())} runs, {path.stat().st_size / 1e3:.0f} kB")
        return 0
    torch.set_num_threads(args.threads)
    Recorder(task, work).run(args.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
