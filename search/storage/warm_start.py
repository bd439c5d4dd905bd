"""`--warm-start`: what earlier studies and recorded runs say of good effective rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna

from search.diagnosis import recorded
from search.errors import StudyError
from search.planning.coordinates import RATE_FIELDS, model_rate
from search.planning.prior import Prior, combined, from_runs
from search.records import finite
from search.storage import lifecycle, studies
from search.storage.retry import RetryingStorage
from trainer.common.errors import shown
from trainer.config import TrainConfig


def read(sources: Sequence[str], storage: RetryingStorage) -> Prior | None:
    """The prior of several sources; None without any.

    Args:
        sources: Names of studies in the storage, or paths of JSON files that `search.diagnose` reads.
        storage: Optuna's, opened.

    Raises:
        UserError: a source cannot be read, or has no run with a loss.
    """
    found = []
    for source in sources:
        runs = _of_file(Path(source)) if source.endswith(".json") else _of_study(source, storage)
        prior = from_runs(runs)
        if prior is None:
            raise StudyError(
                f"--warm-start {shown(source)}: none of its runs has a validation loss and a learning rate"
            )
        found.append(prior)
    return combined(found) if found else None


def _of_file(path: Path) -> list[tuple[float, float]]:
    """(log10 of the effective rate, lowest validation loss) of each run that says its learning rate.

    Losses of runs on other numbers of samples are not comparable: the most frequent number is taken.
    """
    runs = [run for run in recorded.read_runs(path).runs if "learning_rate" in run.config]
    sizes = [run.config.get("max_samples") for run in runs]
    usual = max(sizes, key=sizes.count, default=None)
    return [
        (_rate(run.config), min((e.val_loss for e in run.epochs if finite(e.val_loss)), default=math.inf))
        for run in runs
        if run.config.get("max_samples") == usual
    ]


def _of_study(name: str, storage: RetryingStorage) -> list[tuple[float, float]]:
    study: optuna.Study = studies.find_study(storage, name)
    trials = [t for t in lifecycle.read_trials(study) if t.config and t.value is not None and not t.violated]
    return [(_rate(t.config), t.value) for t in trials if t.value is not None]


def _rate(config: dict[str, Any]) -> float:
    defaults = TrainConfig().model_dump()
    return model_rate({name: config.get(name, defaults[name]) for name in RATE_FIELDS})
