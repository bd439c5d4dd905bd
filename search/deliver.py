"""`python -m search.deliver --study NAME`: deliver to MLflow what a search could not, because it was away."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search import options
from search.options import RunsOption, TrackingOption
from trainer.common import cli

if TYPE_CHECKING:
    from search.tracking.delivery import Delivered

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: Annotated[str, typer.Option(help="The study, or one generation of it, e.g. rsicap or rsicap-2.")],
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Deliver the records of a study that MLflow did not take. The command of the search delivers them too."""
    from search.errors import StudyError
    from search.tracking.delivery import Delivery
    from search.tracking.runs import StudyRuns

    names = (study, study.replace("-", "_"))  # as search.run takes it
    folder = next((runs_dir / name for name in names if (runs_dir / name).is_dir()), None)
    if folder is None:
        raise StudyError(f"there is no folder {str(runs_dir / study)!r}; name the search's with --runs-dir")
    runs = StudyRuns(options.tracking_uri(tracking_uri, runs_dir), runs_dir / "artifacts", folder.name, folder)
    print(describe(Delivery(runs.outbox, folder.name, runs.connect).once(), len(runs.outbox.runs())))


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
