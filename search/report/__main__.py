"""`python -m search.report --study NAME`: write a study's tuning log from its records."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from search.errors import StudyError, Unavailable
from search.options import StorageOption, StudyOption, TrackingOption, find_study
from search.places import RUNS, Places
from trainer.common import cli
from trainer.common.errors import shown

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: StudyOption,
    lang: Annotated[Literal["en", "zh"], typer.Option(help="Language of the log.")] = "en",
    format_: Annotated[
        Literal["md", "html"] | None,
        typer.Option("--format", help="Markdown with plots beside it, or one HTML file; by default as --out ends."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output file; RUNS_DIR/STUDY/tuning-log.md by default.")] = None,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder of the studies and of both databases.")] = RUNS,
) -> None:
    """Write the tuning log of a study from what Optuna and MLflow recorded of it."""
    import optuna

    from search import reading
    from search.records import STUDY_ID
    from search.report import write
    from search.report.facts import gather
    from search.storage.database import open_storage
    from search.storage.identity import check_folder
    from search.tracking.client import open_tracking
    from search.tracking.outbox import Outbox

    if out is not None and out.is_dir():
        raise StudyError(f"{shown(str(out))} is a folder; name a file in it with --out")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    places = Places.of(runs_dir, storage, tracking_uri)
    places.check_recorded()
    found = find_study(open_storage(places.storage_url), study)
    check_folder(places.study(found.study_name), found)
    outbox = Outbox(places.outbox(found.study_name))
    try:
        tracking = open_tracking(places.tracking_uri, places.artifacts, found.user_attrs.get(STUDY_ID))
        record = reading.read_study(found, tracking, outbox)
    except Unavailable as error:
        print(f"{error}; writing the log from Optuna's records alone", file=sys.stderr)
        record = reading.read_study(found, None, outbox, away=True)
    facts = gather(record, options=places.options())
    format_ = format_ or ("html" if out is not None and out.suffix.lower() in (".html", ".htm") else "md")
    path = out or places.study(record.name) / write.default_name(lang, format_)
    drawn = write.drawings(facts, places.study(record.name))
    try:
        if format_ == "html":
            write.write_html(facts, lang, path, drawn)
        else:
            write.write_markdown(facts, lang, path, drawn)
    except OSError as error:
        raise StudyError(f"the log {shown(str(path))} cannot be written: {error.strerror or error}") from None
    print(path)


if __name__ == "__main__":
    cli.run(app)
