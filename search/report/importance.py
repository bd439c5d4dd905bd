"""Which parameters matter for the validation loss, as optuna-dashboard says it, with the uncertainty of few trials.

The evaluator is Optuna's default one (PED-ANOVA: what sets the best tenth of the trials apart), which the dashboard
uses too: both show the same figure where all complete trials were validated on the same samples.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial

from search.records import StudyRecord
from search.report.experiment import Experiment
from search.report.parameters import main_samples

FEWEST = 10
"""Fewest COMPLETE trials for importances: the best tenth of fewer is not even one trial."""
RESAMPLES = 20
"""Bootstrap resamples: an interval of nine in ten leaves out one at each end. One costs 25 ms with 12 trials."""


@dataclass(frozen=True, kw_only=True)
class Importance:
    """One parameter's importance, a share of 1."""

    name: str
    share: float
    """Over all trials; those of all parameters sum to 1."""
    low: float
    high: float
    """Nine of ten resamples of the trials lie between `low` and `high`."""
    first: float
    """Share of the resamples in which it comes first."""


class _Shared(FrozenTrial):
    """A trial whose copies share its params, which nobody changes.

    Optuna copies each trial that is added to a study, and each resample is a study: with 400 trials that took six
    sevenths of the time for importances.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenTrial:
        return copy.copy(self)


def importances(record: StudyRecord, experiments: Sequence[Experiment]) -> tuple[Importance, ...]:
    """Importances, highest first; empty with too few trials, or where only one parameter is searched.

    Trials validated on different samples than most are left out: their losses do not compare.
    """
    import optuna

    from search.sampling.params import distribution
    from search.space import contains, from_dict, param_name

    params = from_dict(record.definition.get("space", {}))
    known = {param_name(field, param): param for field, param in params.items()}
    space = {name: distribution(param) for name, param in known.items()}

    def inside(params: dict[str, Any]) -> bool:
        return all(name in params and contains(param, params[name]) for name, param in known.items())

    samples = main_samples(experiments)
    frozen = [
        optuna.trial.create_trial(
            state=optuna.trial.TrialState.COMPLETE,
            value=e.value,
            params={name: e.record.params[name] for name in space},
            distributions=space,
        )
        for e in experiments
        if e.record.state == "COMPLETE" and e.samples == samples and inside(e.record.params)
    ]
    if len(frozen) < FEWEST or len(space) < 2:
        return ()
    for trial in frozen:
        trial.__class__ = _Shared
    rng = np.random.default_rng(0)  # seeded: the same records, the same intervals
    drawn = [_evaluate([frozen[i] for i in rng.integers(0, len(frozen), len(frozen))]) for _ in range(RESAMPLES)]
    leads = Counter(max(shares, key=lambda name: (shares[name], name)) for shares in drawn)
    whole = _evaluate(frozen)
    found = []
    for name in space:
        low, high = (float(q) for q in np.quantile([shares.get(name, 0.0) for shares in drawn], (0.05, 0.95)))
        share = float(whole.get(name, 0.0))
        found.append(Importance(name=name, share=share, low=low, high=high, first=leads[name] / RESAMPLES))
    return tuple(sorted(found, key=lambda i: (-i.share, i.name)))


def _evaluate(trials: list[FrozenTrial]) -> dict[str, float]:
    """Shares that sum to 1; all zero where every trial did the same."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # create_study announces every study, in memory or not
    try:
        study = optuna.create_study()
        study.add_trials(trials)
    finally:
        optuna.logging.set_verbosity(verbosity)
    with warnings.catch_warnings():
        # A resample may consist of equal trials: its shares are then equal, which is right.
        warnings.simplefilter("ignore")
        return dict(optuna.importance.get_param_importances(study))
