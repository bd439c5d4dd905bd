"""From a study's trials to the race: who is a candidate, what its repeats came to, how much they may cost."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from search import records
from search.diagnosis.noise import SIGNIFICANT, VAL_NOISE, relative
from search.leaderboard import best, epochs_trained, is_repeat, own_path, ranked, sample_key, searched
from search.records import TrialRecord, finite
from search.study import LOCATION_FIELDS
from search.verdict.race import FIRST, Candidate, Cell, Limits, Verdict, race
from trainer.config import MACHINE_FIELDS

TOP = 5
"""Most candidates."""
FEWEST = 3
"""Candidates that the budget always has room for. With two, up to 11 % of made-up studies name a winner although
another of their trials is better; with three at most 2.2 % (docs/search-quality.md)."""
SHARE = 0.25
"""Of the epochs that the search has trained: what repeats may cost by default."""
APART = 2 * SIGNIFICANT * VAL_NOISE * 2**0.5
"""Who lies further behind the best is no candidate (3.4 %): twice what counts as a difference on the recorded real
runs, since trainings of small models on few samples are twice as noisy."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How a study is decided."""

    top: int | None = None
    """Candidates, at most; None for `TOP`, and fewer where the budget has no room for the first blocks of so many."""
    seeds: int | None = None
    """Repeats of each, at most; None for what the budget has room for."""


def leaders(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that may be the best, the best first: ended with a loss, on the same samples, not clearly behind.

    Two are always among them, if there are two. Of those that would be trained alike, only the first. A trial that a
    plan or pruner stopped counts as well: it was not worth more epochs, and is what it had come to. With it, the best
    of the first three of a freeze-thaw study on the table `aerial`, eight side by side, lies 0.42 % above the table's
    best, in the tenth study of ten 0.72 %; with complete trials alone 0.45 % and 1.27 % (20 seeds,
    `python -m tests.benchmarks.candidates --only freeze-thaw`).
    """
    found: list[TrialRecord] = []
    seen = set()
    for trial in sorted(ranked(searched(trials)), key=lambda t: t.value if finite(t.value) else math.inf):
        if trial.state not in ("COMPLETE", "PRUNED") or trial.reason == records.PROBE or trial.violated:
            continue
        if not finite(trial.value) or trial.best_epoch is None:
            continue
        if trial.value <= 0 or not trial.config or (found and sample_key(trial) != sample_key(found[0])):
            continue
        same = _recipe(trial)
        if same in seen:
            continue
        if len(found) >= 2 and relative(trial.value, found[0].value or 0.0) > APART:
            break
        seen.add(same)
        found.append(trial)
    return found


def _recipe(trial: TrialRecord) -> str:
    """What a repeat of the trial would train, its seed aside."""
    left_out = ("seed", *MACHINE_FIELDS, *LOCATION_FIELDS)
    config = {name: value for name, value in trial.config.items() if name not in left_out}
    config |= {name: own_path(trial.attrs, name) for name in LOCATION_FIELDS}
    if config.get("lr_scheduler_type") == "constant_with_warmup":
        config["num_epochs"] = None  # it trains to its best epoch, which is the same for both only if this is too
    return json.dumps([config, trial.best_epoch], sort_keys=True)


def candidate(trial: TrialRecord) -> Candidate:
    """A leader as the race knows it. Cheap is an adapter of few weights, then a short training."""
    assert trial.best_epoch is not None
    weights = float(trial.config.get("lora_r", 0)) * len(trial.config.get("target_modules", ()))
    return Candidate(number=trial.number, epochs=trial.best_epoch, cost=(weights, float(trial.best_epoch)))


def field(trials: Sequence[TrialRecord], rules: Rules) -> tuple[list[Candidate], Limits]:
    """The candidates and what the race may cost."""
    found = [candidate(trial) for trial in leaders(trials)][: rules.top or TOP]
    if rules.seeds is not None:
        return found, Limits(epochs=float("inf"), blocks=rules.seeds)
    least = FIRST * sum(c.epochs for c in found[: rules.top or FEWEST])
    budget = max(SHARE * epochs_trained(searched(trials)), least)
    if rules.top is None:
        while len(found) > FEWEST and FIRST * sum(c.epochs for c in found) > budget:
            found.pop()
    return found, Limits(epochs=budget)


@dataclass(frozen=True, kw_only=True)
class PassedOver:
    """Trials near enough to the lowest to be candidates that are none."""

    trials: tuple[int, ...]
    """The lowest first."""
    why: Literal["asked", "most", "budget"]
    """There were as many candidates as `Rules.top` asks for, as there may be, as the budget has room for."""


def passed_over(trials: Sequence[TrialRecord], attrs: Mapping[str, Any]) -> PassedOver:
    """Who might have been repeated and was not.

    Args:
        trials: All of the study's.
        attrs: The study's user attributes.
    """
    rules = Rules(**(attrs.get(records.CONFIRM) or {}))
    taken = [each.number for each in field(trials, rules)[0]]
    left = tuple(trial.number for trial in leaders(trials) if trial.number not in taken)
    why: Literal["asked", "most", "budget"] = "budget"
    if rules.top is not None or len(taken) >= TOP:
        why = "most" if rules.top is None else "asked"
    return PassedOver(trials=left, why=why)


def cells(trials: Sequence[TrialRecord]) -> tuple[dict[Cell, float | None], set[Cell]]:
    """(losses of the repeats that have ended, None for one without; cells of those that wait or run).

    A repeat that was lost is what its successor comes to.
    """
    resumed = {t.attrs[records.RESUMES] for t in trials if records.RESUMES in t.attrs}
    ended: dict[Cell, float | None] = {}
    open_: set[Cell] = set()
    for trial in trials:
        if not is_repeat(trial) or trial.number in resumed:
            continue
        cell = (int(trial.attrs[records.REPEAT_OF]), int(trial.attrs[records.BLOCK]))
        if trial.state in ("WAITING", "RUNNING") or _is_taken_up(trial):
            open_.add(cell)
        else:
            value = trial.value if trial.reason == records.REPEAT and finite(trial.value) else None
            ended[cell] = ended.get(cell) if value is None else value  # a copy of it that failed takes nothing away
    return ended, open_


def _is_taken_up(trial: TrialRecord) -> bool:
    """Whether a repeat was lost just now, and has a successor in a moment, as `search.storage.lifecycle` has it."""
    attempt = trial.attrs.get(records.ATTEMPT, 0) + (trial.attrs.get(records.BLAMED) is not False)
    return trial.reason == records.LOST and attempt <= records.MAX_RETRIES


def judge(trials: Sequence[TrialRecord], rules: Rules) -> Verdict:
    """The verdict of a study so far; its `wanted` are the repeats that nobody has begun.

    Args:
        trials: All of the study's.
        rules: How it is decided.
    """
    candidates, limits = field(trials, rules)
    ended, open_ = cells(trials)
    verdict = race(candidates, ended, limits)
    wanted = tuple(cell for cell in verdict.wanted if cell not in open_)
    return replace(verdict, wanted=wanted, screened=_screened(trials))


def precision(config: Mapping[str, Any]) -> str:
    """The precision of a recorded configuration, in a word."""
    if config.get("base_dtype"):
        return str(config["base_dtype"])
    dtype = str(config.get("torch_dtype", "float32"))
    return "TF32" if dtype == "float32" and config.get("matmul_precision") == "high" else dtype


def _screened(trials: Sequence[TrialRecord]) -> tuple[str, int] | None:
    """(precision of the trials, the best of them by their losses), if their repeats have another one."""
    first = next(iter(leaders(trials)), None)
    if first is None or all(precision(t.config) == precision(first.config) for t in trials if is_repeat(t)):
        return None
    return precision(first.config), first.number


def verdict_of(trials: Sequence[TrialRecord], attrs: Mapping[str, Any]) -> Verdict | None:
    """The verdict of a study as it is recorded; None if its leaders are not to be repeated.

    Args:
        trials: All of the study's.
        attrs: The study's user attributes.
    """
    rules = attrs.get(records.CONFIRM)
    if rules is None and not any(map(is_repeat, trials)):
        return None
    return judge(trials, Rules(**(rules or {})))


def winner(trials: Sequence[TrialRecord], verdict: Verdict | None) -> TrialRecord | None:
    """What a study has come to: the trial that its verdict names, else the first of its leaderboard.

    Who only leads, or is to be repeated further, is not named.

    Args:
        trials: All of the study's.
        verdict: `verdict_of` them.
    """
    if verdict is not None and verdict.names:
        for trial in trials:
            if trial.number == verdict.choice:
                return trial
    return best(trials)


def seed_of(block: int, first: int, taken: Collection[int]) -> int:
    """The seed of a block: one after the other from the base's on, without those that the search has used."""
    seed = first
    while block:
        seed = (seed + 1) % 2**32
        block -= seed not in taken
    return seed
