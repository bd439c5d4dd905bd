"""`python -m search.deliver --study NAME`: deliver to MLflow what a search could not, because it was away."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from search.options import RunsOption, TrackingOption, spelled
from search.places import RUNS, Places
from trainer.common import cli

if TYPE_CHECKING:
    from pathlib import Path

    from search.tracking.client import Tracking
    from search.tracking.delivery import Delivered

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: Annotated[str, typer.Option(help="The study, or one generation of it, e.g. rsicap or rsicap-2.")],
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = RUNS,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Deliver the records of a study that MLflow did not take. The command of the search delivers them too."""
    from search.errors import StudyError
    from search.storage.identity import name_of
    from search.tracking.delivery import Delivery
    from search.tracking.runs import StudyRuns

    places = Places.of(runs_dir, tracking=tracking_uri)
    name = spelled(study, [path.name for path in runs_dir.glob("*") if path.is_dir()])
    folder = places.study(name)
    if not folder.is_dir():
        raise StudyError(f"there is no folder {str(places.study(study))!r}; name the search's with --runs-dir")
    runs = StudyRuns(places, name)
    done = Delivery(runs.outbox, name_of(folder), lambda: _own(runs.connect(), folder)).once()
    left = len(runs.outbox.runs())
    if as_json:
        facts = {
            "records": done.records,
            "runs": done.runs,
            "rejected": done.rejected,
            "busy": done.busy,
            "left": left,
        }
        print(json.dumps(facts, indent=1))
    else:
        print(describe(done, left))


def _own(tracking: Tracking, folder: Path) -> Tracking:
    """The store, unless its study of the folder's name is another's.

    A folder with an id finds its own runs by it; one without is of an earlier version, and so is its study.

    Raises:
        StudyError: the study there has an id that none of an earlier version has.
    """
    from search.errors import StudyError
    from search.records import STUDY_ID
    from search.storage.identity import EARLIER, id_of

    parent = tracking.find_parent(folder.name) if id_of(folder) is None else None
    owner = tracking.tags(parent).get(STUDY_ID, EARLIER) if parent is not None else EARLIER
    if not owner.startswith(EARLIER):
        raise StudyError(
            f"{folder} says of which study it is by its name alone, and MLflow's study {folder.name!r} is another. "
            "Nothing was delivered. Name the MLflow of the search with --tracking-uri, or run the search's command "
            "again, which delivers too"
        )
    return tracking


def describe(done: Delivered, left: int) -> str:
    """What was delivered, and how many runs are left."""
    if done.busy:
        return "A search of this study is running and delivers the records itself."
    if not done.runs and not left:
        return "Nothing to deliver."
    refused = [f"MLflow refuses a record: {why}" for why in done.rejected]
    rest = f" {left} runs are left; run the same command again." if left else ""
    return "\n".join([*refused, f"{done.records} records of {done.runs} runs delivered.{rest}"])


if __name__ == "__main__":
    cli.run(app)
