"""Which study is which: ids in Optuna, in the runs folder and in MLflow, compared on both sides."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from search import export, records
from search.errors import StorageError, StudyError, StudyGone
from search.places import Places
from search.session.closing import BEST
from search.storage.database import close_storage, open_storage
from search.storage.identity import EARLIER, Watch, claim, id_of
from search.storage.studies import open_study
from search.tracking.client import Tracking, open_tracking
from search.tracking.outbox import Model
from search.tracking.runs import StudyRuns
from tests.search.storage.databases import STUDY


class Somebody:
    """A person with a runs folder and an Optuna database."""

    def __init__(self, folder: Path) -> None:
        self.places = Places.of(folder)
        folder.mkdir(exist_ok=True)
        self.open()

    def open(self) -> None:
        self.storage = open_storage(self.places.storage_url)
        self.study = open_study(self.storage, STUDY)
        self.folder = self.places.study(self.study.study_name)
        self.folder.mkdir(exist_ok=True)

    def close(self) -> None:
        close_storage(self.storage)

    def trained(self, place: int = 1) -> None:
        """A trial of the study, with its folder."""
        trial = self.study.ask()
        trial.set_user_attr(records.CONFIG, {"lora_r": 4})
        name = records.folder_of(trial.number, place)
        if place > 1:  # earlier versions' trials are in the folder of their number
            trial.set_user_attr(records.FOLDER, name)
        folder = self.folder / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"lora_r": 4}))


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Somebody]:
    somebody = Somebody(tmp_path / "runs")
    yield somebody
    somebody.close()


def test_a_folder_belongs_to_one_study(one: Somebody) -> None:
    claim(one.folder, one.study)
    assert id_of(one.folder) == one.study.user_attrs[records.STUDY_ID]
    one.trained()
    one.close()
    one.open()  # as every later search does
    claim(one.folder, one.study)


@pytest.mark.parametrize("how", ["the database is deleted", "the study is deleted"])
def test_old_files_are_never_the_new_studys(one: Somebody, how: str) -> None:
    claim(one.folder, one.study)
    one.trained()
    if how == "the study is deleted":
        optuna.delete_study(study_name=one.study.study_name, storage=one.storage)
    one.close()
    if how == "the database is deleted":
        for file in one.places.runs_dir.glob("optuna.db*"):
            file.unlink()
    one.open()
    with pytest.raises(StudyError, match=r"holds the files of another study 'rsicap'.*mv .*--runs-dir"):
        claim(one.folder, one.study)
    one.folder.rename(one.folder.with_name("rsicap-old"))  # as it advises
    one.folder.mkdir()
    claim(one.folder, one.study)


@pytest.mark.parametrize("place", [1, 2])
def test_a_folder_of_an_earlier_version_is_known_by_its_trials(one: Somebody, place: int) -> None:
    one.trained(place)
    claim(one.folder, one.study)
    (one.folder / records.STUDY_FILE).unlink()
    claim(one.folder, one.study)
    (one.folder / records.STUDY_FILE).unlink()
    config = one.folder / records.folder_of(0, place) / "config.json"
    config.write_text(json.dumps({"lora_r": 5}))
    with pytest.raises(StudyError, match="another study"):
        claim(one.folder, one.study)
    config.write_text('{"lora_r": ')  # torn by a power cut
    claim(one.folder, one.study)


def test_an_earlier_versions_study_gets_an_id_once(one: Somebody) -> None:
    with one.storage.engine.begin() as connection:
        connection.exec_driver_sql("delete from study_user_attributes where key = 'study_id'")
    ids = {open_study(one.storage, STUDY).user_attrs[records.STUDY_ID] for _ in range(2)}
    assert len(ids) == 1 and ids.pop().startswith(EARLIER)


class TestWhileASearchRuns:
    @pytest.fixture
    def watch(self, one: Somebody) -> Watch:
        claim(one.folder, one.study)
        watch = Watch(one.study, one.places)
        watch.check()
        return watch

    def test_the_study_is_deleted_and_another_has_its_number(self, one: Somebody, watch: Watch) -> None:
        optuna.delete_study(study_name=one.study.study_name, storage=one.storage)
        with pytest.raises(StudyGone, match="the study 'rsicap' was deleted from"):
            watch.check()
        again = open_study(one.storage, STUDY)
        assert again._study_id == one.study._study_id, "SQLite gives numbers again"
        with pytest.raises(StudyGone, match="the study 'rsicap' was deleted from"):
            watch.check()

    def test_the_database_is_deleted_or_replaced(self, one: Somebody, watch: Watch) -> None:
        file = one.places.runs_dir / "optuna.db"
        shutil.copy(file, file.with_suffix(".copy"))
        file.unlink()
        for _ in range(2):
            problem = watch.problem()
            assert problem is not None and "optuna.db was deleted or replaced while the search ran" in str(problem)
            assert problem.exit_code == 2
            file.with_suffix(".copy").replace(file) if not file.exists() else None

    def test_the_runs_folder_is_deleted(self, one: Somebody, watch: Watch) -> None:
        shutil.rmtree(one.folder)
        with pytest.raises(StudyGone, match=r"the folder .*rsicap was deleted or replaced"):
            watch.check()


def keep_model(runs: StudyRuns, run_id: str, folder: Path) -> None:
    """The winner's adapter, as a search's end keeps it."""
    adapter = folder / "adapter"
    adapter.mkdir(exist_ok=True)
    (adapter / "adapter_config.json").write_text("{}")
    runs.keep_model(run_id, Model(path=str(adapter), name="rsicap", alias=BEST, step=1, metrics={}, params={}))


def registered(store: Tracking) -> dict[str, tuple[str | None, str]]:
    """The owner of each registered model, and the run of its best version."""
    return {
        found.name: (
            found.tags.get(records.STUDY_ID),
            store._client.get_model_version_by_alias(found.name, BEST).run_id,
        )
        for found in store._client.search_registered_models()
    }


def test_two_studies_of_one_name_keep_apart_in_one_mlflow(tmp_path: Path) -> None:
    tracking = f"sqlite:///{tmp_path}/mlflow.db"
    found: list[tuple[str, str]] = []
    people = [Somebody(tmp_path / who) for who in "ab"]
    best: list[str] = []
    for who in people:
        claim(who.folder, who.study)
        runs = StudyRuns(replace(who.places, tracking_uri=tracking), who.study.study_name)
        assert runs.start_study({}) is None
        run = runs.begin("trial 0", {"lora_r": 4}, {"trial": "0"})
        run.finish("FINISHED", state="COMPLETE")
        for _ in range(2):  # a search that is run again keeps the same
            keep_model(runs, run.run_id, tmp_path)
        best.append(run.run_id)
        runs.end_study("FINISHED", {"best_trial": who.folder.parent.name})
    # The registry, by the two names: b's search moves no alias of a's.
    names = ["rsicap", f"rsicap-{people[1].study.user_attrs[records.STUDY_ID][:8]}"]
    assert registered(open_tracking(tracking, tmp_path)) == {
        name: (who.study.user_attrs[records.STUDY_ID], run_id)
        for name, who, run_id in zip(names, people, best, strict=True)
    }
    for who in people:
        store = open_tracking(tracking, who.places.artifacts, who.study.user_attrs[records.STUDY_ID])
        parent = store.find_parent("rsicap")
        experiment = store.find_experiment("rsicap")
        assert parent is not None and experiment is not None
        tags = store.tags(parent)
        assert tags["best_trial"] == who.folder.parent.name
        assert tags[records.STUDY_ID] == who.study.user_attrs[records.STUDY_ID]
        assert len(store.runs(experiment)) == 2
        read = export.read(who.study, replace(who.places, tracking_uri=tracking))
        assert (read.experiment_id, read.parent_run_id) == (experiment, parent), "what an export tells of"
        found.append((parent, experiment))
        who.close()
    assert found[0][0] != found[1][0] and found[0][1] != found[1][1]


@pytest.mark.parametrize("first", ["the study's", "a namesake's", "nobody's"])
def test_a_registered_model_of_an_earlier_version_is_whose_run_made_it(tmp_path: Path, first: str) -> None:
    """It has no tag. A namesake's search may have added a version, and moved the alias to it."""
    one, other = (Somebody(tmp_path / who) for who in "ab")
    made: dict[str, tuple[StudyRuns, str]] = {}
    for who in (one, other):
        claim(who.folder, who.study)
        places = replace(who.places, tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
        runs = StudyRuns(places, "rsicap")
        run = runs.begin("trial 0", {"lora_r": 4}, {"trial": "0"})
        run.finish("FINISHED", state="COMPLETE")
        made[who.folder.parent.name] = (runs, run.run_id)
        who.close()
    client = made["a"][0].connect()._client
    client.create_registered_model("rsicap")
    order = {"the study's": "ab", "a namesake's": "ba", "nobody's": ""}[first]
    for who in order:
        version = client.create_model_version("rsicap", str(tmp_path), run_id=made[who][1], await_creation_for=0)
        client.set_registered_model_alias("rsicap", BEST, version.version)
    runs, run_id = made["a"]
    keep_model(runs, run_id, tmp_path)
    mine = one.study.user_attrs[records.STUDY_ID]
    found = registered(runs.connect())
    if first == "a namesake's":
        assert found == {"rsicap": (None, made["a"][1]), f"rsicap-{mine[:8]}": (mine, run_id)}
    else:
        assert found == {"rsicap": (mine, run_id)}


def test_experiments_of_earlier_versions_stay_their_studies(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    before = open_tracking(uri, tmp_path).experiment("rsicap")
    new = open_tracking(uri, tmp_path, "0123456789abcdef")
    assert new.experiment("rsicap") != before
    upgraded = open_tracking(uri, tmp_path, EARLIER + "fedcba9876543210")
    assert upgraded.experiment("rsicap") == before
    assert open_tracking(uri, tmp_path, EARLIER + "00000000").experiment("rsicap") != before, "it is taken"
    assert open_tracking(uri, tmp_path).experiment("rsicap") == before, "the name alone"


@pytest.mark.long
def test_the_advice_for_a_deleted_experiment_works_as_pasted(tmp_path: Path, monkeypatch: Any) -> None:
    folder = tmp_path / "it's here"
    folder.mkdir()
    uri = f"sqlite:///{folder}/mlflow.db"
    store = open_tracking(uri, tmp_path, "0123456789abcdef")
    found = store.experiment("rsicap")
    store._client.delete_experiment(found)
    with pytest.raises(StorageError) as refused:
        store.find_experiment("rsicap")
    advised = re.search(r"^  (.*)$", str(refused.value), re.MULTILINE)
    assert advised is not None
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    # The advice is for an environment that is active: its programs are found.
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", advised[1]], cwd=elsewhere, env=env, check=True, capture_output=True, timeout=240)
    assert store.find_experiment("rsicap") == found
    assert not list(elsewhere.iterdir()), "it went to MLflow's default store"
    with pytest.raises(StorageError) as secret:
        store.uri = "https://user:S3CRET@host"
        store._client.delete_experiment(found)
        store.find_experiment("rsicap")
    assert "S3CRET" not in str(secret.value) and "MLFLOW_TRACKING_URI" in str(secret.value)


def test_an_experiment_whose_names_are_all_taken_is_said(tmp_path: Path) -> None:
    """By two studies whose ids begin alike, or by hand."""
    for study_id in ("12345678-a", "12345678-b"):
        open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, study_id).experiment("rsicap")
    third = open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path, "12345678-c")
    with pytest.raises(StorageError, match="rsicap and rsicap-12345678 belong to other studies"):
        third.experiment("rsicap")
