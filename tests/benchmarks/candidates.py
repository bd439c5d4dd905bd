"""Who should be repeated for the verdict: how good the best of the first few is, by how they are picked.

    python -m tests.benchmarks.candidates --table aerial --trials 12 --slots 8 --seeds 20
    python -m tests.benchmarks.candidates --only "ours,ours prior low,optuna,ladder"
    python -m tests.benchmarks.candidates --full --trials 2,3,6,12 --only ours,optuna --plot by-budget.svg

Studies are replayed on a table to their end: ours at so many trials, the others at the epochs of so many in full. Then
their trials are put in order: those that are complete alone or those that were paused and given up as well, by their
lowest validation loss or by what the model of all curves makes of it. Printed is how far the best of the first one,
three and five lies above the best of the table, by the expected test loss: what repeats that never err would come to.
That of all trials is the least that any order of them could come to. Beside the epochs that the studies took stands
what they come to with the least repeats, those of three candidates on three blocks.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from search.planning.thaw import FreezeThaw
from search.pruning import plan_of
from search.verdict.leaders import FEWEST
from search.verdict.race import FIRST as FIRST_BLOCKS
from tests.benchmarks import stored_tables
from tests.benchmarks.contenders import STRATEGIES, Setting
from tests.benchmarks.replaying import replay
from tests.benchmarks.strategies import quiet
from tests.benchmarks.world import World

FIRST: tuple[int | None, ...] = (1, 3, 5, None)
"""How many; None for all."""


@dataclass(frozen=True)
class Ended:
    """A trial at its lowest validation loss."""

    complete: bool
    epoch: int
    """Where that is; a repeat of it trains so many."""
    loss: float
    by_curves: float | None
    """The same epoch's loss by the model, freed of noise (bent, for the order alone); None where there is none."""
    expected: float
    """Its expected test loss."""


def _by_curves(trial: Ended) -> float:
    assert trial.by_curves is not None
    return trial.by_curves


RULES: Mapping[str, tuple[Callable[[Ended], bool], Callable[[Ended], float]]] = {
    "complete, by loss": (lambda trial: trial.complete, lambda trial: trial.loss),
    "complete, by curves": (lambda trial: trial.complete, _by_curves),
    "all that ended, by loss": (lambda trial: True, lambda trial: trial.loss),
    "all that ended, by curves": (lambda trial: True, _by_curves),
}
USED = "all that ended, by loss"
"""The product's (`search.verdict.leaders`)."""

_world: World | None = None


def ended(name: str, seed: int, trials: int, slots: int, full: bool) -> tuple[list[Ended], int]:
    """(the trials of one replayed study, the epochs that it took).

    Args:
        name: Of the strategy.
        seed: Of the study and the noise.
        trials: In full, the budget.
        slots: Trials side by side.
        full: Whether ours goes on with more configurations until the budget is spent, as with `--epochs`.
    """
    world = _world
    assert world is not None
    definition, budget = world.definition(seed=seed), trials * world.epochs
    play = STRATEGIES[name].make(
        Setting(definition=definition, slots=slots, budget=budget, seed=seed, trials=None if full else trials)
    )
    found = replay(play, definition, lambda values, trial: world.curve(values, seed + 1), slots=slots, budget=budget)
    plan = plan_of(play.study.pruner)
    outlook, known = None, {}
    if isinstance(plan, FreezeThaw):
        outlook = plan.outlook(play.study.get_trials(deepcopy=False))
        known = {trial.number: trial for trial in outlook.trials}
    rows = []
    for number, run in found.runs.items():
        if not run.done or (outlook is not None and number not in known):
            continue
        epoch = int(np.argmin(run.curve.val[: run.done])) + 1
        rows.append(
            Ended(
                complete=number in found.ends and found.ends[number].state == "COMPLETE",
                epoch=epoch,
                loss=float(run.curve.val[epoch - 1]),
                by_curves=None if outlook is None else float(outlook.at([known[number]], [[epoch]])[0][0]),
                expected=float(run.curve.expected[epoch - 1]),
            )
        )
    return rows, found.spent


def _job(job: tuple[str, int, int, int, bool]) -> tuple[list[Ended], int]:
    quiet()
    return ended(*job)


def behind(rows: list[Ended], rule: str, first: int | None, best: float) -> float:
    """How far the best of the first few, or of all, lies above the best of the table; infinite without any."""
    among, order = RULES[rule]
    picked = sorted(filter(among, rows), key=order)[:first]
    return min((row.expected for row in picked), default=math.inf) / best - 1


def repeats(rows: list[Ended], rule: str) -> int:
    """Epochs of the least repeats of the first few."""
    among, order = RULES[rule]
    return FIRST_BLOCKS * sum(row.epoch for row in sorted(filter(among, rows), key=order)[:FEWEST])


@dataclass(frozen=True)
class Line:
    """What a strategy comes to with so many trials."""

    name: str
    rule: str
    epochs: float
    """Median of the studies'."""
    decided: float
    """The same with the least repeats."""
    behind: Sequence[tuple[float, float]]
    """(median, 90 % quantile) for each of `FIRST`, in percent."""

    def __str__(self) -> str:
        cells = " | ".join(f"{median:.2f} ({high:.2f})" for median, high in self.behind)
        return f"| {self.name} | {self.rule} | {self.epochs:.0f} | {self.decided:.0f} | {cells} |"


def lines(name: str, studies: Sequence[tuple[list[Ended], int]], best: float) -> list[Line]:
    """What the replayed studies of a strategy come to, by each rule that is told."""
    found = []
    for rule in RULES if name == "freeze-thaw" else [USED]:
        epochs = float(np.median([spent for _, spent in studies]))
        decided = float(np.median([spent + repeats(rows, rule) for rows, spent in studies]))
        shares = [[100 * behind(rows, rule, first, best) for rows, _ in studies] for first in FIRST]
        ends = [tuple(np.quantile(each, [0.5, 0.9], method="closest_observation")) for each in shares]
        found.append(Line(name, rule, epochs, decided, [(float(median), float(high)) for median, high in ends]))
    return found


def plot(found: Sequence[Line], title: str, path: Path) -> None:
    """The best of the first three by the epochs spent: median and, dotted, the tenth study of ten."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    three = FIRST.index(3)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(line.name for line in found):
        own = sorted((line for line in found if line.name == name and line.rule == USED), key=lambda line: line.epochs)
        at = [line.epochs for line in own]
        (drawn,) = axes.plot(
            at, [line.behind[three][0] for line in own], "-o", label=name, linewidth=1.8, markersize=4
        )
        axes.plot(at, [line.behind[three][1] for line in own], ":", color=drawn.get_color(), linewidth=1.2)
    axes.set(title=title, xlabel="epochs trained by the search", ylabel="% above the table's best", ylim=(0, 3))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "lora-search", "svg.fonttype": "none"}):  # text as text: a third
        figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Print the table of the command line."""
    global _world
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", default="aerial")
    parser.add_argument("--trials", type=lambda text: [int(each) for each in text.split(",")], default=[12])
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="ours", help="names of strategies, with commas")
    parser.add_argument("--full", action="store_true", help="all the epochs of so many trials, as --epochs gives them")
    parser.add_argument("--plot", type=Path, help="draw the best of the first three by epochs, for several --trials")
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    names = args.only.split(",")
    _world = World(stored_tables.load(args.table))
    first = " | ".join(f"first {n}" if n else "all" for n in FIRST)
    found = []
    for trials in args.trials:
        jobs = [(name, seed, trials, args.slots, args.full) for name in names for seed in range(args.seeds)]
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            studies = pool.map(_job, jobs, chunksize=1)
        print(
            f"{args.table}, {trials} trials, {args.slots} side by side, {args.seeds} seeds: median (90 % quantile), %"
        )
        print(f"| | candidates | epochs | with repeats | {first} |\n|---|---|---|---|" + "---|" * len(FIRST))
        for name in names:
            own = [study for (of, *_), study in zip(jobs, studies, strict=True) if of == name]
            found += lines(name, own, _world.best)
            print("\n".join(map(str, found[-len(RULES if name == "freeze-thaw" else [USED]) :])), flush=True)
    if args.plot:
        side = "one at a time" if args.slots == 1 else f"{args.slots} side by side"
        plot(found, f"{args.table}, {side}: best of the first three, {args.seeds} studies", args.plot)


if __name__ == "__main__":
    main()
