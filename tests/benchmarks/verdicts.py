"""How often the verdict errs, and what it costs, on studies of which the truth is known.

    python -m tests.benchmarks.verdicts                          # made-up studies: minutes on one core
    python -m tests.benchmarks.verdicts --table aerial           # configurations and noise of a recorded table

A made-up study has configurations whose true losses lie apart by exponential gaps, and trainings whose noise has heavy
tails (Student's t, 5 degrees of freedom) and differs between configurations (log-normal, 0.4): worse than what the
race assumes. A search sees each once, and its leaders are raced as a study's would be; it has trained the epochs that
rungs on a ladder, the default, expect of so many. From a table of `tests.benchmarks.record` come the true losses (test
loss at the best epoch, mean over seeds), what the search sees (the lowest validation loss of the first seed) and the
noise of repeats (validation loss of the further seeds there).

    wrong        of all studies, those that name a winner which is not the best candidate
    wrong of all the same, if any configuration of the study is better
    bad tie      those that name one in a tie which is worse than the best candidate by more than the margin
    repeats      trainings of a candidate to its best epoch, mean
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from search.planning.rungs import RungPlan
from search.verdict.leaders import APART, FEWEST, SHARE, TOP
from search.verdict.race import FIRST, Candidate, Cell, Limits, Verdict, race
from tests.benchmarks.stored_tables import load

EPOCHS = 5
"""To the best one, in made-up studies."""
WORTH = 0.1
"""Logarithm of the loss above the lowest up to which a table's repeats count: candidates are good ones."""


@dataclass(frozen=True)
class Configuration:
    """One configuration of a study."""

    truth: float
    """Logarithm of its true loss."""
    seen: float
    """Logarithm of the loss that the search saw."""
    epochs: int
    repeat: Callable[[random.Random], float]
    """What a repeat adds to the truth, beside its block."""


def heavy(rng: random.Random) -> float:
    """A number of Student's t with 5 degrees of freedom, its deviation 1."""
    return rng.gauss(0, 1) / math.sqrt(rng.gammavariate(2.5, 2) / 5) / math.sqrt(5 / 3)


def made_up(rng: random.Random, number: int, gap: float, noise: float) -> list[Configuration]:
    """A study of so many configurations, gaps and noise as shares of the loss."""
    found, truth = [], math.log(0.36)
    for _ in range(number):
        own = noise * math.exp(rng.gauss(0, 0.4))
        seen = truth + 1.2 * own * rng.gauss(0, 1)
        found.append(Configuration(truth, seen, EPOCHS, lambda r, own=own: own * heavy(r)))  # type: ignore[misc]
        truth += rng.expovariate(1 / gap)
    return found


def recorded(table: dict[str, Any]) -> tuple[list[Configuration], list[float]]:
    """(configurations of a table, what repeats of the good ones moved by)."""
    runs: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    for run in table["runs"]:
        runs[run["configuration"]].append(run)
    known: list[tuple[float, float, int]] = []
    moves: list[tuple[float, float]] = []
    for seeds in runs.values():
        first, *others = sorted(seeds, key=lambda run: run["seed"])
        losses = [(loss, number) for number, loss in enumerate(first["val"]) if loss is not None]
        if not losses:
            continue
        seen, at = min(losses)
        there = [run for run in (first, *others) if at < len(run["val"]) and run["val"][at] is not None]
        tests = [run["test"][at] for run in there if run["test"][at] is not None]
        if not tests:
            continue
        known.append((math.log(fmean(tests)), math.log(seen), at + 1))
        if len(there) > 2:  # the first seed's epoch was chosen by its loss
            moved = (math.log(there[1]["val"][at]) - math.log(there[2]["val"][at])) / math.sqrt(2)
            moves.append((math.log(seen), moved))
    good = [moved for seen, moved in moves if seen <= min(loss for _, loss, _ in known) + WORTH]
    if not good:
        raise SystemExit("the table has no good configuration with three seeds yet")
    return [
        Configuration(truth, seen, epochs, lambda r: r.choice((-1, 1)) * r.choice(good))
        for truth, seen, epochs in known
    ], good


@dataclass(frozen=True)
class Outcome:
    """What a study came to."""

    verdict: Verdict
    wrong: bool
    wrong_of_all: bool
    bad_tie: bool
    epochs_of_search: float


def decide(rng: random.Random, study: Sequence[Configuration], num_epochs: int) -> Outcome:
    """Race the leaders of a study, as `search.verdict.leaders.field` would have it."""
    order = sorted(range(len(study)), key=lambda n: study[n].seen)
    near = [n for i, n in enumerate(order) if i < 2 or study[n].seen - study[order[0]].seen <= APART][:TOP]
    trained = float(RungPlan(num_epochs).expected(len(study)))
    budget = max(SHARE * trained, FIRST * sum(study[n].epochs for n in near[:FEWEST]))
    while len(near) > FEWEST and FIRST * sum(study[n].epochs for n in near) > budget:
        near.pop()
    candidates = [Candidate(number=n, epochs=study[n].epochs, cost=(rng.random(),)) for n in near]
    losses: dict[Cell, float | None] = {}
    blocks: dict[int, float] = {}
    while (verdict := race(candidates, losses, Limits(epochs=budget))).kind == "running":
        for number, block in verdict.wanted:
            common = blocks.setdefault(block, rng.gauss(0, 0.02))
            losses[number, block] = math.exp(study[number].truth + common + study[number].repeat(rng))
    best = min(study[n].truth for n in near)
    chosen = math.inf if verdict.choice is None else study[verdict.choice].truth
    won = verdict.kind == "winner"
    return Outcome(
        verdict,
        wrong=won and chosen > best,
        wrong_of_all=won and chosen > min(c.truth for c in study),
        bad_tie=verdict.kind == "tied" and chosen - best > verdict.margin,
        epochs_of_search=trained,
    )


def report(name: str, outcomes: Sequence[Outcome]) -> None:
    """A row of the table."""

    def share(judge: Callable[[Outcome], bool]) -> str:
        return f"{100 * fmean(map(judge, outcomes)):.1f}"

    cells = [share(lambda o, kind=kind: o.verdict.kind == kind) for kind in ("winner", "tied", "undecided")]  # type: ignore[misc]
    cells += [share(lambda o: o.wrong), share(lambda o: o.wrong_of_all), share(lambda o: o.bad_tie)]
    repeats = fmean(sum(s.repeats for s in o.verdict.standings) for o in outcomes)
    cost = fmean(o.verdict.epochs / o.epochs_of_search for o in outcomes)
    print("| " + " | ".join([name, *cells, f"{repeats:.1f}", f"{100 * cost:.0f}"]) + " |", flush=True)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", help="a recorded table (tests.benchmarks.record): its name, or a file")
    parser.add_argument("--studies", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print("| study | winner % | tied % | not decided % | wrong % | wrong of all % | bad tie % | repeats | cost % |")
    print("|" + "---|" * 9)
    rng = random.Random(args.seed)
    if args.table is not None:
        table = load(args.table)
        known, good = recorded(table)
        scale, spread = math.sqrt(fmean(m * m for m in good)), stdev(c.seen - c.truth for c in known)
        print(
            f"<!-- {len(known)} configurations; a repeat moves by {scale:.4f} ({len(good)} of them); "
            f"seen - truth by {spread:.4f} -->"
        )
        for number in (12, 32):
            studies = [rng.sample(known, min(number, len(known))) for _ in range(args.studies)]
            outcomes = [decide(rng, study, table["base"]["num_epochs"]) for study in studies]
            report(f"{args.table}, {number} trials", outcomes)
        return 0
    for number in (12, 32, 128):
        for noise in (0.004, 0.008):
            for gap in (0.0005, 0.002, 0.005):
                made = (made_up(rng, number, gap, noise) for _ in range(args.studies))
                name = f"{number} trials, gaps {100 * gap:g} %, noise {100 * noise:g} %"
                report(name, [decide(rng, study, 6) for study in made])
    return 0


if __name__ == "__main__":
    sys.exit(main())
