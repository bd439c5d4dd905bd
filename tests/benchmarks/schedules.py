"""Do schedules and epochs matter beside the effective rate? Trains the embedded model with each, and compares.

    python -m tests.benchmarks.schedules            # three quarters of an hour on one core; goes on where it stopped
    python -m tests.benchmarks.schedules --show     # the tables of docs/search-quality.md from what is recorded

Every schedule is trained for every number of epochs at a ladder of learning rates, each with three seeds (of adapter,
order, dropout and split), on the task `aerial` of `tests/benchmarks/record.py`. A constant rate's short training is
the beginning of its long one. What is compared is what a search would deliver: the test loss on 512 fresh scenes at
the epoch with the lowest validation loss, paired by seed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from tests.benchmarks.record import TASKS, Recorder, Task, read
from trainer.common.cache import cache_folder

CONSTANT = "constant_with_warmup"
SCHEDULES = (CONSTANT, "linear", "cosine")
EPOCHS = (6, 20)
SEEDS = (42, 43, 44)
POWERS = (-3.1, -2.8, -2.5, -2.2, -1.9)
"""log10 of the effective rates: the published runs' best lie at -2.65, and what is 0.6 above diverges or overfits."""
SOUND = {"lora_r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "batch_size": 4, "warmup_steps": 10}

Losses = dict[tuple[str, int, float, int], list[tuple[float, float | None]]]
"""(validation loss, test loss) by epoch of (schedule, epochs, power, seed)."""


@dataclass(frozen=True, kw_only=True)
class Schedules(Task):
    """The task with every schedule, number of epochs, rate and seed instead of random configurations."""

    def jobs(self) -> list[dict[str, Any]]:
        """See `Task.jobs`: the configuration's number is its place among schedules, epochs and rates."""
        found = []
        for number, (schedule, epochs, power) in enumerate(cells()):
            rate = 10**power * SOUND["batch_size"] ** 0.5 / SOUND["lora_alpha"]
            values = {
                "learning_rate": float(f"{rate:.4g}"),
                "lr_scheduler_type": schedule,
                "num_epochs": epochs,
                **SOUND,
            }
            found += [{"configuration": number, **values, "seed": seed} for seed in SEEDS]
        return sorted(found, key=lambda job: (SEEDS.index(job["seed"]), -job["num_epochs"]))


def cells() -> list[tuple[str, int, float]]:
    """What is trained: (schedule, epochs, power)."""
    return [
        (schedule, epochs, power)
        for schedule in SCHEDULES
        for epochs in (EPOCHS[-1:] if schedule == CONSTANT else EPOCHS)
        for power in POWERS
    ]


def task() -> Schedules:
    """`aerial`, recorded in a folder of its own."""
    aerial = TASKS["aerial"]
    return Schedules(
        name="schedules",
        style=aerial.style,
        data=aerial.data,
        base=aerial.base,
        configurations=len(cells()),
        repeated=0,
        warmup=aerial.warmup,
        only_lowest=True,
    )


def recorded(lines: Sequence[Mapping[str, Any]]) -> Losses:
    """Losses by epoch of every recorded run."""
    places, found = cells(), Losses()
    for line in lines:
        if "epoch" in line:
            schedule, epochs, power = places[line["configuration"]]
            found.setdefault((schedule, epochs, power, line["seed"]), []).append((line["val"], line["test"]))
    return found


def delivered(losses: Losses, schedule: str, epochs: int, power: float, seed: int) -> float | None:
    """The test loss at the epoch with the lowest validation loss of a training of so many epochs; None if it has not
    come to its end, or has no test loss there."""
    trained = losses.get((schedule, EPOCHS[-1] if schedule == CONSTANT else epochs, power, seed), [])[:epochs]
    return min(trained, key=lambda epoch: epoch[0])[1] if len(trained) == epochs else None


def mean(losses: Losses, schedule: str, epochs: int, power: float) -> float | None:
    """Over the seeds; None unless all have a loss."""
    found = [delivered(losses, schedule, epochs, power, seed) for seed in SEEDS]
    values = [value for value in found if value is not None]
    return fmean(values) if len(values) == len(SEEDS) else None


def best(losses: Losses, schedule: str, epochs: int) -> tuple[float, float] | None:
    """(power, mean loss) of the rate with the lowest mean."""
    means = {power: mean(losses, schedule, epochs, power) for power in POWERS}
    known = {power: value for power, value in means.items() if value is not None}
    return min(known.items(), key=lambda each: each[1]) if known else None


def show(losses: Losses) -> None:
    """Print the tables."""
    reference = min(found[1] for e in EPOCHS for s in SCHEDULES if (found := best(losses, s, e)))
    print(f"percent above the lowest mean test loss, {reference:.4f}; '-': not known of each seed, or 10 % above\n")
    names = (*(f"{power:g}" for power in POWERS), "against a constant rate, each at its best")
    print(f"| schedule | epochs | {' | '.join(names)} |")
    print("|---|---|" + "---|" * (len(POWERS) + 1))
    for epochs in EPOCHS:
        for schedule in SCHEDULES:
            row = [mean(losses, schedule, epochs, power) for power in POWERS]
            texts = ["-" if value is None else f"{100 * (value / reference - 1):.2f}" for value in row]
            print(f"| {schedule} | {epochs} | {' | '.join(texts)} | {_against(losses, schedule, epochs)} |")


def _against(losses: Losses, schedule: str, epochs: int) -> str:
    """Difference to the constant rate, percent, with the standard error over the seeds."""
    ours, constant = best(losses, schedule, epochs), best(losses, CONSTANT, epochs)
    if schedule == CONSTANT or ours is None or constant is None:
        return ""
    pairs = [
        (delivered(losses, schedule, epochs, ours[0], seed), delivered(losses, CONSTANT, epochs, constant[0], seed))
        for seed in SEEDS
    ]
    found = [100 * (mine / other - 1) for mine, other in pairs if mine is not None and other is not None]
    return f"{fmean(found):+.2f} ± {stdev(found) / len(found) ** 0.5:.2f}"


def main() -> int:
    """Record, then show; or only show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the recording (default: in the cache)")
    parser.add_argument("--show", action="store_true", help="train nothing")
    args = parser.parse_args()
    found = task()
    work = args.work or cache_folder() / f"recording-{found.name}"
    if not args.show:
        torch.set_num_threads(1)
        Recorder(found, work).run()
    show(recorded(read(work / "epochs.jsonl")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
