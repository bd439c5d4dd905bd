"""`python -m search.diagnose FILE.json`: the findings of recorded curves, one per line."""

from __future__ import annotations

import json
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
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the findings of recorded curves, one per line: name<TAB>finding id<TAB>evidence."""
    chosen = next((known for known in messages.LANGS if known == lang), None)
    if chosen is None:
        raise UserError(f"--lang must be one of {', '.join(messages.LANGS)}, but got {shown(lang)}")
    found = [
        (name, finding.id, messages.sentence(finding, chosen))
        for name, curve in curves(read_runs(file))
        for finding in diagnose(curve)
    ]
    if as_json:
        print(json.dumps([dict(zip(("run", "finding", "evidence"), each, strict=True)) for each in found], indent=1))
        return
    for name, finding_id, evidence in found:
        # A name with a tab or a line break would break the columns.
        print("\t".join((" ".join(name.split()), finding_id, evidence)))


if __name__ == "__main__":
    cli.run(app)
