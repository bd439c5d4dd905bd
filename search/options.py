"""Options that several commands share, how their values are read, and the opening of a study for reading."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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

StudyOption = Annotated[str, typer.Option(help="The study, or one generation of it: rsicap-1, rsicap-2, ...")]
StorageOption = Annotated[
    str | None, typer.Option(envvar=STORAGE_VARIABLE, help="Optuna's database URL; optuna.db in the runs folder.")
]
TrackingOption = Annotated[
    str | None, typer.Option(envvar=TRACKING_VARIABLE, help="MLflow's URI; mlflow.db in the runs folder.")
]
RunsOption = Annotated[Path, typer.Option(help="Folder for checkpoints, logs and databases.")]

HANG_S = 1800.0
"""Seconds of silence after which a worker is killed and replaced. A wrong kill costs more than a late one: a model of
16 GB comes over a slow network in five minutes, and a step of it on a CPU takes one."""
LOST_AFTER_S = 600.0
"""Seconds without a heartbeat after which another host's trial is lost. Beats come from a thread of the worker, not
from its epochs, so this need not grow with the length of an epoch; a short one kills live trials (optuna#5470)."""
CAPTIONS = 4
"""Images that each trial captions: they are one batch, which takes little longer than one image."""
TEST_IMAGES = 512
"""Images outside of the search for the candidates' test loss: with the 196 of the demo a difference of two
is known to 1 % either way, so with these to some 0.6 % (by the root of their number)."""
SHORTEST_S = 10
"""Shortest `--hang-timeout` and `--lost-after`: a busy machine is silent for seconds."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How a study is run: what the options of `search.run` say, under the same names.

    Raises:
        StudyError: a value that cannot be meant.
    """

    trials: int | None = None
    """Trials in total, those already run included; None for the study's own number, or as many as `epochs` allows."""
    epochs: int | None = None
    """Epochs of all trials together, those already trained included; None for as many as the trials take."""
    timeout_s: float | None = None
    """Seconds after which running trials finish their epoch and wait to be continued."""
    hang_timeout_s: float = HANG_S
    """Seconds of silence after which a worker is killed and replaced."""
    lost_after_s: float = LOST_AFTER_S
    """Seconds without a heartbeat after which other hosts take over this one's trials."""
    workers: int | None = None
    """Worker processes; None for one a GPU, or for each `gpus_per_worker` GPUs."""
    gpus_per_worker: int = 1
    executor: Literal["local", "ray"] = "local"
    ray_address: str | None = None
    """The Ray cluster's, host:port; None for this machine's."""
    slots: int | None = None
    """Trials that a worker trains at once; None for as many as pay and fit."""
    strategy: str | None = None
    """None for what the study was begun with; for a new one, what its sampler can do (`sampling.make`)."""
    pruner: str | None = None
    """None for what goes with the strategy."""
    warm_start: tuple[str, ...] = ()
    """Earlier studies of the same database, or JSON files of recorded runs: where a new study looks first."""
    places: Places = field(default_factory=Places.of)
    confirm: bool = True
    """Whether the leaders are trained again with other seeds once the search is done, for a verdict."""
    top: int | None = None
    """Leaders that are repeated, at most; None for what the budget has room for (search.verdict)."""
    seeds: int | None = None
    """Repeats of each, at most; None likewise."""
    fresh: bool = False
    """Start a new generation of the study, under a new name."""
    settings: tuple[str, ...] = ()
    """`key=value` settings over the study's base; fixed for all trials."""
    seed: int | None = None
    """Seed of the sampler; None for the study's own."""
    captions: int = CAPTIONS
    """Validation images that each trial which completes captions; 0 for none."""
    test_images: int = TEST_IMAGES
    """Images outside of the search on which the verdict's candidates are judged once, at the end; 0 for none."""

    def __post_init__(self) -> None:
        for name in ("trials", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise StudyError(f"{name} must be at least 1, but got {value}")
        for name in ("hang_timeout_s", "lost_after_s"):
            if getattr(self, name) < SHORTEST_S:
                raise StudyError(f"{name} must be at least {SHORTEST_S}, but got {getattr(self, name)}")


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

    known = {found.study_name for found in storage.get_all_studies()}
    exact = spelled(name, known)
    if exact not in known and name.endswith("-1"):  # the first generation
        exact = f"{spelled(name.removesuffix('-1'), known)}-1"
    return studies.find_study(storage, exact)


@contextmanager
def opened(name: str, places: Places) -> Iterator[tuple[optuna.Study, Tracking]]:
    """The study and its tracking, for reading.

    Raises:
        UserError: there is no such study, or a database cannot be opened. None is created.
    """
    from search.records import STUDY_ID
    from search.storage.database import close_storage, open_storage
    from search.tracking.client import open_tracking

    places.check_recorded()
    storage = open_storage(places.storage_url)
    try:
        found = find_study(storage, name)
        yield found, open_tracking(places.tracking_uri, places.artifacts, found.user_attrs.get(STUDY_ID))
    finally:
        close_storage(storage)
