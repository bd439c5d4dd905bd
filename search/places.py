"""`Places`: where a search keeps what it writes. The one home of every default path and URL."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from search.errors import StorageError, StudyError
from trainer.common.errors import shown

RUNS = Path("runs")
"""The runs folder where none is named."""
OUTBOX = "spool"
"""Folder below a study's with the records that MLflow has not taken yet; runs folders have had it under this name from
the first version on."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """The runs folder, both databases, and what lies below the folder. Make it with `Places.of`.

    ```
    RUNS_DIR/optuna.db        Optuna's database, unless --storage names another
    RUNS_DIR/mlflow.db        MLflow's, unless --tracking-uri names another
    RUNS_DIR/artifacts/       files of MLflow's runs (a server keeps them elsewhere)
    RUNS_DIR/dashboard/       files that optuna-dashboard shows in notes
    RUNS_DIR/STUDY/           search.log, tuning-log.*, tuning-log-data.csv, trials/NNNN/, spool/
    ```
    """

    runs_dir: Path
    storage_url: str = field(repr=False)
    """Optuna's database as SQLAlchemy writes it. May hold a password, as the next."""
    tracking_uri: str = field(repr=False)

    @classmethod
    def of(cls, runs_dir: Path = RUNS, storage: str | None = None, tracking: str | None = None) -> Places:
        """The places of a search with these `--runs-dir`, `--storage` and `--tracking-uri`; None for the usual ones.

        Raises:
            StudyError: the path is not a text that a database could be opened by.
        """
        return cls(
            runs_dir=runs_dir,
            storage_url=storage or sqlite_url(runs_dir / "optuna.db"),
            tracking_uri=tracking or sqlite_url(runs_dir / "mlflow.db"),
        )

    @property
    def artifacts(self) -> Path:
        """Files of MLflow's runs."""
        return self.runs_dir / "artifacts"

    @property
    def notes(self) -> Path:
        """Files that the notes of trials show: optuna-dashboard's `--artifact-dir`."""
        return self.runs_dir / "dashboard"

    def study(self, name: str) -> Path:
        """The folder of a study, by Optuna's name of it."""
        return self.runs_dir / name

    def log(self, name: str) -> Path:
        """The file that takes all log lines of a study."""
        return self.study(name) / "search.log"

    def outbox(self, name: str) -> Path:
        """The folder of records that MLflow has not taken yet."""
        return self.study(name) / OUTBOX

    def options(self) -> tuple[str, ...]:
        """The options by which another command finds these places, none for the usual ones.

        URLs with a secret are left out: whoever runs the command has them in the environment
        (LORA_SEARCH_STORAGE, LORA_SEARCH_TRACKING_URI), and a log is no place for them.
        """
        from search.urls import has_secret

        words: list[str] = []
        if self.runs_dir != RUNS:
            words += ["--runs-dir", str(self.runs_dir)]
        usual = Places.of(self.runs_dir)
        if self.storage_url != usual.storage_url and not has_secret(self.storage_url):
            words += ["--storage", self.storage_url]
        if self.tracking_uri != usual.tracking_uri and not has_secret(self.tracking_uri):
            words += ["--tracking-uri", self.tracking_uri]
        return tuple(words)

    def command(self, *words: str) -> str:
        """A command with the options that find these places, quoted for a shell."""
        return shlex.join([*words, *self.options()])

    def missing(self, *options: str) -> list[str]:
        """What is wrong with databases that are files: those that are not there, a sentence each.

        Args:
            options: `--storage`, `--tracking-uri`: which are looked at, by default both.
        """
        return [
            f"there is no database {shown(str(file))}: run a study first (python -m search.run --study rsicap_mini), "
            f"or name its records with --runs-dir or {option}"
            for option, url in (("--storage", self.storage_url), ("--tracking-uri", self.tracking_uri))
            if option in (options or (option,)) and (file := sqlite_file(url)) is not None and not _is_file(file)
        ]

    def check_recorded(self) -> None:
        """Make sure that the databases are there, for commands that read and create none.

        Raises:
            StorageError: a file that is not there, and what to do.
        """
        for problem in self.missing():
            raise StorageError(problem)

    def check_storage(self) -> None:
        """The same of Optuna's database alone.

        Raises:
            StorageError: it is not there, and what to do.
        """
        for problem in self.missing("--storage"):
            raise StorageError(problem)


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite file, for SQLAlchemy, Optuna and MLflow alike.

    SQLAlchemy reads `?` and `%` in a URL as signs of its own, so they are quoted; in URLs that it writes itself it
    quotes most other signs too. MLflow takes what follows `sqlite:///` in either for a path as it stands, and makes
    its folder: an empty twin of the real one. It does so for that prefix only, so a path with such signs gets the
    driver's name (mlflow/store/db/utils.py, `_make_parent_dirs_if_sqlite`; test_places.py holds it to both).

    Raises:
        StudyError: the path is not a text that a database could be opened by.
    """
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StudyError(f"the path {shown(text)} is not UTF-8 text; name another with --runs-dir") from None
    driver = "sqlite" if quote(text, safe=" +/") == text else "sqlite+pysqlite"  # as SQLAlchemy 2.1 quotes
    return f"{driver}:///{text.replace('%', '%25').replace('?', '%3F')}"


def sqlite_file(url: str) -> Path | None:
    """The file of a SQLite database's URL; None for other databases, for one in memory and for what is not a URL."""
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # whoever opens it says what is wrong
        return None
    if parsed.get_backend_name() != "sqlite" or not parsed.database or parsed.database.startswith((":", "file:")):
        return None
    return Path(parsed.database)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or with a zero in it
        return False
