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
    each: int = 1
    """Epochs of a new trial, for the rules that never pause one: it begins if all of them are left."""

    def line(self) -> str:
        """In words: `12 trials`, or `200 epochs, at most 50 trials`."""
        trials = f"{self.trials} trials"
        return trials if self.epochs is None else f"{self.epochs} epochs, at most {trials}"

    def asked(self) -> str:
        """What was asked for, in words: `12 trials`, or `200 epochs`."""
        return f"{self.trials} trials" if self.epochs is None else f"{self.epochs} epochs"

    def spent(self) -> str:
        """Why nothing goes on once all epochs are trained."""
        return f"all {self.epochs} epochs of the search are trained"

    def new_left(self, trials: Sequence[FrozenTrial], plan: Plan | None = None) -> bool:
        """Whether another configuration may begin.

        Args:
            trials: All trials of the study.
            plan: By which trials pause: up to half of a budget of epochs is kept for what it wants to train on.
                Without one a trial goes on to its end once it has begun: its epochs are kept, and another begins only
                if all of its own are left, or if there is none yet.
        """
        from search.planning.plan import number_counted  # Optuna: 0.3 s that a session's first lines do not wait for

        if self.epochs is not None:
            if plan is None:
                taken, needed = epochs_reported(trials) + epochs_to_come(trials, self.each), self.each
            else:
                begun = sum(t.state.name == "RUNNING" and not t.intermediate_values for t in _own(trials))
                taken, needed = epochs_reported(trials) + begun + min(plan.wanted(trials), self.epochs // 2), 1
            if taken >= self.epochs or (taken and taken + needed > self.epochs):
                return False
        return number_counted(trials) < self.trials

    def left(self, trials: Sequence[FrozenTrial]) -> int | None:
        """Epochs that are left; None where the budget is none of epochs."""
        return None if self.epochs is None else max(0, self.epochs - epochs_reported(trials))

    def is_spent(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether all epochs are trained: nothing begins or goes on."""
        return self.epochs is not None and epochs_reported(trials) >= self.epochs


def epochs_to_come(trials: Sequence[FrozenTrial], each: int) -> int:
    """Epochs that a study's own running trials have left to their ends, if nothing stops them.

    Args:
        trials: All of the study's.
        each: Epochs of one that was just asked for, and has no configuration yet.
    """
    running = [t for t in _own(trials) if t.state.name == "RUNNING"]
    left = [(t.user_attrs.get(records.CONFIG, {}).get("num_epochs", each), t.intermediate_values) for t in running]
    return sum(max(0, planned - max(reported, default=0)) for planned, reported in left)


def epochs_reported(trials: Sequence[FrozenTrial]) -> int:
    """Epochs that a study's own trials have trained; those of a trial that was lost are its successor's, too."""
    own = _own(trials)
    resumed = {t.user_attrs[records.RESUMES] for t in own if records.RESUMES in t.user_attrs}
    return sum(max(t.intermediate_values, default=0) for t in own if t.number not in resumed)


def _own(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Those that are no repeats."""
    return [trial for trial in trials if records.REPEAT_OF not in trial.user_attrs]
