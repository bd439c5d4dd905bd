"""`python -m trainer.data.check FOLDER`: the audit of a data folder, as text, JSON, or one HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from trainer.common import cli, progress
from trainer.common.errors import DataError
from trainer.common.files import write_whole
from trainer.config import EMBEDDED, TrainConfig, default
from trainer.data.audit import Audit, audit

MOST_LINES = 20
"""Bad rows and groups of copies that the text lists."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The data folder, or mini.")],
    model: Annotated[str, typer.Option(help="The checkpoint whose tokenizer reads the captions.")] = EMBEDDED,
    max_target_length: Annotated[int, typer.Option(min=1, max=4096, help="Longest caption in tokens.")] = default(
        "max_target_length"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
    html: Annotated[str, typer.Option(metavar="FILE", help="Also write one page with pictures.")] = "",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A field that decides the split, as split.")
    ] = None,
) -> None:
    """Look at a data folder as a search would, and further. Exit code 2 if a search would refuse it."""
    base = {"data": folder, "model": model, "max_target_length": max_target_length}
    config = TrainConfig.parse_settings(settings or [], base)
    with progress.bar("looking at images") as show:
        found = audit(config, show)
    if html:
        from trainer.data.page import page

        try:
            write_whole(Path(html).expanduser(), page(found))
        except (OSError, RuntimeError, ValueError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"the page {html!r} cannot be written: {why}") from None
    print(json.dumps(as_data(found), ensure_ascii=False, indent=2) if as_json else as_text(found))
    if found.refused:
        raise typer.Exit(2)


def as_text(found: Audit) -> str:
    """The findings, a line each."""
    lines = [found.examined.folder]
    lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in found.counts().items()]
    if found.text is not None:
        lines.append(f"  {found.text.summary()}")
    lines += [f"  {line}" for line in found.split_lines()]
    lines += [f"warning: {warning}" for warning in found.warnings()]
    for group in found.copies[:MOST_LINES]:
        kind = "identical files" if group.identical else "copies"
        lines.append(f"{kind} ({group.sides}): {', '.join(row.image.name for row in group.rows[:MOST_LINES])}")
    bad = found.examined.bad
    lines += [f"bad row: {problem}" for problem in bad[:MOST_LINES]]
    if len(bad) > MOST_LINES:
        lines.append(f"and {len(bad) - MOST_LINES} more bad rows; --json lists all")
    lines.append("a search would refuse this folder" if found.refused else "a search would take this folder")
    return "\n".join(lines)


def as_data(found: Audit) -> dict[str, object]:
    """The findings as plain data, complete."""
    return {
        "folder": found.examined.folder,
        "refused": found.refused,
        "counts": found.counts(),
        "warnings": found.warnings(),
        "split": found.split_lines(),
        "bad": list(found.examined.bad),
        "copies": [
            {
                "identical": group.identical,
                "scenes": group.scenes,
                "sides": group.sides,
                "images": [str(row.image) for row in group.rows],
            }
            for group in found.copies
        ],
        "caption_lengths": list(found.text.lengths) if found.text else [],
    }


if __name__ == "__main__":
    cli.run(app)
