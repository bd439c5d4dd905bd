"""`python -m search.clean --study NAME`: what a study's files take, what could go; removes only with --yes."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.errors import StudyError
from search.options import RunsOption, StorageOption, StudyOption, find_study
from search.places import RUNS, Places
from trainer.common import cli
from trainer.common.errors import shown
from trainer.common.files import UNFINISHED as UNFINISHED_FILES
from trainer.common.files import unfinished_name

if TYPE_CHECKING:
    import optuna

    from search.records import TrialRecord
    from search.verdict.race import Verdict

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

UNFINISHED = ("WAITING", "RUNNING")


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One folder or file that takes room."""

    generation: str
    """Optuna's name of the study's generation; empty for what all studies share."""
    what: str
    path: str
    size: int
    """Bytes."""
    keep: str
    """Why it stays; empty for what could go."""


@app.command()
def main(
    study: StudyOption,
    keep: Annotated[int, typer.Option(min=1, help="Best trials of each generation whose adapters stay.")] = 3,
    yes: Annotated[bool, typer.Option("--yes", help="Remove what could go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    storage: StorageOption = None,
    runs_dir: RunsOption = RUNS,
) -> None:
    """List what the checkpoints of a study's generations take, and what could go.

    What stays: everything of trials that wait or run, the adapters of the best trials (a verdict, captions and an
    export need them), and all records. Named by one generation (rsicap-1), only that one is looked at.
    """
    import optuna

    from search.storage import studies
    from search.storage.database import open_storage
    from search.storage.identity import check_folder

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    places = Places.of(runs_dir, storage)
    places.check_storage()
    backend = open_storage(places.storage_url)
    found = find_study(backend, study)
    names = studies.generations(found, backend)
    if study.replace("-", "_") != str(found.user_attrs.get(studies.NAME)).replace("-", "_"):
        names = [found.study_name]  # one generation by its own name
    pieces: list[Piece] = []
    generations = [optuna.load_study(study_name=name, storage=backend) for name in names]
    for each in generations:  # all of them before anything is listed
        check_folder(places.study(each.study_name), each)
    for each in generations:
        pieces += list_pieces(each, places.study(each.study_name), keep)
    pieces += shared_pieces()
    removed = [piece for piece in pieces if not piece.keep] if yes else []
    for piece in removed:
        _remove(Path(piece.path))
    if as_json:
        print(json.dumps({"removed": yes, "pieces": [asdict(piece) for piece in pieces]}, indent=1))
    else:
        print(describe(pieces, removed=yes))


def _remove(folder: Path) -> None:
    """Remove a checkpoint at once for whoever looks for it, then file by file; one that is gone by then is no fault.

    Raises:
        StudyError: it cannot be removed.
    """
    going = unfinished_name(folder)
    try:
        with suppress(FileNotFoundError):  # another `clean`
            going = folder if folder.match(UNFINISHED_FILES) else folder.rename(going)
            shutil.rmtree(going)
    except OSError as error:
        raise StudyError(
            f"{shown(str(folder))} cannot be removed: {error.strerror}; what comes before it in the list is gone"
        ) from None


def list_pieces(study: optuna.Study, folder: Path, keep: int) -> list[Piece]:
    """The checkpoints of one generation, and its other files.

    Args:
        study: the generation.
        folder: its files.
        keep: best trials whose best adapters stay.
    """
    from search import records
    from search.storage import lifecycle
    from search.verdict.leaders import verdict_of

    runs = sorted((folder / "trials").glob("*"))  # first: who begins meanwhile is not among them
    trials = lifecycle.read_trials(study)
    needed = _needed(study, trials)
    best = _best(trials, keep) | _judged(trials, verdict_of(trials, study.user_attrs))
    known = {str(trial.attrs.get(records.FOLDER) or records.folder_of(trial.number)) for trial in trials}
    found = []
    for run in runs:
        inside = run / "checkpoints"
        for checkpoint in sorted([*inside.glob("epoch-*"), *inside.glob(UNFINISHED_FILES)]):
            if checkpoint.is_symlink() or inside.is_symlink() or not checkpoint.is_dir():
                continue  # of someone else's making
            name = f"trials/{run.name}"
            reason = needed.get(name) or best.get((name, checkpoint.name)) or ""
            if name not in known:
                reason = "the database has no such trial"
            found.append(
                Piece(
                    generation=study.study_name,
                    what=f"{name} {checkpoint.name}",
                    path=str(checkpoint),
                    size=size_of(checkpoint),
                    keep=reason,
                )
            )
    rest = size_of(folder) - sum(piece.size for piece in found)
    if folder.is_dir():
        about = Piece(
            generation=study.study_name, what="logs, plots, records", path=str(folder), size=rest, keep="records stay"
        )
        found.append(about)
    return found


def shared_pieces() -> list[Piece]:
    """What lies in the cache for all studies."""
    from trainer.common.cache import cache_folder

    features = cache_folder() / "features"
    if not features.is_dir():
        return []
    what = "vision outputs of all studies"
    reason = "delete the folder while no search runs: they are computed again"
    return [Piece(generation="", what=what, path=str(features), size=size_of(features), keep=reason)]


def _needed(study: optuna.Study, trials: Sequence[TrialRecord]) -> dict[str, str]:
    """Folders of trials that are not over, and why; one that takes up another's work has that one's folder."""
    from search.storage import lifecycle

    found = {}
    for trial in trials:
        if trial.state in UNFINISHED:
            for number in lifecycle.lineage(study, trial.number):
                found[f"trials/{number:04d}"] = f"trial {trial.number} is {trial.state}"
            if "folder" in trial.attrs:
                found[str(trial.attrs["folder"])] = f"trial {trial.number} is {trial.state}"
    for lost in lifecycle.untaken(study):
        for number in lifecycle.lineage(study, lost):
            found[f"trials/{number:04d}"] = f"trial {lost} was lost, and the next search goes on with it"
    return found


def _best(trials: Sequence[TrialRecord], keep: int) -> dict[tuple[str, str], str]:
    """(folder, checkpoint) of the best adapters, and why they stay."""
    from search import leaderboard

    complete = [trial for trial in leaderboard.ranked(trials) if trial.state == "COMPLETE"]
    found: dict[tuple[str, str], str] = {}
    for place, trial in enumerate(complete[:keep], start=1):
        found |= _adapter(trial, f"number {place} of the generation")
    return found


def _judged(trials: Sequence[TrialRecord], verdict: Verdict | None) -> dict[tuple[str, str], str]:
    """Like `_best`, of whom the verdict names, and before it is reached of all that it may name."""
    from search.verdict.leaders import leaders

    if verdict is None:
        return {}
    decided = verdict.names
    left = {standing.number for standing in verdict.standings if not standing.out}
    if not left and not decided:  # no repeat has ended yet
        left = {trial.number for trial in leaders(trials)}
    found: dict[tuple[str, str], str] = {}
    for trial in trials:
        if trial.number == verdict.choice:
            found |= _adapter(trial, "named by the verdict" if decided else "it leads so far")
        elif trial.number in left and not decided:
            found |= _adapter(trial, "the verdict may name it")
    return found


def _adapter(trial: TrialRecord, why: str) -> dict[tuple[str, str], str]:
    """Where a trial's best adapter is, and why it stays; nothing for a trial without one."""
    if trial.best_epoch is None or "folder" not in trial.attrs:
        return {}
    key = (str(trial.attrs["folder"]), f"epoch-{trial.best_epoch:04d}")
    return {key: f"adapter of trial {trial.number}, {why}"}


def size_of(path: Path) -> int:
    """Bytes of all files below, links not followed."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            total += (Path(folder) / name).lstat().st_size
    return total


def describe(pieces: Sequence[Piece], *, removed: bool) -> str:
    """The pieces by generation, with what could go or has gone."""
    lines = []
    for generation in dict.fromkeys(piece.generation for piece in pieces):
        mine = [piece for piece in pieces if piece.generation == generation]
        lines.append(f"{generation or 'shared'}: {shown_size(sum(piece.size for piece in mine))}")
        for piece in mine:
            fate = piece.keep or ("removed" if removed else "could go")
            lines.append(f"  {shown_size(piece.size):>10}  {piece.what}: {fate}")
    free = sum(piece.size for piece in pieces if not piece.keep)
    if removed:
        lines.append(f"removed: {shown_size(free)}")
    else:
        lines.append(f"could go: {shown_size(free)}" + ("; --yes removes it" if free else ""))
    return "\n".join(lines)


def shown_size(size: int) -> str:
    """Bytes in the unit that suits."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size = size / 1000  # type: ignore[assignment]
    return f"{size:.1f} GB"


if __name__ == "__main__":
    cli.run(app)
