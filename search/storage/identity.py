"""Which study is which: by its own id, never by a name, a number or a path alone.

A study's id is made with it and never changes. Optuna's study has it as an attribute, its runs folder in `study.json`,
its MLflow experiment and parent run as a tag; wherever two of them meet, both sides are compared. So the old
checkpoints of a study whose database was deleted are not taken for those of its namesake, nor are the runs of a
colleague's.

    claim           a runs folder for a study, or the reason why it is another's
    check_folder    the same for programs that read or delete: a folder is not made a study's by being looked at
    Watch           whether study, database and folder are still those that a search began with
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import records
from search.errors import StudyError, StudyGone
from search.places import Places, sqlite_file
from search.urls import shown
from trainer.common.errors import shown as quoted

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

EARLIER = "earlier-"
"""Beginning of the id of a study that an earlier version made, without one: what has no id may be its own."""
NAME = "study"
"""Optuna's name of the study, in `study.json`."""


def new_id() -> str:
    """An id for a study that is made now."""
    return secrets.token_hex(16)


def id_of(folder: Path) -> str | None:
    """The id of the study whose files a folder holds; None if it says none."""
    return _said(folder, records.STUDY_ID)


def name_of(folder: Path) -> str:
    """Optuna's name of the study whose files a folder holds, which may have been moved away; else the folder's own."""
    return _said(folder, NAME) or folder.name


def _said(folder: Path, key: str) -> str | None:
    try:
        found = json.loads((folder / records.STUDY_FILE).read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def claim(folder: Path, study: optuna.Study) -> None:
    """Make the folder this study's, unless it is another's. It exists.

    One that an earlier version has filled says no id: it is the study's if its trials' configurations are.

    Raises:
        StudyError: it holds another study's files.
    """
    mine = study.user_attrs[records.STUDY_ID]
    theirs = id_of(folder)
    if theirs is None and _fits(folder, study.get_trials(deepcopy=False)):
        text = json.dumps({records.STUDY_ID: mine, NAME: study.study_name}, indent=1)
        try:
            with (folder / records.STUDY_FILE).open("x", encoding="utf-8") as file:
                file.write(text)
            theirs = mine
        except FileExistsError:  # another process has claimed it just now
            theirs = id_of(folder)
        except OSError as error:
            raise StudyError(f"the folder {quoted(str(folder))} cannot be written: {error.strerror}") from None
    if theirs != mine:
        raise StudyError(
            f"{folder} holds the files of another study {study.study_name!r}: its database was deleted, or is another "
            "than --storage names. Its checkpoints are not this study's. Move it away "
            f"(mv {folder} {folder}-old), or name another folder with --runs-dir"
        )


def check_folder(folder: Path, study: optuna.Study) -> None:
    """Make sure that what lies in the folder is this study's, for programs that read or delete by trials' numbers.

    Nothing is written. A folder that is not there or says no id is looked at as `claim` does.

    Raises:
        StudyError: it holds another study's files.
    """
    if (folder / records.STUDY_FILE).exists():
        theirs = id_of(folder)
        own = theirs is not None and theirs == study.user_attrs.get(records.STUDY_ID)
    else:
        own = _fits(folder, study.get_trials(deepcopy=False))
    if not own:
        raise StudyError(
            f"{folder} holds the files of another study {study.study_name!r}, not the database's: that one's database "
            "was deleted, or is another than --storage names. Nothing was read, written or deleted. Name the runs "
            "folder of the database's study with --runs-dir, or the folder's own database with --storage"
        )


def _fits(folder: Path, trials: Sequence[FrozenTrial]) -> bool:
    """Whether every trial's folder below has the configuration of the study's trial that it is of."""
    attrs = {t.user_attrs.get(records.FOLDER) or records.folder_of(t.number): t.user_attrs for t in trials}
    configs = {name: each.get(records.CONFIG) for name, each in attrs.items()}
    for path in folder.glob("trials/*/config.json"):
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # torn: its checkpoints say whose they are
        if configs.get(path.parent.relative_to(folder).as_posix()) != there:
            return False
    return True


class Watch:
    """Whether a study, its database and its folder are still those that a search began with.

    Numbers do not tell: after a study is deleted, Optuna gives its number and those of its trials to the next one.
    """

    def __init__(self, study: optuna.Study, places: Places) -> None:
        from search.storage.optuna_private import backend  # Optuna, which whoever only asks for an id need not load

        self._study, self._places = study, places
        self._storage: Any = backend(study)
        self._number = self._storage.get_study_id_from_name(study.study_name)
        self._id = study.user_attrs.get(records.STUDY_ID)
        self._folder = places.study(study.study_name)
        self._held_by = id_of(self._folder)
        self._file = sqlite_file(places.storage_url)
        self._inode = _inode(self._file)

    def check(self) -> None:
        """Make sure of all three. Costs a query.

        Raises:
            StudyGone: one was deleted or replaced; the message says which.
            DatabaseAway: the database does not answer.
        """
        name = self._study.study_name
        if self._file is not None and _inode(self._file) != self._inode:
            raise StudyGone(f"the database {shown(self._places.storage_url)} was deleted or replaced {_WHILE}")
        try:
            there = self._storage.get_study_user_attrs(self._number).get(records.STUDY_ID)
        except KeyError:
            there = None
        if there != self._id:
            raise StudyGone(f"the study {name!r} was deleted from {shown(self._places.storage_url)} {_WHILE}")
        if id_of(self._folder) != self._held_by:
            raise StudyGone(f"the folder {self._folder} was deleted or replaced {_WHILE}")

    def problem(self) -> StudyGone | None:
        """What `check` raises; None also if the database is away."""
        try:
            self.check()
        except StudyGone as gone:
            return gone
        except Exception:  # noqa: BLE001 - a database that is away is told by those who need it
            return None
        return None


_WHILE = "while the search ran; it ends here, and leaves what is there now alone"


def _inode(file: Path | None) -> tuple[int, int] | None:
    try:
        found = file.stat() if file is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_dev, found.st_ino)
