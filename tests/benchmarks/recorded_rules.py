"""The stopping rules alone, replayed on recorded runs (the JSON that `search.diagnose` reads).

Runs of one model and one number of samples are compared with each other; they train side by side, in the order of
the file. Printed are, by run and rule, the epochs trained, and where the rule ended the run, what was forecast for its
last epoch and what came; by rule, whether the best run of each group was kept: trained to the epoch of its lowest
loss. A run that no other is comparable with is followed, and left out of that count: a rule that compares runs says
nothing about one alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import MedianPruner
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

from search import records
from search.diagnosis.curve import Curve as Recorded
from search.diagnosis.noise import VAL_NOISE, calm, log_gain, series
from search.diagnosis.recorded import curves, read_runs
from search.pruning import PRUNERS
from search.space import Choice
from search.storage.optuna_private import OrderedStudy
from search.study import Study
from tests.benchmarks.contenders import RUNGS, Rungs, Setting, optunas, ours, pausing, products
from tests.benchmarks.replaying import Play, replay
from tests.benchmarks.world import FIRST_SEED, SEARCHED, Curve

Rule = Callable[[Setting], Play]
FEWEST_FOR_A_FORECAST = 3
LEVEL, EPOCH, RATE = 0.003, 0.003, 0.05
"""Of a copied run: standard deviations of its level and of each of its losses, relative, and of its learning rate, in
decades."""


def _product_rule(name: str) -> Rule:
    return lambda setting: products(setting, "random", name)


RULES: dict[str, Rule] = {
    **{name: _product_rule(name) for name in PRUNERS},
    "optuna-median": lambda s: optunas(s, RandomSampler(seed=0), MedianPruner()),
    "pause 1, 3, 9": lambda s: Play(study=Rungs(RandomSampler(seed=0)), judge=pausing(RUNGS)),
    "ours": ours,
}


def forecast(val: Mapping[int, float], epoch: int) -> float | None:
    """The validation loss at an epoch to come, by the law of `search.diagnosis.pace`; None with too few epochs."""
    points = calm(series(val.items()), VAL_NOISE)
    if len(points) < FEWEST_FOR_A_FORECAST:
        return None
    last, loss = points[-1]
    return loss * (1 - log_gain(points) * math.log(epoch / last))


@dataclass(frozen=True)
class Fate:
    """What a rule did to one run."""

    run: str
    trained: int
    of: int
    reason: str
    forecast: float | None
    """For the last epoch, where the rule ended the run before it."""
    came: float | None


@dataclass(frozen=True)
class Verdict:
    """What a rule did to a group of runs."""

    fates: tuple[Fate, ...]
    kept: bool
    """Whether the best run was trained to the epoch of its lowest loss."""
    regret: float
    """Lowest loss that was seen over the lowest there is, less 1."""


def groups(path: Path) -> dict[str, list[tuple[str, Recorded]]]:
    """(name, curve) of the runs with validation losses, by what makes them comparable."""
    found: dict[str, list[tuple[str, Recorded]]] = {}
    for name, curve in curves(read_runs(path)):
        if _losses(curve):
            samples = curve.config.get("max_samples")
            found.setdefault(f"{curve.config.get('model_name', 'a model')}, {samples} samples", []).append(
                (name, curve)
            )
    return found


def with_copies(runs: list[tuple[str, Recorded]], copies: int, seed: int) -> list[tuple[str, Recorded]]:
    """The runs of a group and so many like each of them, in random order."""
    rng = np.random.default_rng(seed)
    found = list(runs)
    for copy in range(1, copies + 1):
        for name, curve in runs:
            level = math.exp(rng.normal(0, LEVEL))
            factor = 10 ** rng.normal(0, RATE)
            config = {k: v * factor if k == "learning_rate" else v for k, v in curve.config.items()}
            epochs = tuple(
                replace(
                    each,
                    val_loss=None if each.val_loss is None else each.val_loss * level * math.exp(rng.normal(0, EPOCH)),
                )
                for each in curve.epochs
            )
            found.append((f"{name}, like it {copy}", replace(curve, config=config, epochs=epochs)))
    return [found[i] for i in rng.permutation(len(found))] if copies else found


def follow(rule: Rule, runs: list[tuple[str, Recorded]]) -> Verdict:
    """Replay a rule on a group."""
    known = [_losses(curve) for _, curve in runs]
    most = max(max(losses) for losses in known)
    definition = _definition(runs, most)
    # As many trials as there are runs: no other could begin in the place of one that pauses.
    play = rule(Setting(definition=definition, slots=len(runs), budget=most * len(runs), trials=len(runs)))
    for (_, curve), losses in zip(runs, known, strict=True):
        params = {name: curve.config[name] for name in definition.space if name in curve.config}
        play.study.enqueue_trial(params, user_attrs={records.OVERRIDES: {"num_epochs": max(losses)}})
    play = replace(play, ask=_queued(play))

    def curve_of(_: Mapping[str, Any], trial: optuna.Trial) -> Curve:
        return _curve(runs[trial.number][1])

    found = replay(play, definition, curve_of, slots=len(runs), budget=most * len(runs))
    fates = []
    for number, (name, _) in enumerate(runs):
        val, last = known[number], max(known[number])
        trained = found.runs[number].done if number in found.runs else 0
        cut = trained < last
        guess = forecast({e: v for e, v in val.items() if e <= trained}, last) if cut else None
        ended = found.ends.get(number)
        reason = ended.reason if ended else "not begun"
        fates.append(Fate(name, trained, last, reason, guess, val[last] if cut else None))
    lowest = [min(losses.values()) for losses in known]
    seen = [
        min((v for e, v in losses.items() if e <= fate.trained), default=math.inf)
        for losses, fate in zip(known, fates, strict=True)
    ]
    best = int(np.argmin(lowest))
    return Verdict(tuple(fates), seen[best] == lowest[best], min(seen) / min(lowest) - 1)


def _definition(runs: list[tuple[str, Recorded]], epochs: int) -> Study:
    """The group as a study: what its runs name of the searched fields, each value a choice."""
    space = {}
    for name in SEARCHED:
        values = {curve.config.get(name) for _, curve in runs}
        if None not in values:
            space[name] = Choice(tuple(sorted(values)))  # type: ignore[type-var]
    space = space or {"seed": Choice((FIRST_SEED,))}  # of runs that name none; a study needs one
    base = {"model": "mini", "data": "mini", "num_epochs": epochs}
    return Study(name="recorded", description="recorded runs", base=base, space=space, n_trials=len(runs))


def _queued(play: Play) -> Callable[[], optuna.Trial | None]:
    """The study's own `ask` while a run waits that may begin or go on: there are no others."""
    ask, study = play.ask or play.study.ask, play.study

    def next_trial() -> optuna.Trial | None:
        waiting = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        if not waiting or (isinstance(study, OrderedStudy) and not study.in_order(waiting)):
            return None
        return ask()

    return next_trial


def _losses(curve: Recorded) -> dict[int, float]:
    found = {r.epoch: r.val_loss for r in curve.epochs}
    return {epoch: loss for epoch, loss in found.items() if loss is not None}


def _curve(recorded: Recorded) -> Curve:
    """A recorded run as a world gives one; it has no test loss."""
    losses = _losses(recorded)
    training = {r.epoch: r.train_loss for r in recorded.epochs if r.train_loss is not None}
    epochs = range(1, max(losses) + 1)
    val, train = (np.array([known.get(e, math.nan) for e in epochs]) for known in (losses, training))
    return Curve(val, val, train, False, val, float(np.nanmin(val)))


def report(path: Path, copies: int = 0, seed: int = 0) -> dict[str, Any]:
    """Print the tables; the figures as plain data.

    Args:
        path: Of the recorded runs.
        copies: Runs like each of them that are put beside it.
        seed: Of what differs in those.
    """
    totals: dict[str, list[Verdict]] = {name: [] for name in RULES}
    compared = 0
    for group, own in groups(path).items():
        runs = with_copies(own, copies, seed) if len(own) > 1 else own
        verdicts = {name: follow(rule, runs) for name, rule in RULES.items()}
        print(f"\n## {group}\n\n| epochs trained | all | {' | '.join(RULES)} |\n{'|' + '---|' * (len(RULES) + 2)}")
        for number, (name, _) in enumerate(runs):
            fates = [verdict.fates[number] for verdict in verdicts.values()]
            print(f"| {name} | {fates[0].of} | {' | '.join(map(_cell, fates))} |")
        if len(runs) == 1:
            continue
        compared += 1
        kept = ["kept" if each.kept else f"lost, {each.regret:.1%} worse" for each in verdicts.values()]
        print(f"| the best run | | {' | '.join(kept)} |")
        for name, verdict in verdicts.items():
            totals[name].append(verdict)
    print("\nIn a cell: epochs, and where the rule ended the run: forecast of its last loss -> what came.")
    if not compared:
        print("\nNo two runs of the file are comparable.")
        return {}
    print(f"\nOver the {compared} groups of several runs:")
    print(f"\n| rule | epochs | best kept | largest regret |\n{'|' + '---|' * 4}")
    for name, found in totals.items():
        trained = sum(fate.trained for verdict in found for fate in verdict.fates)
        every = sum(fate.of for verdict in found for fate in verdict.fates)
        kept_in = f"{sum(verdict.kept for verdict in found)} of {len(found)}"
        print(f"| {name} | {trained} of {every} | {kept_in} | {max(v.regret for v in found):.1%} |")
    _print_forecasts(path)
    return {
        name: [{"kept": v.kept, "regret": v.regret, "runs": [vars(fate) for fate in v.fates]} for v in found]
        for name, found in totals.items()
    }


def _cell(fate: Fate) -> str:
    if fate.came is None:
        return str(fate.trained)
    guess = "none" if fate.forecast is None else f"{fate.forecast:.3f}"
    return f"{fate.trained}: {guess} -> {fate.came:.3f}"


def _print_forecasts(path: Path) -> None:
    """How well the forecast does on its own: from a third, a half and two thirds of each run to its end."""
    print(f"\n| forecast from | runs | median error | gain forecast | gain that came |\n{'|' + '---|' * 5}")
    for label, share in (("a third", 1 / 3), ("half", 1 / 2), ("two thirds", 2 / 3)):
        rows = []
        for runs in groups(path).values():
            for _, recorded in runs:
                val = _losses(recorded)
                last, at = max(val), math.ceil(share * max(val))
                guess = forecast({e: v for e, v in val.items() if e <= at}, last)
                if guess is not None and at < last and at in val:
                    rows.append((abs(guess / val[last] - 1), 1 - guess / val[at], 1 - val[last] / val[at]))
        if rows:
            error, gain, came = np.median(np.array(rows), axis=0)
            print(f"| {label} | {len(rows)} | {error:.2%} | {gain:.2%} | {came:.2%} |")
