"""`search.confirm`: the study as it is recorded, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from search import confirm, records
from search.errors import StudyError
from search.places import Places
from search.storage import studies
from search.storage.database import close_storage, open_storage
from studies.rsicap_mini import STUDY
from tests.search.sampling.runs import run_trial
from trainer.common.errors import UserError


def recorded(places: Places, *, trials: int, fresh: bool = False) -> str:
    places.runs_dir.mkdir(exist_ok=True)
    (places.runs_dir / "mlflow.db").touch()
    storage = open_storage(places.storage_url)
    study = STUDY.with_settings(("num_epochs=2",), seed=7)
    opened = studies.open_study(storage, study, fresh=fresh)
    opened.set_user_attr(records.SETTINGS, ["num_epochs=2"])
    studies.check_strategy(opened, "joint")
    for _ in range(trials):
        run_trial(opened, study)
    close_storage(storage)
    return opened.study_name


def test_an_old_study_is_continued_as_it_was_and_no_configuration_is_added(tmp_path: Path) -> None:
    places = Places.of(tmp_path / "runs")
    recorded(places, trials=3)
    for name in ("rsicap_mini", "rsicap-mini"):
        found, options = confirm._as_recorded(name, places)
        assert found == "rsicap_mini"
        as_before = {"settings": ("num_epochs=2",), "seed": 7, "strategy": "joint"}
        assert options == {"trials": 3, **as_before, "epochs": None}
    storage = open_storage(places.storage_url)
    opened = studies.find_study(storage, "rsicap_mini")
    opened.set_user_attr(records.GIVEN_STUDY, "mine/mini.py")
    opened.set_user_attr(records.EPOCHS, 20)
    close_storage(storage)
    assert confirm._as_recorded("rsicap_mini", places) == ("mine/mini.py", {"trials": 3, **as_before, "epochs": 20})


def test_what_cannot_be_confirmed_is_said(tmp_path: Path) -> None:
    places = Places.of(tmp_path / "runs")
    with pytest.raises(UserError, match="there is no database"):
        confirm._as_recorded("rsicap_mini", places)
    assert not places.runs_dir.exists()
    recorded(places, trials=0)
    with pytest.raises(StudyError, match="has no trial yet"):
        confirm._as_recorded("rsicap_mini", places)
    recorded(places, trials=1)
    assert recorded(places, trials=1, fresh=True) == "rsicap_mini-2"
    assert confirm._as_recorded("rsicap_mini-2", places)[0] == "rsicap_mini"
