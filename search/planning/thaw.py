"""`FreezeThaw`: a slot always holds what is worth most: a trial that goes on, one that was paused, or a new one.

After every epoch a trial's worth (`search.planning.worth`) is compared with that of the paused trials and of the best
configuration that could begin. So nothing hopeless is trained on, and what leads early is not favoured for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from search.planning.candidates import Candidates, Values, begun, key, left
from search.planning.comparable import Comparable
from search.planning.coordinates import Coordinates
from search.planning.plan import Plan, is_repeat, number_counted, paused
from search.planning.prior import Prior
from search.planning.worth import Known, Outlook, Worth

if TYPE_CHECKING:
    from search.study import Study

KEEP = 4.0
"""A trial pauses for one whose epochs are worth so many times as much. What a curve gains late is slow and sure, what
a new configuration may be worth is neither, and a change costs a checkpoint's loading. With 1.25 the best that had
been trained after 160 epochs, one trial at a time, lay 0.9 % higher (mean of 16 studies)."""
HOPELESS = 1e-3
"""A whole trial that is expected to lower the study's best loss by less than this, relatively, is not worth training:
a fraction of an evaluation's noise on a small split, which no one could tell from luck. For what is left of a trial it
is as much less: the best of the published real runs fell by 0.3 % in its last epoch; less than 0.1 % was expected."""
FEWEST = 3
"""Other trials with a loss needed to find one hopeless."""
APART = 0.2
"""Decades of the effective rate within which a second trial that has not yet reported teaches little."""
BEST = 3
"""Good trials near which candidates are drawn."""


class FreezeThaw(Plan):
    """Pauses and resumes by worth, and proposes the configurations that begin.

    Args:
        study: The definition.
        prior: Of the effective rate.
        proposes: Whether new configurations are this plan's own proposals (`sampling.aimed`), or come from elsewhere.
    """

    def __init__(self, study: Study, prior: Prior, *, proposes: bool = True) -> None:
        self._study, self._prior, self._proposes = study, prior, proposes
        self._coordinates = Coordinates(study.space)
        self._comparable = Comparable(study)
        self._candidates = Candidates(study.space, study.base_config().model_dump(mode="json"))
        self._latest: tuple[tuple[Known, ...], Outlook] | None = None

    # ------------------------------------------------------------------ Plan

    def pause(
        self, trials: Sequence[FrozenTrial], trial: FrozenTrial, *, new_left: bool, left: int | None = None
    ) -> str | None:
        """See `Plan.pause`."""
        if is_repeat(trial):
            return None
        others = [t for t in trials if t.number != trial.number]
        rivals = paused(others)
        own = self._known(trial)
        outlook = self.outlook([*others, trial])
        if outlook.empty or own is None or not any(map(math.isfinite, own.losses)):
            return None  # the rule for non-finite losses ends it
        (mine,) = outlook.of([own])
        if _is_hopeless(own, mine) and _others(outlook, own) >= FEWEST:
            return f"after epoch {len(own.losses)}, with nothing to gain: expected to reach {_interval(mine)}"
        if not rivals and not new_left:
            return None
        best = max((worth.per_epoch for _, worth in self._hopeful(outlook, rivals)), default=-math.inf)
        if new_left:
            best = max(best, self._of_new(outlook, [*others, trial])[1])
        if best <= KEEP * mine.per_epoch:
            return None
        return (
            f"after epoch {len(own.losses)}, for one worth more: expected to reach {_interval(mine)} by epoch "
            f"{own.num_epochs}; the lowest so far is {outlook.lowest_loss:.4f}"
        )

    def may_gain(self, trials: Sequence[FrozenTrial], trial: FrozenTrial) -> bool:
        """See `Plan.may_gain`."""
        own, outlook = self._known(trial), self.outlook([*(t for t in trials if t.number != trial.number), trial])
        if own is None or outlook.empty or _others(outlook, own) < FEWEST:
            return False
        return not _is_hopeless(own, outlook.of([own])[0])

    def resume(self, trials: Sequence[FrozenTrial], *, new_left: bool, left: int | None = None) -> int | None:
        """See `Plan.resume`."""
        waiting = paused(trials)
        outlook = self.outlook(trials)
        if not waiting or outlook.empty:
            return None
        hopeful = self._hopeful(outlook, waiting)
        if not hopeful:
            return None
        number, best = max(hopeful, key=lambda found: (found[1].per_epoch, -found[0]))
        if new_left and self._of_new(outlook, trials)[1] >= best.per_epoch:
            return None
        return number

    def wanted(self, trials: Sequence[FrozenTrial]) -> int:
        """See `Plan.wanted`: none is sure of any."""
        return 0

    def give_up(self, trials: Sequence[FrozenTrial], trial: FrozenTrial) -> str:
        """See `Plan.give_up`."""
        known, outlook = self._known(trial), self.outlook(trials)
        epoch = max(trial.intermediate_values, default=0)
        if known is None or outlook.empty:
            return f"paused after epoch {epoch}, and never worth going on with"
        (worth,) = outlook.of([known])
        return (
            f"paused after epoch {epoch}; expected to reach {_interval(worth)} by epoch {known.num_epochs}, "
            f"where the lowest is {outlook.lowest_loss:.4f}"
        )

    # ------------------------------------------------------------------ proposals

    def propose(self, trials: Sequence[FrozenTrial]) -> Values:
        """Params of the configuration that should begin next.

        Args:
            trials: All trials of the study but the one that is to get the params.
        """
        return self._of_new(self.outlook(trials), trials)[0]

    def _of_new(self, outlook: Outlook, trials: Sequence[FrozenTrial]) -> tuple[Values, float]:
        """(params, worth of an epoch) of the best configuration that could begin; the mean worth of those that could,
        if it is not this plan that proposes."""
        number = number_counted(trials)
        rng = np.random.default_rng((self._study.seed, number))
        taken = begun(trials)
        drawn = self._candidates.draw(rng, self._prior, self._good(trials))
        drawn = [params for params in drawn if key(params) not in taken] or left(self._study.space, taken) or drawn
        known = []
        for params in drawn:
            config = self._candidates.config(params)
            z, rest = self._coordinates.of(config)
            known.append(Known(-1, z, tuple(rest), (), config["num_epochs"]))
        silent = [k.z for t in trials if (k := self._known(t)) and t.state == TrialState.RUNNING and not k.losses]
        if outlook.empty:
            worth = [-(((k.z - self._prior.centre) / self._prior.width) ** 2) / 2 for k in known]
            worth = [math.exp(w) for w in worth]
        else:
            worth = [w.per_epoch for w in outlook.of(known)]
        for i, candidate in enumerate(known):
            for z in silent:
                worth[i] *= 1 - math.exp(-0.5 * ((candidate.z - z) / APART) ** 2)
        if not self._proposes:
            return {}, float(np.mean(worth))
        best = int(np.argmax(worth))
        return drawn[best], worth[best]

    def _good(self, trials: Sequence[FrozenTrial]) -> list[Mapping[str, Any]]:
        """Params of the best trials by lowest validation loss."""
        lowest = [
            (
                min((v for v in t.intermediate_values.values() if math.isfinite(v)), default=math.inf),
                t.number,
                self._comparable.params(t),
            )
            for t in trials
            if self._known(t) is not None
        ]
        return [params for loss, _, params in sorted(lowest, key=lambda x: x[:2])[:BEST] if math.isfinite(loss)]

    # ------------------------------------------------------------------ what is known

    def _hopeful(self, outlook: Outlook, waiting: Sequence[FrozenTrial]) -> list[tuple[int, Worth]]:
        """(number, worth) of those paused trials that may be worth going on with."""
        known = [k for t in waiting if (k := self._known(t)) is not None]
        worths = zip(known, outlook.of(known), strict=True)
        return [(k.number, worth) for k, worth in worths if not _is_hopeless(k, worth)]

    def outlook(self, trials: Sequence[FrozenTrial]) -> Outlook:
        """The outlook of these trials; the latest is kept, since several questions are asked of it."""
        known = [k for t in self._comparable.among(trials) if (k := self._known(t)) is not None]
        # By number: the same trials are the same sums, whoever asks and whichever of them runs.
        seen = tuple(sorted((k for k in known if k.losses), key=lambda k: k.number))
        if self._latest is None or self._latest[0] != seen:
            self._latest = (seen, Outlook(seen, self._prior))
        return self._latest[1]

    def _known(self, trial: FrozenTrial) -> Known | None:
        """The trial as the model sees it; None if it cannot be compared."""
        place = self._comparable.place(trial)
        if place is None:
            return None
        last = max(trial.intermediate_values, default=0)
        losses = tuple(trial.intermediate_values.get(epoch, math.nan) for epoch in range(1, last + 1))
        if not losses and any(amount > 0 for amount in trial.constraints.values()):
            losses = (math.nan,)  # out of memory or NaN before its first epoch ended
        return Known(trial.number, place.z, tuple(place.rest), losses, place.num_epochs)


def _is_hopeless(known: Known, worth: Worth) -> bool:
    """Whether what is left of a trial is not worth training."""
    left = known.num_epochs - len(known.losses)
    return worth.total < HOPELESS * max(left, 1) / max(known.num_epochs, 1)


def _others(outlook: Outlook, own: Known) -> int:
    """How many trials beside this one have a loss."""
    return sum(known.number != own.number for known in outlook.trials)


def _interval(worth: Worth) -> str:
    """The loss expected at the last epoch, with its 80 % interval."""
    return f"{worth.final:.4f} ({worth.low:.4f} to {worth.high:.4f})"
