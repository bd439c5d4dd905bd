"""`--warm-start`: what earlier studies and recorded runs say of good effective rates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna

from search.diagnosis import recorded
from search.errors import StudyError
from search.leaderboard import sample_key, searched
from search.places import Places, sqlite_file
from search.planning.coordinates import RATE_FIELDS, model_rate
from search.planning.prior import Conditions, Prior, combined, from_runs
from search.records import finite
from search.storage import lifecycle, studies
from search.storage.database import close_storage, open_storage
from search.storage.retry import RetryingStorage
from search.study import Study
from trainer.common.errors import shown
from trainer.config import TrainConfig


@dataclass(frozen=True)
class Source:
    """What one study or file says."""

    prior: Prior
    conditions: Conditions
    """Those of its runs."""


def read(sources: Sequence[str], places: Places) -> list[Source]:
    """Read the sources. Creates nothing: a database that is not there is said.

    Args:
        sources: Names of studies in the database, or paths of JSON files that `search.diagnose` reads.
        places: Where the database is.

    Raises:
        UserError: a source cannot be read, or has no run with a loss.
    """
    found = []
    for source in sources:
        runs = _of_file(Path(source)) if source.endswith(".json") else _of_study(source, places)
        prior = from_runs((_rate(config), loss) for config, loss in runs)
        if prior is None:
            raise StudyError(
                f"--warm-start {shown(source)}: none of its runs has a validation loss and a learning rate"
            )
        found.append(Source(prior, Conditions.usual([Conditions.of(config) for config, _ in runs])))
    return found


def prior_for(study: Study, samples: int, sources: Sequence[Source]) -> Prior | None:
    """The prior of a study; None without any source. The more a source differs from the study, the less it counts.

    Args:
        study: The one that begins. What it searches has no value of its own, and tells no source from it.
        samples: That it trains and validates on.
        sources: What is known.
    """
    base = {name: value for name, value in study.base_config().model_dump().items() if name not in study.space}
    here = Conditions.of({**base, "max_samples": samples})
    seen = [source.prior.widened(len(source.conditions.differences(here))) for source in sources]
    return combined(seen) if seen else None


def _of_file(path: Path) -> list[tuple[Mapping[str, Any], float]]:
    """(configuration, lowest validation loss) of each run that says its learning rate.

    Losses of runs on other numbers of samples are not comparable: the most frequent number is taken.
    """
    runs = [run for run in recorded.read_runs(path).runs if "learning_rate" in run.config]
    sizes = [run.config.get("max_samples") for run in runs]
    usual = max(sizes, key=sizes.count, default=None)
    return [
        (run.config, min((e.val_loss for e in run.epochs if finite(e.val_loss)), default=math.inf))
        for run in runs
        if run.config.get("max_samples") == usual
    ]


def _of_study(name: str, places: Places) -> list[tuple[Mapping[str, Any], float]]:
    """The same of a study's trials on the samples that most have. Repeats are on splits of their own."""
    file = sqlite_file(places.storage_url)
    if file is not None and not file.is_file():
        raise StudyError(
            f"--warm-start {shown(name)}: there is no study yet, nor a database {shown(str(file))}; "
            "name that of an earlier study with --storage, or a .json file"
        )
    storage: RetryingStorage = open_storage(places.storage_url)
    try:
        study: optuna.Study = studies.find_study(storage, name)
        trials = [t for t in searched(lifecycle.read_trials(study)) if t.config and not t.violated]
    finally:
        close_storage(storage)
    known = [(trial, trial.value) for trial in trials if trial.value is not None]
    usual = Counter(sample_key(trial) for trial, _ in known).most_common(1)
    return [(trial.config, loss) for trial, loss in known if sample_key(trial) == usual[0][0]]


def _rate(config: Mapping[str, Any]) -> float:
    """log10 of the rate; NaN, which counts as no run, where the configuration has no positive number."""
    defaults = TrainConfig().model_dump()
    values = {name: config.get(name, defaults[name]) for name in RATE_FIELDS}
    if not all(type(value) in (int, float) and finite(value) and value > 0 for value in values.values()):
        return math.nan
    return model_rate({**values, "lr_scheduler_type": config.get("lr_scheduler_type")})
