"""`python -m search.deliver --study NAME`: deliver to MLflow what a search could not, because it was away."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search import options
from search.options import RunsOption, TrackingOption
from trainer.common import cli

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: Annotated[str, typer.Option(help="The study, or one generation of it, e.g. rsicap or rsicap-2.")],
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = Path("runs"),
) -> None:
    """Deliver the records of a study that MLflow has not taken yet. The search's own command does so too."""
    from search.errors import StudyError
    from search.tracking.delivery import Delivery
    from search.tracking.runs import StudyRuns

    names = (study, study.replace("-", "_"))  # as search.run takes it
    folder = next((runs_dir / name for name in names if (runs_dir / name).is_dir()), None)
    if folder is None:
        raise StudyError(f"there is no folder {str(runs_dir / study)!r}; name the search's with --runs-dir")
    book = StudyRuns(options.tracking_uri(tracking_uri, runs_dir), runs_dir / "artifacts", folder.name, folder)
    if not book.spool.runs():
        print("nothing is to be delivered")
        return
    done = Delivery(book.spool, folder.name, book.connect).once()
    if done.busy:
        print("a search of this study is running and delivers them itself")
        return
    for why in done.rejected:
        print(f"MLflow refuses a record: {why}")
    left = len(book.spool.runs())
    rest = f"; {left} runs are left, run it again" if left else ""
    print(f"{done.records} records of {done.runs} runs delivered{rest}")


if __name__ == "__main__":
    cli.run(app)
