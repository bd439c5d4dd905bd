"""Who should be repeated for the verdict: how good the best of the first few is, by how they are picked.

    python -m tests.benchmarks.candidates --table aerial --trials 12 --slots 8 --seeds 20

Studies of the product's are replayed on a table to their end, then their trials are put in order: those that are
complete alone or those that were paused and given up as well, by their lowest validation loss or by what the model of
all curves makes of it. Printed is how far the best of the first one, three and five lies above the best of the table,
by the expected test loss: what repeats that never err would come to.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from search.planning.thaw import FreezeThaw
from search.pruning import plan_of
from tests.benchmarks import stored_tables
from tests.benchmarks.contenders import Setting, ours
from tests.benchmarks.replaying import replay
from tests.benchmarks.strategies import quiet
from tests.benchmarks.world import World

FIRST = (1, 3, 5)


@dataclass(frozen=True)
class Ended:
    """A trial at its lowest validation loss."""

    complete: bool
    loss: float
    by_curves: float
    """The same epoch's loss by the model, freed of noise (bent, for the order alone)."""
    expected: float
    """Its expected test loss."""


RULES: Mapping[str, tuple[Callable[[Ended], bool], Callable[[Ended], float]]] = {
    "complete, by loss": (lambda trial: trial.complete, lambda trial: trial.loss),
    "complete, by curves": (lambda trial: trial.complete, lambda trial: trial.by_curves),
    "all that ended, by loss": (lambda trial: True, lambda trial: trial.loss),
    "all that ended, by curves": (lambda trial: True, lambda trial: trial.by_curves),
}

_world: World | None = None


def ended(seed: int, trials: int, slots: int) -> list[Ended]:
    """The trials of one replayed study."""
    world = _world
    assert world is not None
    definition, budget = world.definition(seed=seed), trials * world.epochs
    play = ours(Setting(definition=definition, slots=slots, budget=budget, seed=seed, trials=trials))
    found = replay(play, definition, lambda values, trial: world.curve(values, seed + 1), slots=slots, budget=budget)
    plan = plan_of(play.study.pruner)
    assert isinstance(plan, FreezeThaw)
    outlook = plan.outlook(play.study.get_trials(deepcopy=False))
    rows = []
    for known in outlook.trials:
        run = found.runs[known.number]
        if not run.done:
            continue
        epoch = int(np.argmin(run.curve.val[: run.done])) + 1
        rows.append(
            Ended(
                complete=known.number in found.ends and found.ends[known.number].state == "COMPLETE",
                loss=float(run.curve.val[epoch - 1]),
                by_curves=float(outlook.at([known], [[epoch]])[0][0]),
                expected=float(run.curve.expected[epoch - 1]),
            )
        )
    return rows


def _job(job: tuple[int, int, int]) -> list[Ended]:
    quiet()
    return ended(*job)


def behind(rows: list[Ended], rule: str, first: int, best: float) -> float:
    """How far the best of the first few lies above the best of the table; infinite without any."""
    among, order = RULES[rule]
    picked = sorted(filter(among, rows), key=order)[:first]
    return min((row.expected for row in picked), default=math.inf) / best - 1


def main() -> None:
    """Print the table of the command line."""
    global _world
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="aerial")
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    _world = World(stored_tables.load(args.table))
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        studies = pool.map(_job, [(seed, args.trials, args.slots) for seed in range(args.seeds)], chunksize=1)
    print(
        f"{args.table}, {args.trials} trials, {args.slots} side by side, {args.seeds} seeds: median (90 % quantile), %"
    )
    print("| candidates | " + " | ".join(f"first {n}" for n in FIRST) + " |\n|---|" + "---|" * len(FIRST))
    for rule in RULES:
        cells = []
        for first in FIRST:
            shares = [100 * behind(rows, rule, first, _world.best) for rows in studies]
            median, high = np.quantile(shares, [0.5, 0.9], method="closest_observation")
            cells.append(f"{median:.2f} ({high:.2f})")
        print(f"| {rule} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
