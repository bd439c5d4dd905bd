"""One study replayed on a world: trials are asked for, reported, judged and told as a worker does, without training.

    ask -> curve -> epoch by epoch: report, judge -> tell
                                            \\-> park (WAITING): a later ask may go on with it

K trials train side by side and advance by an epoch a round. What a strategy is, a `Play` says: the study whose `ask`
gives the next trial, a new or a waiting one, and the judge. Neither knows that nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState

from search import pruning, records
from search.records import Outcome
from search.sampling.params import mark_constraints, suggest
from search.storage import lifecycle
from search.storage.optuna_private import latest, set_user_attr
from search.study import Study
from tests.benchmarks.world import FIRST_SEED, Curve

Judge = Callable[[optuna.Study, FrozenTrial], Outcome | None]
CurveOf = Callable[[Mapping[str, Any], optuna.Trial], Curve]
Winner = tuple[int, int]
"""(trial's number, epoch)"""


class Memory(InMemoryStorage):
    """Optuna's storage in memory, for trials that are set back to WAITING.

    Optuna's looks for waiting trials only behind the first that it found the last time: one that has been parked is
    never found again (5.0, `_prev_waiting_trial_number`). Its databases do not do that.
    """

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """As Optuna's, by a way that looks at all trials."""
        if isinstance(states, tuple):
            states = frozenset(states)
        return super().get_all_trials(study_id, deepcopy, states)


@dataclass(frozen=True, kw_only=True)
class Play:
    """A strategy at work in one study."""

    study: optuna.Study
    ask: Callable[[], optuna.Trial | None] | None = None
    """The next trial, or None if there is nothing to train until a running one ends; by default the study's `ask`."""
    judge: Judge = pruning.verdict
    """What becomes of a trial at its latest epoch: None to go on, an Outcome that ends it or (WAITING) parks it. Not
    asked at a trial's last epoch."""
    winner: Callable[[optuna.Study], Winner | None] | None = None
    """The trial and epoch that the strategy names at the end; by default those of the lowest validation loss."""
    named: Callable[[optuna.Study], Winner | None] | None = None
    """The trial and epoch that the strategy names meanwhile; by default those of the lowest validation loss so far."""
    over: Callable[[optuna.Study], bool] = lambda study: False
    """Whether the strategy has decided and ends before the budget is spent."""


@dataclass
class Run:
    """A trial of the replay."""

    trial: optuna.Trial
    curve: Curve
    values: dict[str, Any]
    epochs: int
    """Of a full trial."""
    done: int = 0


@dataclass(frozen=True)
class Step:
    """From this many epochs on, the lowest validation loss is that of this trial and epoch."""

    spent: int
    winner: Winner
    expected: float
    """Its expected test loss."""
    test: float
    """The test loss of that very checkpoint."""


@dataclass
class Replay:
    """What came of it."""

    runs: dict[int, Run]
    spent: int
    steps: list[Step] = field(default_factory=list)
    winner: Winner | None = None
    ends: dict[int, Outcome] = field(default_factory=dict)


def replay(play: Play, definition: Study, curve_of: CurveOf, *, slots: int, budget: int) -> Replay:
    """Play a study until the budget is spent or nothing is left to train.

    Args:
        play: The strategy.
        definition: The space, and how many epochs a trial has.
        curve_of: The run of a configuration.
        slots: Trials side by side.
        budget: Epochs, of all trials together. The epoch in which a run diverges counts.
    """
    found = Replay({}, 0)
    running: list[Run] = []
    lowest = math.inf
    ask = play.ask or play.study.ask
    while found.spent < budget and not play.over(play.study):
        while len(running) < slots and (trial := ask()) is not None:
            running.append(_begin(trial, found.runs, definition, curve_of))
        if not running:
            break
        for run in list(running):
            if found.spent >= budget:
                break
            found.spent += 1
            outcome = _epoch(play, run)
            number = run.trial.number
            if play.named is not None:
                now = play.named(play.study)
            elif run.done and _comparable(run) and run.curve.val[run.done - 1] < lowest:
                lowest = float(run.curve.val[run.done - 1])
                now = (number, run.done)
            else:
                now = None
            if now is not None and (not found.steps or found.steps[-1].winner != now):
                curve, at = found.runs[now[0]].curve, now[1] - 1
                found.steps.append(Step(found.spent, now, float(curve.expected[at]), float(curve.test[at])))
            if outcome is not None:
                tell(play.study, run.trial, outcome)
                found.ends[number] = outcome
                running.remove(run)
    found.winner = play.winner(play.study) if play.winner else (found.steps[-1].winner if found.steps else None)
    return found


def _begin(trial: optuna.Trial, runs: dict[int, Run], definition: Study, curve_of: CurveOf) -> Run:
    """A new run, or the one of a trial that waited."""
    suggest(trial, definition)
    if trial.number not in runs:
        config = definition.config(trial.params, trial.user_attrs.get(records.OVERRIDES, {}))
        values = config.model_dump()
        runs[trial.number] = Run(trial, curve_of(values, trial), values, config.num_epochs)
    run = runs[trial.number]
    run.trial = trial  # a trial that is asked for again is another object
    return run


def _epoch(play: Play, run: Run) -> Outcome | None:
    """Train an epoch: as `search.workers.trial` reports and judges it."""
    if run.done >= len(run.curve.val):
        assert run.curve.diverged
        reason = records.NON_FINITE
        return Outcome(state="PRUNED", reason=reason, detail="the loss is NaN", violated=reason)
    run.done += 1
    run.trial.set_user_attr(records.TRAIN_LOSSES, [float(loss) for loss in run.curve.train[: run.done]])
    run.trial.report(float(run.curve.val[run.done - 1]), run.done)
    if run.done >= run.epochs:
        return Outcome(state="COMPLETE", reason=records.FINISHED, detail=f"{run.done} epochs done")
    return play.judge(play.study, latest(run.trial))


def tell(study: optuna.Study, trial: optuna.Trial, outcome: Outcome) -> None:
    """Tell Optuna how a trial ended, or that it waits, as `search.workers.trial` does."""
    if outcome.state == "WAITING":
        lifecycle.park(study, trial)
        set_user_attr(study, trial, records.REASON, outcome.reason)
        return
    best = records.lowest(latest(trial).intermediate_values)
    trial.set_user_attr(records.REASON, outcome.reason)
    trial.set_user_attr(records.DETAIL, outcome.detail)
    if outcome.stopped_early:
        trial.set_user_attr(records.STOPPED_EARLY, True)
    if best is not None:
        trial.set_user_attr(records.BEST_EPOCH, best[1])
    mark_constraints(trial, outcome.violated)
    if outcome.state == "COMPLETE" and best is not None:
        study.tell(trial, best[0], state=TrialState.COMPLETE)
    else:
        study.tell(trial, state=TrialState.PRUNED)


def _comparable(run: Run) -> bool:
    """Whether its validation loss is of the study's split: a repeat with another seed has another one."""
    return int(run.values["seed"]) == FIRST_SEED
