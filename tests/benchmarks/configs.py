"""The studies that are measured: seeded configurations from rsicap_mini's ranges, without dropout, given by hand.

All of a study's trials are enqueued, so that both sides train the very same ones, in the same order, whatever a
sampler would say. Dropout is 0 because the two sides draw their masks from different generators: with it, losses
could not be compared number by number.
"""

from __future__ import annotations

import json
import math
import pprint
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data import dataset

NAME = "bench"
"""The study's name."""
RESULT = "result.json"
"""A trial of the peer writes it at its end: how it ended, validation losses by epoch, where its time went."""


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A size of the benchmark."""

    base: dict[str, Any]
    batch: tuple[int, int]
    """Smallest and largest batch size."""
    warmup: int
    """Most warmup steps."""
    tolerance: float
    """Largest relative difference of a trial's validation losses. Two float32 computations of the same losses differ
    by rounding, which training amplifies: most at the highest rates, and the more steps, the more."""


SCALES = {
    "mini": Scale(base={"max_samples": 160, "num_epochs": 6}, batch=(2, 16), warmup=20, tolerance=5e-4),
    "real": Scale(base={"max_samples": 48, "num_epochs": 2}, batch=(4, 4), warmup=5, tolerance=5e-4),
    "xl": Scale(base={"max_samples": 64, "num_epochs": 3}, batch=(2, 8), warmup=10, tolerance=2e-3),
}


def sample(scale: Scale, trials: int, seed: int, max_rate: float = 1e-3) -> list[dict[str, Any]]:
    """So many configurations. The first n of a seed are the same whatever the number of trials."""
    rng = random.Random(seed)

    def log_int(low: int, high: int) -> int:
        return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))

    configurations = []
    for _ in range(trials):
        rank = log_int(4, 32)
        configurations.append(
            {
                "learning_rate": math.exp(rng.uniform(math.log(5e-6), math.log(max_rate))),
                "lora_r": rank,
                "lora_alpha": rank * rng.choice((1, 2, 4)),
                "batch_size": log_int(*scale.batch),
                "warmup_steps": rng.randint(0, scale.warmup),
            }
        )
    return configurations


def study_text(scale: Scale, trials: int, seed: int, base: dict[str, Any], *, max_rate: float = 1e-3) -> str:
    """A study file with these trials; `base` goes over the scale's."""
    every = {"max_grad_norm": 1.0, "lora_dropout": 0.0, **scale.base, **base}
    low, high = scale.batch
    batch = "" if low == high else f'        "batch_size": Int({low}, {high}, log=True),\n'
    return f'''"""Written by tests.benchmarks.makespan."""

from search.space import Float, Int, Multiple
from search.study import Fixed, Study

CONFIGURATIONS = {pprint.pformat(sample(scale, trials, seed, max_rate), width=115, sort_dicts=False)}

STUDY = Study(
    name="{NAME}",
    description="configurations to be timed",
    base={every!r},
    space={{
        "learning_rate": Float(5e-6, 1e-3, log=True),
        "lora_r": Int(4, 32, log=True),
        "lora_alpha": Multiple("lora_r", (1, 2, 4)),
{batch}        "warmup_steps": Int(0, {scale.warmup}),
    }},
    n_trials={trials},
    enqueue=tuple(Fixed(label=f"c{{i:02d}}", config=c) for i, c in enumerate(CONFIGURATIONS)),
)
'''


def write_rows(config: TrainConfig, path: Path) -> None:
    """The rows of the configuration's split as JSON, for the peer: one would not check a data folder in each trial."""
    parts = dataset.split(dataset.examine(config.data), config)
    text = json.dumps({"train": [_plain(row) for row in parts.train], "val": [_plain(row) for row in parts.val]})
    path.write_text(text, encoding="utf-8")


def _plain(row: dataset.Row) -> dict[str, Any]:
    return {**asdict(row), "image": str(row.image)}
