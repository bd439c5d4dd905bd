"""`python -m search.diagnose FILE.json`: the findings of recorded curves, one per line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from search.diagnosis import diagnose, messages
from search.diagnosis.recorded import curves, read_runs
from trainer.common import cli
from trainer.common.errors import UserError, shown

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    file: Annotated[
        Path, typer.Argument(metavar="FILE.json", help="Recorded curves: {runs: [{name, config, epochs}]}.")
    ],
    lang: Annotated[str, typer.Option(help="Language of the evidence: en or zh.")] = "en",
) -> None:
    """Print the findings of recorded curves, one per line: name<TAB>finding id<TAB>evidence."""
    chosen = next((known for known in messages.LANGS if known == lang), None)
    if chosen is None:
        raise UserError(f"--lang must be one of {', '.join(messages.LANGS)}, but got {shown(lang)}")
    for name, curve in curves(read_runs(file)):
        for finding in diagnose(curve):
            # A name with a tab or a line break would break the columns.
            print("\t".join((" ".join(name.split()), finding.id, messages.sentence(finding, chosen))))


if __name__ == "__main__":
    cli.run(app)
