"""Are the forecasts of the curves honest? Trials of a table seen for a few epochs, beside others, against what came.

    python -m tests.benchmarks.reliability --table aerial --seeds 40

Each round draws some runs of the table, shows the model (`search.planning.curves`) the beginning of each, and asks for
the mean validation loss of the last third of one of them. Printed by the epochs that were seen of it: the median error
of the forecast, its bias, and how often its 80 % and 50 % intervals hold what came. Runs that end far above the best
(diverged ones) are left out of the count: by how much they are worse is nothing that a search asks.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from search.planning.coordinates import Coordinates
from search.planning.prior import Prior
from search.planning.worth import Known, Outlook
from tests.benchmarks import stored_tables
from tests.benchmarks.world import FIRST_SEED, SEARCHED, World

SEEN = (0, 1, 2, 3, 5, 8, 12)
BESIDE = 13
NEAR = 0.1
"""Log loss above the best of the table up to which a run is counted."""
HALF, MOST = 0.6745, 1.2816
"""Standard deviations to either side of the mean that hold 50 % and 80 % of a normal distribution."""


@dataclass(frozen=True)
class Forecast:
    """One forecast and what came, in log loss."""

    seen: int
    error: float
    """Forecast less what came."""
    sd: float


def forecasts(world: World, seeds: int) -> Iterator[Forecast]:
    """Forecasts of the table's own runs; none is made between them."""
    coordinates = Coordinates(world.definition().space)
    runs = [run for run in world.fitted if run["seed"] == FIRST_SEED]
    late = range(world.epochs - world.epochs // 3 + 1, world.epochs + 1)
    best = min(_mean(run, late) for run in runs)
    good = [run for run in runs if _mean(run, late) < best + NEAR]
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        others = [runs[i] for i in rng.choice(len(runs), min(BESIDE, len(runs)), replace=False)]
        target = good[int(rng.integers(len(good)))]
        shown = [
            _known(coordinates, world, run, number, int(rng.integers(1, world.epochs + 1)))
            for number, run in enumerate(others)
            if run is not target
        ]
        for seen in (each for each in SEEN if each < late[0]):
            asked = _known(coordinates, world, target, 99, seen)
            outlook = Outlook([*shown, asked] if seen else shown, Prior())
            mean, sd = outlook.at([asked], [list(late)])
            logs = [math.log(outlook.curves.loss(each)) for each in mean]
            yield Forecast(seen, float(np.mean(logs)) - _mean(target, late), float(np.mean(sd)))


def _mean(run: Mapping[str, Any], epochs: range) -> float:
    return float(np.mean([math.log(run["val"][epoch - 1]) for epoch in epochs]))


def _known(coordinates: Coordinates, world: World, run: Mapping[str, Any], number: int, seen: int) -> Known:
    values = {"gradient_accumulation_steps": 1, **{name: run[name] for name in SEARCHED}}
    z, rest = coordinates.of(values)
    return Known(number if seen else -1, z, tuple(rest), tuple(run["val"][:seen]), world.epochs)


def table(found: Sequence[Forecast]) -> list[str]:
    """The forecasts by epochs seen, as Markdown."""
    lines = ["| epochs seen | forecasts | median error, % | bias, % | 80 % interval holds | 50 % interval holds |"]
    lines.append("|---|---|---|---|---|---|")
    for seen in sorted({each.seen for each in found}):
        here = [each for each in found if each.seen == seen]
        errors = np.array([each.error for each in here])
        off = np.array([abs(each.error) / each.sd for each in here])
        lines.append(
            f"| {seen} | {len(here)} | {100 * np.median(np.abs(errors)):.1f} | {100 * errors.mean():+.1f} "
            f"| {np.mean(off <= MOST):.0%} | {np.mean(off <= HALF):.0%} |"
        )
    return lines


def main() -> None:
    """Print the table of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="aerial")
    parser.add_argument("--seeds", type=int, default=200)
    args = parser.parse_args()
    world = World(stored_tables.load(args.table))
    print("\n".join(table(list(forecasts(world, args.seeds)))))


if __name__ == "__main__":
    main()
