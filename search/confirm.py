"""`python -m search.confirm --study NAME`: train the leaders of a study again with other seeds, for a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search import records
from search.errors import StudyError
from search.options import (
    RunsOption,
    SearchOptions,
    StorageOption,
    StudyOption,
    TrackingOption,
    find_study,
    read_duration,
    read_slots,
)
from search.places import RUNS, Places
from trainer.common import cli

if TYPE_CHECKING:
    import optuna

    from search.session import Session

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_session: Session | None = None


@app.command()
def main(
    study: StudyOption,
    top: Annotated[int, typer.Option(min=2, max=50, help="Leaders that are compared, at most.")] = 5,
    seeds: Annotated[int, typer.Option(min=2, max=50, help="Repeats of each, at most.")] = 5,
    file: Annotated[str | None, typer.Option(help="The study file, if it has moved since the search.")] = None,
    timeout: Annotated[str | None, typer.Option(help="End after this time, e.g. 2h, 90m, 1h30m; resumable.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, max=64, help="Worker processes; one a GPU by default.")] = None,
    slots: Annotated[str, typer.Option(help="Trials that a worker trains at once: auto, or 1 to 16.")] = "auto",
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = RUNS,
) -> None:
    """Repeat the leaders of a study until one wins, a tie is shown or all have been repeated. Resumable.

    Trials of the study that are not finished go on first. Candidates that can no longer win are not trained further.
    """
    global _session
    from search.run import run_shown
    from search.session import Session

    places = Places.of(runs_dir, storage, tracking_uri)
    found, options = _as_recorded(study, places)
    _session = Session(
        file or found,
        SearchOptions(
            **options,
            timeout_s=None if timeout is None else read_duration(timeout),
            workers=workers,
            slots=read_slots(slots),
            places=places,
            confirm=True,
            top=top,
            seeds=seeds,
        ),
    )
    raise typer.Exit(run_shown(_session))


def _as_recorded(name: str, places: Places) -> tuple[str, dict[str, Any]]:
    """(name or file of the study's definition, the options that its trials were run with).

    Raises:
        StudyError: there is no such study, it has no trial, or it is not the latest generation.
    """
    import optuna

    from search.storage import lifecycle, studies
    from search.storage.database import close_storage, open_storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    places.check_recorded()
    opened = open_storage(places.storage_url)
    try:
        found = find_study(opened, name)
        attrs = found.user_attrs
        latest = studies.find_study(opened, str(attrs.get(studies.NAME, found.study_name)))
        if latest.study_name != found.study_name:
            raise StudyError(
                f"{found.study_name!r} is an older generation of {latest.study_name!r}, which alone can be continued"
            )
        count = lifecycle.counted(found)
        if not count:
            raise StudyError(f"the study {found.study_name!r} has no trial yet: run it first")
        where = attrs.get(records.GIVEN_STUDY) or attrs.get(studies.NAME, found.study_name)
        return str(where), {"trials": count, **_options(found)}
    finally:
        close_storage(opened)


def _options(found: optuna.Study) -> dict[str, Any]:
    from search.storage import studies

    attrs = found.user_attrs
    return {
        "settings": tuple(attrs.get(records.SETTINGS, ())),
        "seed": attrs.get(studies.DEFINITION, {}).get("seed"),
        "strategy": attrs.get(studies.STRATEGY, {}).get("strategy", "joint"),
        "epochs": attrs.get(records.EPOCHS),
    }


def log_file() -> Path | None:
    """Where a traceback goes; None until the study is open."""
    return _session.log_file if _session is not None else None


if __name__ == "__main__":
    cli.run(app, log_file)
