"""Compares search strategies on tables of real training runs, without training: minutes instead of weeks.

    python -m tests.benchmarks.strategies                         # all tables of the repository, all strategies
    python -m tests.benchmarks.strategies --table aerial --only optuna,naive,ours --seeds 20
    python -m tests.benchmarks.strategies --curves FILE.json      # the stopping rules alone, on recorded runs

Strategies run with the product's own samplers, pruners and queue, and with Optuna's (`contenders`), on a world between
whose runs a surrogate stands (`world`; its error is printed first). The incumbent is named by the validation loss, as
in a study; what it is worth is judged by the test loss, which no strategy sees (`judged`). The budget is in epochs of
all trials together.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from tests.benchmarks import judged, stored_tables
from tests.benchmarks.contenders import STRATEGIES, Setting
from tests.benchmarks.replaying import replay
from tests.benchmarks.world import World
from tests.benchmarks.world_error import describe, left_out

FULL_TRIALS = 40
"""The budget, unless another is named: that of so many full trainings."""

_world: World | None = None
"""The world of this process; a worker is forked with it."""


def study(name: str, seed: int, slots: int, budget: int) -> judged.Study:
    """One replayed study of a strategy on the process' world; the seed is also that of the noise."""
    world = _world
    assert world is not None
    definition = world.definition(seed=seed)
    play = STRATEGIES[name].make(Setting(definition=definition, slots=slots, budget=budget, seed=seed))
    found = replay(play, definition, lambda values, trial: world.curve(values, seed + 1), slots=slots, budget=budget)
    return judged.judge(found, world.best, seed)


def quiet() -> None:
    """No warnings, no lines of Optuna's log."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def _study(job: tuple[str, int, int, int]) -> tuple[str, judged.Study]:
    quiet()
    return job[0], study(*job)


def compare(
    world: World, names: Sequence[str], *, seeds: int, slots: int, budget: int, jobs: int = 1
) -> dict[str, list[judged.Study]]:
    """All studies by strategy, in the order of the seeds."""
    global _world
    _world = world
    work = [
        (name, seed, slots, budget)
        for name in names
        for seed in range(min(seeds, STRATEGIES[name].most_seeds or seeds))
    ]
    found: dict[str, list[judged.Study]] = {name: [] for name in names}
    if jobs == 1:
        results = map(_study, work)
        for name, each in results:
            found[name].append(each)
        return found
    began = time.monotonic()
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for number, (name, each) in enumerate(pool.imap(_study, work, chunksize=1), 1):
            found[name].append(each)
            if number % 100 == 0:
                left = (time.monotonic() - began) * (len(work) / number - 1)
                print(f"{number}/{len(work)} studies, about {left:.0f} s left", file=sys.stderr, flush=True)
    return found


def report(name: str, args: argparse.Namespace, slots: int) -> dict[str, Any]:
    """Compare on one table and print; the figures as plain data."""
    world = World(stored_tables.load(name))
    budget = args.epochs or FULL_TRIALS * world.epochs
    print(f"\n## {world.name}, {slots} side by side, {budget} epochs\n")
    print("\n".join(describe(world)), flush=True)
    began = time.monotonic()
    studies = compare(world, args.only, seeds=args.seeds, slots=slots, budget=budget, jobs=args.jobs)
    marks = judged.marks_of(budget, world.epochs)
    figures = {each: judged.summary(studies[each], marks, world.tie()) for each in args.only}
    print("\n".join(judged.as_text(figures, marks, world.tie())))
    print(f"\n{time.monotonic() - began:.0f} s", flush=True)
    if args.plot:
        args.plot.mkdir(parents=True, exist_ok=True)
        title = f"{world.name}: {len(world.runs)} runs, {slots} side by side"
        judged.plot(studies, budget, title, args.plot / f"strategies-{world.name}-{slots}.svg")
    return {
        "table": world.name,
        "runs": len(world.runs),
        "slots": slots,
        "budget": budget,
        "best_test": world.best,
        "surrogate_optimum": world.optimum,
        "test_at_lowest_validation": world.named,
        "tie": world.tie(),
        "error": [vars(each) for each in left_out(world)],
        "strategies": figures,
    }


def _plain(value: Any) -> Any:
    """JSON has no infinity: a goal that was never reached is null."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _names(text: str) -> list[str]:
    found = text.split(",")
    unknown = [name for name in found if name not in STRATEGIES]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}; known: {', '.join(STRATEGIES)}")
    return found


def main() -> int:
    """Run the comparison of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="strategies:\n" + "\n".join(f"  {s.name:15}{s.about}" for s in STRATEGIES.values()),
    )
    parser.add_argument("--table", action="append", help="name or file of a table; more than once for several")
    parser.add_argument("--only", type=_names, default=list(STRATEGIES), help="names of strategies, by commas")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--slots", type=int, action="append", help="trials side by side (default 8; e.g. also 1)")
    parser.add_argument("--epochs", type=int, help=f"budget (default: {FULL_TRIALS} full trainings)")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="folder for the plots of regret")
    parser.add_argument("--curves", type=Path, help="replay the stopping rules alone on these recorded runs")
    parser.add_argument("--copies", type=int, default=0, help="so many runs like each recorded one beside it")
    parser.add_argument("--copy-seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    if args.curves:
        from tests.benchmarks import recorded_rules

        found: Any = recorded_rules.report(args.curves, args.copies, args.copy_seed)
    else:
        names = args.table or stored_tables.names()
        if not names:
            raise SystemExit("the repository has no table yet: record one (tests.benchmarks.record), or name a file")
        found = [report(name, args, slots) for name in names for slots in (args.slots or [8])]
    if args.json:
        args.json.write_text(json.dumps(_plain(found), indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
