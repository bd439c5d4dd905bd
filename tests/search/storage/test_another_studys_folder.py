"""A database beside the runs folder of another study of its name: every program that reads or deletes files by trials'
numbers refuses it, and leaves all as it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from search import clean, deliver, evaluate, export, records, replay
from search.places import Places
from search.report import __main__ as report
from search.storage.database import close_storage, open_storage
from search.storage.identity import EARLIER, claim, name_of
from search.storage.studies import open_study
from search.tracking.client import open_tracking
from search.tracking.runs import StudyRuns
from tests.search.storage.databases import STUDY
from tests.support import called
from trainer import run as trainer_run
from trainer.config import TrainConfig

NAME = STUDY.name


class Person:
    """One with a study of the common name, a trained trial in its folder, and a run of it in MLflow."""

    def __init__(self, folder: Path, tracking: str | None = None) -> None:
        folder.mkdir()
        self.places = Places.of(folder, tracking=tracking)
        storage = open_storage(self.places.storage_url)
        study = open_study(storage, STUDY)
        self.id = study.user_attrs[records.STUDY_ID]
        self.folder = self.places.study(NAME)
        self.folder.mkdir()
        claim(self.folder, study)
        self.runs = StudyRuns(self.places, NAME)
        self.runs.start_study({})
        trial = study.ask()
        run = self.runs.begin("trial 0", {"lora_r": 4}, {"trial": "0"})
        run.finish("FINISHED", state="COMPLETE")
        self.runs.end_study("FINISHED", {})
        own = self.folder / records.folder_of(trial.number)
        for epoch in (1, 2):
            adapter = own / f"checkpoints/epoch-{epoch:04d}/adapter"
            adapter.mkdir(parents=True)
            (adapter / "adapter_config.json").write_text("{}")
        config = TrainConfig(seed=ord(folder.name)).model_dump(mode="json")
        (own / "config.json").write_text(json.dumps(config))
        attrs = {records.CONFIG: config, "folder": records.folder_of(0), records.BEST_EPOCH: 1}
        for key, value in {**attrs, records.RUN_ID: run.run_id}.items():
            trial.set_user_attr(key, value)
        study.tell(trial, 0.5)
        close_storage(storage)

    def state(self) -> dict[str, bytes]:
        """All files of the runs folder but those that SQLite changes when it is read."""
        files = (p for p in self.places.runs_dir.rglob("*") if p.is_file() and ".db" not in p.name)
        return {str(p): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def ab(tmp_path_factory: pytest.TempPathFactory) -> tuple[Person, Person]:
    """Two people, one MLflow; what is refused changes nothing of theirs."""
    folder = tmp_path_factory.mktemp("namesakes")
    a = Person(folder / "a")
    return a, Person(folder / "b", a.places.tracking_uri)


@pytest.fixture
def a(tmp_path: Path) -> Person:
    return Person(tmp_path / "a")


@pytest.fixture
def b(tmp_path: Path, a: Person) -> Person:
    return Person(tmp_path / "b", a.places.tracking_uri)


PROGRAMS: dict[str, tuple[Callable[[], object], tuple[str, ...]]] = {
    "export": (export.app, ("--study", NAME, "--out", "out")),
    "export a trial": (export.app, ("--study", NAME, "--out", "out", "--trial", "0")),
    "clean": (clean.app, ("--study", NAME, "--keep", "1")),
    "clean --yes": (clean.app, ("--study", NAME, "--keep", "1", "--yes")),
    "evaluate": (evaluate.app, ("--study", NAME)),
    "replay": (replay.app, ("--study", NAME, "--trial", "0")),
    "retrain": (trainer_run.app, ("--from-study", NAME, "--full-data")),
    "report": (report.app, ("--study", NAME)),
    "report elsewhere": (report.app, ("--study", NAME, "--out", "log.md")),
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("how", ["the database is another", "an earlier version's folder"])
def test_a_namesakes_folder_is_refused(
    ab: tuple[Person, Person], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, how: str
) -> None:
    a, b = ab
    monkeypatch.chdir(tmp_path)
    (a.folder / records.STUDY_FILE).unlink(missing_ok=True)
    if how == "the database is another":
        (a.folder / records.STUDY_FILE).write_text(json.dumps({records.STUDY_ID: a.id, "study": NAME}))
    before = a.state()
    app, arguments = PROGRAMS[program]
    where = ["--runs-dir", str(a.places.runs_dir), "--storage", b.places.storage_url]
    done = called.call(app, [*arguments, *where])
    done.check_refused(f"{a.folder} holds the files of another study '{NAME}'", "--runs-dir", "--storage")
    assert not done.out, "something was listed"
    assert a.state() == before
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["its own", "an earlier version's folder"])
def test_a_studys_own_folder_is_not(a: Person, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.chdir(tmp_path)
    if how != "its own":
        (a.folder / records.STUDY_FILE).unlink()
    for program in ("report", "clean", "clean --yes"):  # the others' own tests train and caption
        app, arguments = PROGRAMS[program]
        done = called.call(app, [*arguments, "--runs-dir", str(a.places.runs_dir)])
        assert done.accepted, done.err
    assert not (a.folder / records.folder_of(0) / "checkpoints/epoch-0002").exists(), "clean --yes removes it"


def test_a_folder_that_says_no_id_any_more_is_refused(a: Person) -> None:
    """As by a search: a file that is torn is not taken for none."""
    (a.folder / records.STUDY_FILE).write_text("")
    done = called.call(clean.app, ["--study", NAME, "--runs-dir", str(a.places.runs_dir)])
    done.check_refused("another study")


def undelivered(person: Person, name: str = "trial 1") -> None:
    """A trial's run in the outbox, as while MLflow was away."""
    away = StudyRuns(replace(person.places, tracking_uri="http://127.0.0.1:9"), NAME)
    away.begin(name, {"lora_r": 8}, {"trial": "1"}).finish("FINISHED", state="COMPLETE")
    assert away.outbox.runs()


def delivered(person: Person, study: str = NAME) -> called.Outcome:
    where = ["--runs-dir", str(person.places.runs_dir), "--tracking-uri", person.places.tracking_uri]
    return called.call(deliver.app, ["--study", study, *where])


def runs_of(person: Person) -> int:
    tracking = open_tracking(person.places.tracking_uri, person.places.artifacts, person.id)
    experiment = tracking.find_experiment(NAME)
    assert experiment is not None
    return len(tracking.runs(experiment))


def test_records_are_delivered_to_the_folders_study_alone(a: Person, b: Person) -> None:
    undelivered(b)
    b.folder = b.folder.rename(b.folder.with_name(f"{NAME}-old"))  # as another message advises
    assert name_of(b.folder) == NAME
    assert delivered(b, f"{NAME}-old").accepted
    assert (runs_of(a), runs_of(b)) == (2, 3)


def test_an_earlier_versions_records_are_not_a_later_namesakes(a: Person, b: Person) -> None:
    undelivered(b)
    (b.folder / records.STUDY_FILE).unlink()
    delivered(b).check_refused(f"{b.folder} says of which study it is by its name alone", "--tracking-uri")
    assert b.runs.outbox.runs() and (runs_of(a), runs_of(b)) == (2, 2)
    store = b.runs.connect()
    parent = open_tracking(a.places.tracking_uri, a.places.artifacts, a.id).find_parent(NAME)
    assert parent is not None
    store._client.set_tag(parent, records.STUDY_ID, EARLIER + "0123")  # the search of an earlier version, gone on with
    assert delivered(b).accepted and runs_of(a) == 3


def test_the_studys_id_counts_where_its_folder_says_none(a: Person, b: Person) -> None:
    """As in `search.evaluate` and `trainer.run --from-study`, which have the study."""
    (b.folder / records.STUDY_FILE).unlink()
    runs = StudyRuns(b.places, NAME, b.id)
    runs.begin("trial 0 again", {"lora_r": 4}, {"trial": "0"}).finish("FINISHED", state="COMPLETE")
    assert (runs_of(a), runs_of(b)) == (2, 3)
