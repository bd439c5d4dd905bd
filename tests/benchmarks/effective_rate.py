"""How much one coordinate alone explains: learning rate, effective rates, and other powers of batch and rank.

    python -m tests.benchmarks.effective_rate aerial mixed

For each coordinate, the share of the variance of log(best validation loss so far) over the table's configurations
that a cubic in the coordinate's logarithm explains, after epochs 1, 3, 6, 12 and 20, for the lower and the upper half
of the ranks, and where the best tenth of the configurations lies. Runs with the table's first seed only.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.benchmarks.stored_tables import load
from tests.benchmarks.world import FIRST_SEED

Array = NDArray[np.float64]
Run = Mapping[str, Any]

EPOCHS = (1, 3, 6, 12, 20)
DEGREE = 3


def power(rate: float = 1, alpha: float = 0, rank: float = 0, batch: float = 0) -> Callable[[Run], float]:
    """log10 of a product of powers."""

    def coordinate(run: Run) -> float:
        powers = {"learning_rate": rate, "lora_alpha": alpha, "lora_r": rank, "batch_size": batch}
        return float(sum(exponent * np.log10(run[name]) for name, exponent in powers.items()))

    return coordinate


COORDINATES: dict[str, Callable[[Run], float]] = {
    "rate": power(),
    "rate x alpha/r": power(alpha=1, rank=-1),
    "rate x alpha": power(alpha=1),
    "rate x alpha / batch^0.25": power(alpha=1, batch=-0.25),
    "z = rate x alpha / sqrt(batch)": power(alpha=1, batch=-0.5),
    "rate x alpha / batch^0.75": power(alpha=1, batch=-0.75),
    "rate x alpha / batch": power(alpha=1, batch=-1),
    "z / r^(1/4)": power(alpha=1, rank=-0.25, batch=-0.5),
    "z / r^(1/2)": power(alpha=1, rank=-0.5, batch=-0.5),
    "rate x sqrt(alpha) / sqrt(batch)": power(alpha=0.5, batch=-0.5),
}
BY_PARTS = ("rate", "rate x alpha/r", "rate x alpha", "z = rate x alpha / sqrt(batch)", "z / r^(1/4)")


@dataclass(frozen=True)
class Explained:
    """One coordinate against the losses of some runs."""

    runs: int
    share: float
    """Of the variance, 0 to 1; NaN with too few runs for a cubic."""
    best: float
    """Median coordinate of the best tenth of the runs, at least three."""
    low: float
    high: float
    """The ends of that tenth."""


def explained(runs: Sequence[Run], coordinate: Callable[[Run], float], epochs: int) -> Explained:
    """How much a coordinate explains of the best validation loss within so many epochs."""
    pairs = [(coordinate(run), _best(run, epochs)) for run in runs]
    known = np.array([(x, np.log(y)) for x, y in pairs if np.isfinite(y)]).reshape(-1, 2)
    x, y = known[:, 0], known[:, 1]
    best = x[np.argsort(y)[: max(3, len(y) // 10)]]
    where = tuple(map(float, (np.median(best), best.min(), best.max()))) if len(best) else (np.nan,) * 3
    if len(known) <= DEGREE + 1:
        return Explained(len(known), float("nan"), *where)
    fit = np.polynomial.Polynomial.fit(x, y, DEGREE)
    return Explained(len(known), float(1 - np.var(y - fit(x)) / np.var(y)), *where)


def _best(run: Run, epochs: int) -> float:
    return min((loss for loss in run["val"][:epochs] if loss is not None), default=float("inf"))


def report(table: Mapping[str, Any]) -> dict[str, Any]:
    """Print the tables; the figures as plain data."""
    runs = [run for run in table["runs"] if run["seed"] == FIRST_SEED]
    last = table["base"]["num_epochs"]
    at = sorted({epoch for epoch in EPOCHS if epoch < last} | {last})
    ranks = sorted(run["lora_r"] for run in runs)
    middle = ranks[len(ranks) // 2]
    halves = {
        f"r < {middle}": [run for run in runs if run["lora_r"] < middle],
        f"r >= {middle}": [run for run in runs if run["lora_r"] >= middle],
    }
    print(f"\n## {table['task']}: {len(runs)} configurations, {last} epochs\n")
    print(f"| share of variance explained | {' | '.join(f'{e} ep.' for e in at)} | best tenth, log10 |")
    print("|" + "---|" * (len(at) + 2))
    figures: dict[str, Any] = {}
    for name, coordinate in COORDINATES.items():
        found = {epoch: explained(runs, coordinate, epoch) for epoch in at}
        figures[name] = {"by_epoch": {epoch: asdict(each) for epoch, each in found.items()}}
        end = found[last]
        shares = " | ".join(f"{found[epoch].share:.2f}" for epoch in at)
        print(f"| {name} | {shares} | {end.best:.2f} ({end.low:.2f} to {end.high:.2f}) |")
    print(f"\n| by rank, {last} epochs | {' | '.join(halves)} | {' | '.join(f'best, {half}' for half in halves)} |")
    print("|" + "---|" * (2 * len(halves) + 1))
    for name in BY_PARTS:
        parts = {half: explained(some, COORDINATES[name], last) for half, some in halves.items()}
        figures[name]["by_rank"] = {half: asdict(each) for half, each in parts.items()}
        cells = [f"{each.share:.2f}" for each in parts.values()] + [f"{each.best:.2f}" for each in parts.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\nWhere the best tenth lies by epoch, log10 z:", end=" ")
    z = figures["z = rate x alpha / sqrt(batch)"]["by_epoch"]
    print(", ".join(f"{epoch}: {z[epoch]['best']:.2f}" for epoch in at))
    return figures


def main() -> int:
    """Print the tables of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", help="names or files of tables")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()
    found = {name: report(load(name)) for name in args.tables}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
