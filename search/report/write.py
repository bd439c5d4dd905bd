"""The tuning log as files, each replaced as a whole: a reader sees the old or the new one, never a part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from search.diagnosis.messages import LANGS, Lang
from search.records import StudyRecord
from search.report import plots, render, words
from search.report.data import table
from search.report.facts import Facts, gather
from trainer.common.files import write_whole

NAME = "tuning-log"


def default_name(lang: Lang, suffix: str = "md") -> str:
    """`tuning-log.md`, `tuning-log.zh.md`."""
    return f"{NAME}.{suffix}" if lang == "en" else f"{NAME}.{lang}.{suffix}"


def refresh(record: StudyRecord, folder: Path, *, options: Sequence[str] = ()) -> list[Path]:
    """Write the log in every language, and its plots beside it, into a study's folder.

    Args:
        record: The study, see `search.reading.read_study`.
        folder: The study's folder; made if it does not exist.
        options: Further options of the search's command line for the commands in the log, such as `--runs-dir`.

    Returns:
        The files written: the logs, the data of all epochs, then the plots.
    """
    return write_all(gather(record, options=options), folder)


def write_all(facts: Facts, folder: Path) -> list[Path]:
    """As `refresh`, from the facts."""
    drawn = drawings(facts, folder)
    written = [write_markdown(facts, lang, folder / default_name(lang), drawn) for lang in LANGS]
    return [*written, folder / data_name(NAME), *(folder / plots_folder(NAME) / name for name in drawn)]


def drawings(facts: Facts, folder: Path) -> dict[str, bytes]:
    """The plots, and the picture of the images that trials captioned, which lies in the study's folder."""
    drawn = plots.draw(facts)
    sheet = folder / "captions" / "sheet.png"
    if facts.captions and sheet.is_file():
        drawn["captions.png"] = sheet.read_bytes()
    return drawn


def plots_folder(stem: str) -> str:
    """Name of the folder of a log's plots, beside the log and the same for all languages."""
    return f"{stem.partition('.')[0]}-plots"


def data_name(stem: str) -> str:
    """Name of the file of all epochs, beside the log and the same for all languages."""
    return f"{stem.partition('.')[0]}-data.csv"


def write_markdown(facts: Facts, lang: Lang, path: Path, drawn: dict[str, bytes]) -> Path:
    """Write one log as Markdown with its plots and the data of all epochs as files beside it."""
    folder = path.parent / plots_folder(path.name)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in drawn.items():
        replace(folder / name, data)
    beside = data_name(path.name)
    replace(path.parent / beside, table(facts))
    links = {Path(name).stem: f"{folder.name}/{name}" for name in drawn}
    replace(path, render.markdown(facts, lang, links, beside).encode())
    return path


def write_html(facts: Facts, lang: Lang, path: Path, drawn: dict[str, bytes] | None = None) -> Path:
    """Write one log as a single HTML file."""
    from search.report import page

    drawn = plots.draw(facts) if drawn is None else drawn
    links = {Path(name).stem: name for name in drawn}
    text = render.markdown(facts, lang, links)
    title = words.fill("log", lang, facts.record.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, page.html(text, lang, title, drawn).encode())
    return path


def replace(path: Path, data: bytes) -> None:
    """Write a file as a whole; one that has these bytes is left alone."""
    if not path.is_file() or path.read_bytes() != data:
        write_whole(path, data)
