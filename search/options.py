"""Options that several commands share, how their values are read, and the opening of a study for reading."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.errors import StudyError
from search.places import Places
from trainer.common.errors import shown

if TYPE_CHECKING:
    import optuna

    from search.storage.retry import RetryingStorage
    from search.tracking.client import Tracking

STORAGE_VARIABLE = "LORA_SEARCH_STORAGE"
TRACKING_VARIABLE = "LORA_SEARCH_TRACKING_URI"
"""Stand for `--storage` and `--tracking-uri` where those are not given: `ps` shows arguments to every user."""

StudyOption = Annotated[str, typer.Option(help="The study, or one generation of it, e.g. rsicap or rsicap-2.")]
StorageOption = Annotated[
    str | None, typer.Option(envvar=STORAGE_VARIABLE, help="Optuna's database URL; optuna.db in the runs folder.")
]
TrackingOption = Annotated[
    str | None, typer.Option(envvar=TRACKING_VARIABLE, help="MLflow's URI; mlflow.db in the runs folder.")
]
RunsOption = Annotated[Path, typer.Option(help="Folder for checkpoints, logs and databases.")]

SHORTEST_S = 10
"""Shortest `--hang-timeout` and `--lost-after`: a busy machine is silent for seconds."""


def read_duration(text: str, option: str = "--timeout", least_s: float = 0) -> float:
    """Seconds of `2h`, `90m`, `45s`, `1h30m`.

    Raises:
        StudyError: it is not a duration, or shorter than `least_s`.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    seconds = sum(float(n) * unit for n, unit in zip(match.groups("0"), (3600, 60, 1), strict=True)) if match else 0
    if not 0 < seconds < math.inf:
        raise StudyError(f"{option} must be a time such as 2h, 90m, 1h30m or 45s, but got {shown(text)}")
    if seconds < least_s:
        raise StudyError(
            f"{option} must be at least {least_s:g}s, but got {shown(text)}: a busy machine is silent for seconds"
        )
    return seconds


def read_slots(text: str) -> int | None:
    """The number of slots, None for `auto`.

    Raises:
        StudyError: it is neither.
    """
    if text == "auto":
        return None
    if not re.fullmatch("[1-9]|1[0-6]", text):
        raise StudyError(f"--slots must be auto or a number from 1 to 16, but got {shown(text)}")
    return int(text)


def spelled(name: str, known: Collection[str]) -> str:
    """A study's name as it is known: with underscores where it was given with hyphens, as `--study` takes it."""
    other = name.replace("-", "_")
    return other if name not in known and other in known else name


def find_study(storage: RetryingStorage, name: str) -> optuna.Study:
    """The latest generation of the study of this name, or the very generation named; hyphens may be underscores.

    Raises:
        StudyError: the database has no such study.
    """
    from search.storage import studies

    return studies.find_study(storage, spelled(name, {found.study_name for found in storage.get_all_studies()}))


@contextmanager
def opened(name: str, places: Places) -> Iterator[tuple[optuna.Study, Tracking]]:
    """The study and its tracking, for reading.

    Raises:
        UserError: there is no such study, or a database cannot be opened. None is created.
    """
    from search.storage.database import close_storage, open_storage
    from search.tracking.client import open_tracking

    places.check_recorded()
    storage = open_storage(places.storage_url)
    try:
        yield find_study(storage, name), open_tracking(places.tracking_uri, places.artifacts)
    finally:
        close_storage(storage)
