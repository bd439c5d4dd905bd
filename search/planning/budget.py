"""`Budget`: how much a search may spend, in configurations and in epochs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from search import records

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from search.planning.plan import Plan


@dataclass(frozen=True)
class Budget:
    """What a search may spend in total, over all its runs and hosts. Repeats for the verdict are not part of it."""

    trials: int
    """Configurations."""
    epochs: int | None = None
    """Epochs of all trials together; None for as many as the configurations take."""

    def line(self) -> str:
        """In words: `12 trials`, or `200 epochs, at most 50 trials`."""
        trials = f"{self.trials} trials"
        return trials if self.epochs is None else f"{self.epochs} epochs, at most {trials}"

    def new_left(self, trials: Sequence[FrozenTrial], plan: Plan | None = None) -> bool:
        """Whether another configuration may begin.

        Args:
            trials: All trials of the study.
            plan: By which trials pause: up to half of a budget of epochs is kept for what it wants to train on.
                Without one a trial that has begun goes on to its end, for which its epochs are kept.
        """
        from search.planning.plan import number_counted  # Optuna: 0.3 s that a session's first lines do not wait for

        if self.epochs is not None:
            kept = epochs_to_come(trials) if plan is None else min(plan.wanted(trials), self.epochs // 2)
            if epochs_reported(trials) + kept >= self.epochs:
                return False
        return number_counted(trials) < self.trials

    def is_spent(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether all epochs are trained: nothing begins or goes on."""
        return self.epochs is not None and epochs_reported(trials) >= self.epochs


def epochs_to_come(trials: Sequence[FrozenTrial]) -> int:
    """Epochs that a study's own running trials have left to their ends, if nothing stops them."""
    running = [t for t in trials if t.state.name == "RUNNING" and records.REPEAT_OF not in t.user_attrs]
    left = [(t.user_attrs.get(records.CONFIG, {}).get("num_epochs", 0), t.intermediate_values) for t in running]
    return sum(max(0, planned - max(reported, default=0)) for planned, reported in left)


def epochs_reported(trials: Sequence[FrozenTrial]) -> int:
    """Epochs that a study's own trials have trained; those of a trial that was lost are its successor's, too."""
    own = [trial for trial in trials if records.REPEAT_OF not in trial.user_attrs]
    resumed = {t.user_attrs[records.RESUMES] for t in own if records.RESUMES in t.user_attrs}
    return sum(max(t.intermediate_values, default=0) for t in own if t.number not in resumed)
