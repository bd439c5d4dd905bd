"""`python -m search.report --study NAME`: write a study's tuning log from its records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from search.errors import StorageError, Unavailable
from search.options import StorageOption, TrackingOption, is_file, sqlite_url
from trainer.common import cli
from trainer.common.errors import shown

if TYPE_CHECKING:
    import optuna

    from search.storage.retry import RetryingStorage

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: Annotated[str, typer.Option(help="The study's name, e.g. rsicap_mini, or a generation: rsicap_mini-2.")],
    lang: Annotated[Literal["en", "zh"], typer.Option(help="Language of the log.")] = "en",
    format_: Annotated[
        Literal["md", "html"], typer.Option("--format", help="Markdown with plots beside it, or one HTML file.")
    ] = "md",
    out: Annotated[Path | None, typer.Option(help="Output file; RUNS_DIR/STUDY/tuning-log.md by default.")] = None,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder of the studies and of both databases.")] = Path("runs"),
) -> None:
    """Write the tuning log of a study from what Optuna and MLflow recorded of it."""
    import optuna

    from search import reading
    from search.report import write
    from search.report.facts import gather
    from search.storage import studies as store
    from search.tracking.client import open_tracking
    from search.tracking.outbox import FOLDER, Outbox

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = _find(store.open_storage(_existing(storage, runs_dir / "optuna.db", "Optuna")), study)
    uri = _existing(tracking_uri, runs_dir / "mlflow.db", "MLflow")
    spool = Outbox(runs_dir / found.study_name / FOLDER)
    try:
        record = reading.read_study(found, open_tracking(uri, runs_dir / "artifacts"), spool)
    except Unavailable as error:
        print(f"{error}; writing the log from Optuna's records alone", file=sys.stderr)
        record = reading.read_study(found, None, spool, away=True)
    facts = gather(record, options=_options(storage, tracking_uri, runs_dir))
    path = out or runs_dir / record.name / write.default_name(lang, format_)
    if format_ == "html":
        write.write_html(facts, lang, path)
    else:
        from search.report import plots

        write.write_markdown(facts, lang, path, plots.draw(facts))
    print(path)


def _find(database: RetryingStorage, study: str) -> optuna.Study:
    """The study of this name; hyphens stand for underscores, as on the search's command line."""
    from search.storage import studies as store

    names = {found.study_name for found in database.get_all_studies()}
    other = study.replace("-", "_")
    return store.find_study(database, study if study in names or other not in names else other)


def _existing(url: str | None, default: Path, what: str) -> str:
    """The URL of an existing database; a report does not create one."""
    import sqlalchemy

    if url is not None:
        try:
            parsed = sqlalchemy.make_url(url)
        except (sqlalchemy.exc.ArgumentError, ValueError):
            return url  # opening it says what is wrong
        if parsed.get_backend_name() != "sqlite" or not parsed.database:
            return url
        default = Path(parsed.database)
    if not is_file(default):
        raise StorageError(
            f"there is no {what} database {shown(str(default))}; name the folder of the search with --runs-dir, "
            "or its database with --storage and --tracking-uri"
        )
    return url or sqlite_url(default)


def _options(storage: str | None, tracking_uri: str | None, runs_dir: Path) -> list[str]:
    """What the search's command line needs beside the study's name, passwords masked."""
    from search.tracking.address import masked

    options = []
    if storage is not None:
        options += ["--storage", masked(storage)]
    if tracking_uri is not None:
        options += ["--tracking-uri", masked(tracking_uri)]
    return [*options, "--runs-dir", str(runs_dir)] if runs_dir != Path("runs") else options


if __name__ == "__main__":
    cli.run(app)
