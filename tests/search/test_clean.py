"""`search.clean` and the names of generations: what stays, what goes, and only with --yes."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from search import clean, records
from search.clean import list_pieces
from search.options import find_study
from search.places import Places
from search.space import Float
from search.storage import lifecycle, studies
from search.storage.database import open_storage
from search.study import Study
from tests.support import called
from tests.support import candidate_trials as leaders

STUDY = Study(name="tidy_one", description="", space={"learning_rate": Float(1e-5, 1e-3, log=True)}, n_trials=6)


def checkpoint(folder: Path, trial: int, epoch: int) -> Path:
    made = folder / f"trials/{trial:04d}/checkpoints/epoch-{epoch:04d}"
    (made / "adapter").mkdir(parents=True)
    (made / "adapter" / "adapter_config.json").write_text("{}")
    return made


@pytest.fixture
def runs(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "runs"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generations: the first with two trials, the second with three that ended and two that did not."""
    places = Places.of(tmp_path_factory.mktemp("clean") / "runs")
    places.runs_dir.mkdir()
    storage = open_storage(places.storage_url)
    for fresh, values in ((False, (0.5, 0.4)), (True, (0.3, 0.2, 0.6))):
        study = studies.open_study(storage, STUDY, fresh=fresh)
        folder = places.study(study.study_name)
        for value in values:
            trial = study.ask()
            trial.suggest_float("learning_rate", 1e-5, 1e-3, log=True)
            trial.set_user_attr(records.BEST_EPOCH, 2)
            trial.set_user_attr("folder", f"trials/{trial.number:04d}")
            checkpoint(folder, trial.number, 2)
            checkpoint(folder, trial.number, 4)
            study.tell(trial, value)
    # A trial that was lost, whose work another is going to take up, and one that runs.
    lost = study.ask()
    checkpoint(folder, lost.number, 1)
    lost.set_user_attr("folder", f"trials/{lost.number:04d}")
    study.tell(lost, state=optuna.trial.TrialState.FAIL)
    study.enqueue_trial({}, user_attrs={records.RESUMES: lost.number})
    return places.runs_dir


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(runs: Path) -> Call:
    def call(*arguments: object, study: str = "tidy-one") -> tuple[int, str, str]:
        command = ["--study", study, "--runs-dir", str(runs), *map(str, arguments)]
        done = called.call(clean.app, command)
        return done.code, done.out, done.err

    return call


def epochs(runs: Path) -> set[str]:
    return {str(path.relative_to(runs)) for path in runs.glob("*/trials/*/checkpoints/*")}


def test_nothing_goes_without_yes(call: Call, runs: Path) -> None:
    before = epochs(runs)
    code, out, _ = call()
    assert code == 0
    assert "--yes removes it" in out
    assert epochs(runs) == before
    assert len(before) == 11


def test_what_waiting_trials_and_the_best_need_stays(call: Call, runs: Path) -> None:
    code, out, _ = call("--keep", 1, "--yes")
    assert code == 0
    assert "removed: " in out
    assert epochs(runs) == {
        "tidy_one/trials/0001/checkpoints/epoch-0002",
        "tidy_one-2/trials/0001/checkpoints/epoch-0002",
        "tidy_one-2/trials/0003/checkpoints/epoch-0001",  # trial 4 is going to continue it
    }


def test_a_trials_folder_is_the_one_that_it_says(call: Call, runs: Path) -> None:
    """`trials/0002-2`, where another program had deleted a trial of the number; the deleted one's is nobody's."""
    places = Places.of(runs)
    folder = places.study("tidy_one-2") / "trials"
    shutil.copytree(folder / "0002", folder / "0002-2")
    with closing(sqlite3.connect(places.storage_url.removeprefix("sqlite:///"))) as database, database:
        said = "UPDATE trial_user_attributes SET value_json = ? WHERE value_json = ? AND trial_id = 5"
        assert database.execute(said, ('"trials/0002-2"', '"trials/0002"')).rowcount == 1
    study = optuna.load_study(study_name="tidy_one-2", storage=open_storage(places.storage_url))
    kept = {piece.what: piece.keep for piece in list_pieces(study, folder.parent, keep=1)}
    assert kept["trials/0002 epoch-0002"] == kept["trials/0002 epoch-0004"] == "the database has no such trial"
    assert kept["trials/0002-2 epoch-0002"] == kept["trials/0002-2 epoch-0004"] == ""


def test_one_generation_by_its_name(call: Call, runs: Path) -> None:
    code, out, _ = call("--yes", "--keep", 1, study="tidy-one-1")
    assert code == 0
    assert "tidy_one-2" not in out
    assert {name.partition("/")[0] for name in epochs(runs)} == {"tidy_one", "tidy_one-2"}
    assert len([name for name in epochs(runs) if name.startswith("tidy_one-2/")]) == 7


def test_the_first_generation_is_found_by_name(runs: Path) -> None:
    storage = open_storage(Places.of(runs).storage_url)
    names = {given: find_study(storage, given) for given in ("tidy_one", "tidy-one", "tidy_one-1", "tidy-one-1")}
    assert {given: study.study_name for given, study in names.items()} == {
        "tidy_one": "tidy_one-2",
        "tidy-one": "tidy_one-2",
        "tidy_one-1": "tidy_one",
        "tidy-one-1": "tidy_one",
    }
    assert studies.exact_name(names["tidy_one-1"]) == "tidy_one-1"
    assert studies.exact_name(names["tidy_one"]) == "tidy_one-2"


def test_links_are_left_alone(runs: Path, tmp_path: Path) -> None:
    elsewhere = checkpoint(tmp_path / "elsewhere", 0, 9)
    (runs / "tidy_one/trials/0000/checkpoints/epoch-0009").symlink_to(elsewhere)
    study = find_study(open_storage(Places.of(runs).storage_url), "tidy_one-1")
    assert not [p for p in list_pieces(study, runs / "tidy_one", 1) if "epoch-0009" in p.what]


def test_what_the_verdict_names_or_may_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--keep 1` alone would keep the lowest only, and an export of the winner would find nothing."""
    trials = [
        leaders.trial(n, value, attrs={"folder": f"trials/{n:04d}"}) for n, value in enumerate((0.4, 0.401, 0.402))
    ]
    for trial in trials:
        checkpoint(tmp_path, trial.number, 4)
    known = [*trials]
    study: Any = SimpleNamespace(study_name="judged", user_attrs={records.CONFIRM: {"top": 3, "seeds": 3}})
    monkeypatch.setattr(lifecycle, "read_trials", lambda _: known)
    monkeypatch.setattr(lifecycle, "untaken", lambda _: [])

    def kept() -> dict[str, str]:
        pieces = list_pieces(study, tmp_path, 1)
        return {p.what.removesuffix(" epoch-0004"): p.keep.partition(", ")[2] for p in pieces if "of trial" in p.keep}

    may = "the verdict may name it"
    assert kept() == {"trials/0000": "it leads so far", "trials/0001": may, "trials/0002": may}
    for n, losses in enumerate(((0.42, 0.421, 0.425), (0.40, 0.402, 0.404), (0.41, 0.413, 0.414))):
        known += [leaders.repeat(3 + 3 * n + b, n, b, value) for b, value in enumerate(losses, start=1)]
    assert kept() == {"trials/0000": "number 1 of the generation", "trials/0001": "named by the verdict"}
    study.user_attrs = {}
    known[3:] = []
    assert kept() == {"trials/0000": "number 1 of the generation"}
