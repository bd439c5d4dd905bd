"""How far a search is, and how long it will take: `9 of 12 trials, best 0.3742 (trial 3), about 3 min left`.

What is left is an estimate: configurations that have not come to rest train as many epochs as those that have, on
average, and the leaders are repeated once they are known. A paused trial counts as come to rest, though the best of
them go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from search import leaderboard, records
from search.planning.budget import Budget
from search.records import TrialRecord
from search.verdict import leaders
from search.verdict.race import FIRST
from search.workers.protocol import Message, Progress
from trainer.events import EpochEnded

FEWEST = 3
"""Trials come to rest before anything is said of the time left."""
RARELY = 20
"""Reading all trials takes 0.2 s with 2,000 of them; it is done so rarely that it costs a twentieth of the time."""


class Pace:
    """Counts what the workers report, and reads the trials when a line is wanted.

    Args:
        read: Reads all trials of the study.
        budget: Of the whole study.
        rules: How the leaders are repeated; None if they are not.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[TrialRecord]],
        budget: Budget,
        rules: leaders.Rules | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read, self._budget, self._rules, self._clock = read, budget, rules, clock
        self._began: float | None = None
        self._epochs = 0
        self._not_before = 0.0

    def take(self, message: Message) -> None:
        """Take a worker's message in."""
        if not isinstance(message, Progress) or message.from_checkpoint:
            return
        if self._began is None:
            self._began = self._clock()
        self._epochs += isinstance(message.event, EpochEnded)

    def line(self) -> str | None:
        """How far the study is, other hosts' trials included; None if it was read only just now."""
        before = self._clock()
        if before < self._not_before:
            return None
        trials = self._read()
        self._not_before = self._clock() + RARELY * (self._clock() - before)
        done = [trial for trial in leaderboard.searched(trials) if trial.state in ("COMPLETE", "PRUNED", "FAIL")]
        parts = [self._so_far(trials, len(done))]
        paused = sum(map(_is_paused, trials))
        if paused:
            parts[0] += f" done, {paused} paused"
        repeats = sum(leaderboard.is_repeat(trial) and trial.reason == records.REPEAT for trial in trials)
        if repeats:
            parts.append(f"{repeats} repeats")
        first = leaderboard.best(trials)
        score = None if first is None else records.score_of(first.attrs)
        best = leaders.leaders(trials)[:1]
        if first is not None and score is not None:
            parts.append(f"best CIDEr-D {score:.4f} (trial {first.number})")
        elif best and best[0].value is not None:
            parts.append(f"best {best[0].value:.4f} (trial {best[0].number})")
        left = left_epochs(trials, self._budget, self._rules)
        if left is not None and self._epochs and self._began is not None:
            parts.append(f"{about(left * (self._clock() - self._began) / self._epochs)} left")
        return ", ".join(parts)

    def _so_far(self, trials: Sequence[TrialRecord], done: int) -> str:
        """How much of the budget is spent."""
        if self._budget.epochs is None:
            return f"{done} of {max(self._budget.trials, done)} trials"
        spent = leaderboard.epochs_trained(leaderboard.searched(trials))
        return f"{spent} of {max(self._budget.epochs, spent)} epochs, {done} trial{'s' * (done != 1)}"


def left_epochs(trials: Sequence[TrialRecord], budget: Budget, rules: leaders.Rules | None) -> float | None:
    """Epochs that a study will still train, as far as this can be told; None before `FEWEST` trials have come to rest.

    Args:
        trials: All of the study's.
        budget: Of the whole study.
        rules: How the leaders are repeated; None if they are not.
    """
    resumed = {trial.attrs[records.RESUMES] for trial in trials if records.RESUMES in trial.attrs}
    ours = [trial for trial in leaderboard.searched(trials) if trial.number not in resumed]
    at_rest = [trial for trial in ours if trial.state in ("COMPLETE", "PRUNED", "FAIL") or _is_paused(trial)]
    if len(at_rest) < FEWEST:
        return None
    each = leaderboard.epochs_trained(at_rest) / len(at_rest)
    running = [trial for trial in ours if trial not in at_rest and trial.attrs.get(records.TRAIN_LOSSES)]
    left = max(0.0, (budget.trials - len(at_rest)) * each - leaderboard.epochs_trained(running))
    if budget.epochs is not None:
        left = min(left, max(0.0, budget.epochs - leaderboard.epochs_trained(ours)))
    if rules is None:
        return left
    candidates, limits = leaders.field(trials, rules)
    rounds = FIRST if rules.seeds is None else rules.seeds
    wanted = min(limits.epochs, rounds * sum(candidate.epochs for candidate in candidates))
    repeats = [trial for trial in trials if leaderboard.is_repeat(trial) and trial.number not in resumed]
    return left + max(0.0, wanted - leaderboard.epochs_trained(repeats))


def about(seconds: float) -> str:
    """`about 3 min`, as exact as an estimate is."""
    if seconds < 60:
        return "less than a minute"
    if seconds < 90 * 60:
        return f"about {seconds / 60:.0f} min"
    return f"about {seconds / 3600:.1f} h" if seconds < 10 * 3600 else f"about {seconds / 3600:.0f} h"


def _is_paused(trial: TrialRecord) -> bool:
    return trial.state == "WAITING" and trial.reason == records.PAUSED
