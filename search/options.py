"""The options by which the commands that read a study find its records, and the opening of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import quote, unquote

import typer

from search.errors import StudyError
from trainer.common.errors import shown

if TYPE_CHECKING:
    import optuna

    from search.tracking.client import Tracking

ARTIFACTS = "dashboard"
"""Folder below the runs folder with the files that trials' notes show (optuna-dashboard's `--artifact-dir`)."""

STORAGE_VARIABLE = "LORA_SEARCH_STORAGE"
TRACKING_VARIABLE = "LORA_SEARCH_TRACKING_URI"
"""What stands for `--storage` and `--tracking-uri` where those are not given: `ps` shows arguments to every user."""

StudyOption = Annotated[str, typer.Option(help="The study, or one generation of it, e.g. rsicap or rsicap-2.")]
StorageOption = Annotated[
    str | None, typer.Option(envvar=STORAGE_VARIABLE, help="Optuna's database URL; optuna.db in the runs folder.")
]
TrackingOption = Annotated[
    str | None, typer.Option(envvar=TRACKING_VARIABLE, help="MLflow's URI; mlflow.db in the runs folder.")
]
RunsOption = Annotated[Path, typer.Option(help="Folder for checkpoints, logs and databases.")]


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file; SQLAlchemy reads `%` and `?` in it as signs of their own.

    Raises:
        StudyError: the path is no text that a database could be opened by.
    """
    try:
        return f"sqlite:///{quote(str(path), safe=' +/:')}"
    except UnicodeEncodeError:
        raise StudyError(f"the path {shown(str(path))} is no UTF-8 text; name another with --runs-dir") from None


def storage_url(storage: str | None, runs_dir: Path) -> str:
    """Optuna's database: the one named, else the one in the runs folder."""
    return storage or sqlite_url(runs_dir / "optuna.db")


def tracking_uri(tracking: str | None, runs_dir: Path) -> str:
    """MLflow's store: the one named, else the one in the runs folder."""
    return tracking or sqlite_url(runs_dir / "mlflow.db")


def is_file(path: Path) -> bool:
    """Whether there is a file; a name longer than any file's is none."""
    try:
        return path.is_file()
    except OSError:  # a name too long
        return False


@contextmanager
def opened(
    name: str, storage: str | None, tracking: str | None, runs_dir: Path
) -> Iterator[tuple[optuna.Study, Tracking]]:
    """The study and its tracking, for reading.

    Raises:
        UserError: there is no such study, or a database cannot be opened. None is created.
    """
    from search.storage.database import close_storage, open_storage
    from search.storage.studies import find_study
    from search.tracking.client import open_tracking

    storage, tracking = storage_url(storage, runs_dir), tracking_uri(tracking, runs_dir)
    for option, url in (("--storage", storage), ("--tracking-uri", tracking)):
        file = Path(unquote(url.removeprefix("sqlite:///").partition("?")[0]))
        if url.startswith("sqlite:///") and not is_file(file):
            raise StudyError(
                f"there is no {shown(str(file))}: run a study first, or name its records with --runs-dir or {option}"
            )
    opened_storage = open_storage(storage)
    try:
        names = {found.study_name for found in opened_storage.get_all_studies()}
        other = name.replace("-", "_")  # as search.run takes it
        study = find_study(opened_storage, other if name not in names and other in names else name)
        yield study, open_tracking(tracking, runs_dir / "artifacts")
    finally:
        close_storage(opened_storage)
