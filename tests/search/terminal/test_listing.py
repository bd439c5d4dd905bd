"""`--list` and `--dry-run` beside a study that is there: what has been run, what would be refused, nothing created."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from search import records
from search.errors import DefinitionChanged, StorageError
from search.options import SearchOptions
from search.places import Places
from search.planning.budget import Budget
from search.session import Session
from search.space import Choice
from search.storage.database import close_storage, open_storage
from search.storage.studies import find_study, open_study
from search.study_file import load
from search.terminal import dry_run, listing, price
from search.workers import busy
from studies.rsicap_mini import STUDY as MINI
from trainer.model import graphs


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places.of(tmp_path / "runs")


@pytest.fixture
def stored(places: Places) -> Places:
    """A study of two trials, one of them paused."""
    places.runs_dir.mkdir()
    storage = open_storage(places.storage_url)
    study = open_study(storage, load("rsicap_mini"))
    attrs = {records.BEST_EPOCH: 2, records.CONFIG: load("rsicap_mini").base_config().model_dump(mode="json")}
    study.add_trial(create_trial(value=0.4, intermediate_values={1: 0.5, 2: 0.4}, user_attrs=attrs))
    study.enqueue_trial({}, user_attrs={records.REASON: records.PAUSED})
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.WAITING]
    close_storage(storage)
    return places


def dry(places: Places, *settings: str, as_json: bool = False, **options: object) -> None:
    session = Session("rsicap_mini", SearchOptions(places=places, settings=settings, **options))  # type: ignore[arg-type]
    dry_run.show(session.definition, session.options, session.budget, session.check(), None, as_json=as_json)


def test_nothing_is_there_and_nothing_is_made(places: Places, capsys: pytest.CaptureFixture[str]) -> None:
    listing.show([load("rsicap_mini")], places)
    assert capsys.readouterr().out.splitlines() == [f"rsicap_mini  {load('rsicap_mini').description}"]
    dry(places, as_json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["continues"] is None and facts["first_sampled"]["learning_rate"] > 0
    assert not places.runs_dir.exists()


def test_an_empty_database_is_left_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "empty.db"
    file.touch()
    places = Places.of(tmp_path / "runs", f"sqlite:///{file}")
    listing.show([], places, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"definitions": {}, "studies": []}
    dry(places)
    assert file.read_bytes() == b""


def test_what_a_study_has_come_to(stored: Places, capsys: pytest.CaptureFixture[str]) -> None:
    line = "rsicap_mini: 2 trials (1 complete, 1 waiting), best 0.4000 (trial 0)"
    listing.show([load("rsicap_mini")], stored)
    assert capsys.readouterr().out.splitlines()[1].strip() == line
    listing.show([], stored)  # of a study file that lies elsewhere
    assert line in capsys.readouterr().out
    dry(stored, trials=5)
    said = capsys.readouterr().out
    assert f"it would go on with the study {line}\n3 more trials would be sampled\n" in said
    dry(stored, epochs=2)
    assert "no more trials would be sampled: all 2 epochs are trained; more with --epochs\n" in capsys.readouterr().out
    dry(stored, fresh=True)
    assert "go on" not in capsys.readouterr().out


def test_a_dry_run_names_the_pruner_that_the_study_was_begun_with(
    stored: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = open_storage(stored.storage_url)
    find_study(storage, "rsicap_mini").set_user_attr(records.PRUNER, "median")
    close_storage(storage)
    for options, pruner in (({}, "median"), ({"pruner": "none"}, "none"), ({"fresh": True}, "rungs")):
        dry(stored, as_json=True, **options)
        assert json.loads(capsys.readouterr().out)["pruner"] == pruner


def test_what_a_search_would_refuse_a_dry_run_refuses(stored: Places, tmp_path: Path) -> None:
    with pytest.raises(DefinitionChanged, match="num_epochs: 6 -> 5"):
        dry(stored, "num_epochs=5")
    for url, why in (("redis://x", "keep no heartbeats"), (f"sqlite:///{tmp_path}/no/o.db", "does not exist")):
        with pytest.raises(StorageError, match=why):
            dry(Places.of(stored.runs_dir, url))
    with pytest.raises(StorageError, match="keep no heartbeats"):
        listing.show([], Places.of(stored.runs_dir, "redis://x"))


def test_what_a_study_would_take_is_measured_and_leaves_nothing(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a few steps of the base configuration; the vision outputs of its few images are in no cache. Where the number
    of epochs is searched, all are for the longest trial."""
    searched = replace(MINI, space={**MINI.space, "num_epochs": Choice((2, 3))})
    session = Session(searched, SearchOptions(places=places, settings=("max_samples=40",)))
    assert session.budget.each == 3
    checked = session.check()
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    measured = price.measure(session.definition, Budget(5), checked)
    assert not (tmp_path / "cache").exists() and os.environ["LORA_SEARCH_CACHE"]
    # 32 rows in steps of 4, and the validation.
    assert isinstance(measured, price.Price) and measured.samples == 4
    assert 8 * measured.step_s < measured.epoch_s < 60
    assert measured.study_s == 5 * 3 * measured.epoch_s and measured.disk_bytes > 10 * 1000
    dry_run.show(session.definition, session.options, Budget(5), checked, None, price=measured)
    said = capsys.readouterr().out
    assert "a step of 4 samples takes" in said and "5 trials of 3 epochs in full" in said
    assert "pausing at rungs, 5 trials come to some 15 epochs of 15" in said
    limited = replace(measured, most_epochs=7)
    assert limited.study_s == 7 * measured.epoch_s and ": 7 epochs, one after the other" in limited.line()
    assert not places.runs_dir.exists()


def test_where_passes_are_recorded_a_recorded_step_is_priced(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the first steps, which are not, take three to ten times as long."""
    session = Session("rsicap_mini", SearchOptions(places=places, settings=("max_samples=40", "num_epochs=3")))

    def refuse(*_: object) -> graphs.Played:
        raise RuntimeError("not here")

    monkeypatch.setitem(graphs.RECORDERS, "cpu", refuse)
    monkeypatch.setattr(busy, "seconds_of_a_round", lambda config, bench: 1e-6 * config.batch_size)
    measured = price.measure(session.definition, Budget(3), session.check())
    assert isinstance(measured, price.Price)
    assert measured.step_s == pytest.approx(1e-6 * measured.samples)


def test_a_base_that_does_not_train_has_no_price(places: Places) -> None:
    """float16 with AdamW's eps of 1e-8: NaN at the first update, as in the hand-run log's first experiment."""
    session = Session("rsicap_mini", SearchOptions(places=places, settings=("max_samples=40", "torch_dtype=float16")))
    measured = price.measure(session.definition, Budget(5), session.check())
    assert isinstance(measured, price.Untrained)
    assert measured.line().startswith("the base configuration does not train: at step ") and "nan" in measured.line()


def test_what_captions_take_is_measured_where_trials_are_ranked_by_them(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("max_samples=40", "num_epochs=3", "objective=cider")
    session = Session("rsicap_mini", SearchOptions(places=places, settings=settings))
    checked = session.check()
    measured = price.measure(session.definition, Budget(5), checked)
    assert isinstance(measured, price.Price) and measured.captions_s > 0 and measured.tokens > 10
    plain = replace(measured, captioned=0, captions_s=0.0)
    assert measured.study_s - plain.study_s == pytest.approx(5 * measured.captions_s)
    dry_run.show(session.definition, session.options, Budget(5), checked, None, price=measured)
    shown = capsys.readouterr().out
    assert f"captions the {measured.captioned} validation images" in shown and "strategy joint" in shown
    assert "repeats of the leaders add" not in shown and "repeats of the leaders add" in plain.line()
