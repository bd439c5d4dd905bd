"""`python -m search.compare STUDY STUDY...`: studies side by side, as text, JSON, or one HTML page."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.errors import StorageError, StudyError
from search.options import RunsOption, StorageOption, TrackingOption, find_study
from search.places import RUNS, Places
from search.records import STUDY_ID
from trainer.common import cli
from trainer.common.errors import shown

if TYPE_CHECKING:
    import optuna

    from search.comparison import Comparison, Recorded

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    studies: Annotated[
        list[str], typer.Argument(metavar="STUDY STUDY...", help="Studies, or their generations: rsicap-1, rsicap-2.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
    html: Annotated[str, typer.Option(metavar="FILE", help="Also write it as one page.")] = "",
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = RUNS,
) -> None:
    """Compare studies of one database: space, budget, verdicts, best, epochs to the best, shared configurations."""
    import optuna

    from search.comparison import compare

    if len(studies) < 2:
        raise StudyError(f"a comparison needs two studies or more, but got only {shown(studies[0])}")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    places = Places.of(runs_dir, storage, tracking_uri)
    found = compare(_read(studies, places))
    if html:
        _write(Path(html).expanduser(), found)
    print(json.dumps(found.as_data(), ensure_ascii=False, indent=1) if as_json else as_text(found))


def _read(names: list[str], places: Places) -> list[Recorded]:
    """Each study as it is recorded.

    Raises:
        UserError: there is no such database or study, or one is named twice.
    """
    from search.comparison import Recorded
    from search.storage import lifecycle, studies
    from search.storage.database import close_storage, open_storage

    places.check_storage()
    storage = open_storage(places.storage_url)
    times = _Times(places)
    try:
        read: dict[str, Recorded] = {}
        for name in names:
            study = find_study(storage, name)
            exact = studies.exact_name(study)
            if exact in read:
                raise StudyError(f"{shown(name)} is {exact}, which is named before; name another study")
            attrs = dict(study.user_attrs)
            trials = tuple(lifecycle.read_trials(study))
            definition = attrs.get(studies.DEFINITION, {})
            read[exact] = Recorded(
                name=exact, definition=definition, attrs=attrs, trials=trials, times=times.of(study)
            )
        return list(read.values())
    finally:
        close_storage(storage)


class _Times:
    """When epochs were reported, which MLflow knows; nothing is created, and it may be away."""

    def __init__(self, places: Places) -> None:
        self._places, self._away = places, bool(places.missing("--tracking-uri"))

    def of(self, study: optuna.Study) -> dict[int, dict[int, float]]:
        """By trial and epoch, see `search.reading.epoch_times`."""
        from search.reading import epoch_times
        from search.tracking.client import open_tracking
        from search.tracking.outbox import Outbox

        outbox = Outbox(self._places.outbox(study.study_name))
        if not self._away:
            try:
                tracking = open_tracking(
                    self._places.tracking_uri, self._places.artifacts, study.user_attrs.get(STUDY_ID)
                )
                return epoch_times(study, tracking, outbox)
            except StorageError as error:
                self._away = True
                print(f"{error}; comparing what Optuna has recorded", file=sys.stderr)
        return epoch_times(study, None, outbox)


def as_text(found: Comparison) -> str:
    """The comparison in aligned columns, and what the columns cannot say below them."""
    from search.comparison import rows, sentences

    table = [("", [side.name for side in found.sides]), *rows(found)]
    first = max(len(what) for what, _ in table)
    widths = [max(len(values[i]) for _, values in table) for i in range(len(found.sides))]
    lines = [
        "  ".join([what.ljust(first), *(value.ljust(w) for value, w in zip(values, widths, strict=True))]).rstrip()
        for what, values in table
    ]
    return "\n".join([*lines, "", *sentences(found)])


def as_markdown(found: Comparison) -> str:
    """The comparison as Markdown, from which the page is made."""
    from search.comparison import rows, sentences
    from search.markdown import escape

    names = [escape(side.name) for side in found.sides]
    lines = [f"# {' / '.join(names)}", "", *(f"- {escape(line)}" for line in sentences(found)), ""]
    table = rows(found)
    groups = {
        "Results and budget": [row for row in table if row[0].partition(" ")[0] not in ("search", "base")],
        "Spaces": [row for row in table if row[0].startswith("search ")],
        "What else differs": [row for row in table if row[0].startswith("base ")],
    }
    for title, some in groups.items():
        if some:
            lines += [f"## {title}", "", f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
            lines += [f"| {escape(what.strip())} | {' | '.join(map(escape, values))} |" for what, values in some]
            lines.append("")
    return "\n".join(lines)


def _write(path: Path, found: Comparison) -> None:
    from search.report import page
    from trainer.common.files import write_whole

    title = " / ".join(side.name for side in found.sides)
    try:
        write_whole(path, page.html(as_markdown(found), "en", title, {}).encode())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StudyError(f"the page {shown(str(path))} cannot be written: {why}") from None


if __name__ == "__main__":
    cli.run(app)
