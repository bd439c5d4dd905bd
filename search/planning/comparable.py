"""`Comparable`: which trials of a study a plan may compare, and where their configurations lie.

Others share the database: repeats for the verdict, trials given by hand on other samples, what another program stored.
A plan learns nothing from those, and stops none of them. A sampler learns nothing from losses on other samples either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.trial import FrozenTrial

from search import records
from search.leaderboard import own_path
from search.planning.coordinates import Coordinates
from search.planning.curves import Array
from search.planning.plan import is_repeat
from search.records import SAMPLE_FIELDS
from search.space import fits, to_config

if TYPE_CHECKING:
    from search.study import Study

FAR = 10.0
"""Ranges of a coordinate beyond which a configuration is another program's, and says nothing about the space."""


@dataclass(frozen=True)
class Place:
    """Where a trial's configuration lies."""

    z: float
    """log10 of the model's rate (`coordinates.model_rate`)."""
    rest: Array
    """(d,) other coordinates."""
    num_epochs: int


class OwnSamples:
    """Tells the trials on the study's own samples and data from those given by hand on others.

    Args:
        study: The definition.
    """

    def __init__(self, study: Study) -> None:
        self._base = study.base_config().model_dump(mode="json")
        self._samples = {name: self._base[name] for name in SAMPLE_FIELDS if name not in study.space}

    def __call__(self, trial: FrozenTrial) -> bool:
        """Whether its losses are of those samples, or will be."""
        if own_path(trial.user_attrs, "data") is not None:
            return False
        config = trial.user_attrs.get(records.CONFIG) or {**self._base, **trial.user_attrs.get(records.OVERRIDES, {})}
        return all(config.get(name, value) == value for name, value in self._samples.items())


class Comparable:
    """Tells the trials that can be compared by their losses from the others.

    Args:
        study: The definition.
    """

    def __init__(self, study: Study) -> None:
        self._space = study.space
        self._fits = fits(study.space)
        self._base = study.base_config().model_dump(mode="json")
        self._own_samples = OwnSamples(study)
        self._coordinates = Coordinates(study.space)

    def params(self, trial: FrozenTrial) -> dict[str, Any]:
        """Those of a trial's params that the space has; another program may have stored any."""
        return {name: value for name, value in trial.params.items() if self._fits(name, value)}

    def place(self, trial: FrozenTrial) -> Place | None:
        """None if the trial says nothing about its configuration, has its losses from other samples or data, repeats
        another one, or is another program's."""
        if is_repeat(trial) or not self._own_samples(trial):
            return None
        config = self._config(trial)
        if config is None:
            return None
        try:
            z, rest = self._coordinates.of(config)
            if max(trial.intermediate_values, default=0) > config["num_epochs"]:
                return None
        except (ArithmeticError, KeyError, TypeError, ValueError):
            return None  # no configuration of ours
        if not (math.isfinite(z) and np.all(np.abs(rest) <= FAR)):
            return None
        return Place(z, rest, config["num_epochs"])

    def planned(self, trial: FrozenTrial) -> int | None:
        """Epochs of a trial's training; None if it cannot be compared."""
        place = self.place(trial)
        return None if place is None else place.num_epochs

    def among(self, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
        """Those that can be compared, without what was lost and taken up: its successor has its reports, too."""
        resumed = {trial.user_attrs.get(records.RESUMES) for trial in trials}
        return [trial for trial in trials if trial.number not in resumed and self.place(trial) is not None]

    def _config(self, trial: FrozenTrial) -> Mapping[str, Any] | None:
        """The resolved configuration; None of one that was queued and not sampled yet, or has what the space does not
        have."""
        config: Mapping[str, Any] | None = trial.user_attrs.get(records.CONFIG)
        if config is not None:
            return config
        if len(self.params(trial)) < len(self._space):
            return None
        return {**to_config(self._space, self._base, trial.params), **trial.user_attrs.get(records.OVERRIDES, {})}
