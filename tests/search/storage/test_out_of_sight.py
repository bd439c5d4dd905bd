"""Long attributes are where optuna-dashboard does not show them, and where our readers find them."""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import RDBStorage

from search import records
from search.storage import out_of_sight
from search.storage.database import close_storage, open_storage
from trainer.config import TrainConfig


def test_long_attributes_are_user_attributes_to_us_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/optuna.db"
    ours = open_storage(url)
    study = optuna.create_study(study_name="s", storage=ours)
    study.enqueue_trial({}, user_attrs={records.OVERRIDES: {"num_epochs": 2}, records.LABEL: "one"})
    trial = study.ask()
    config = TrainConfig().model_dump(mode="json")
    trial.set_user_attr(records.CONFIG, config)
    assert trial.user_attrs[records.CONFIG] == config
    study.tell(trial, 1.0)
    expected = {records.OVERRIDES: {"num_epochs": 2}, records.LABEL: "one", records.CONFIG: config}
    assert study.trials[0].user_attrs == expected
    assert not any(key.startswith(out_of_sight.PREFIX) for key in study.trials[0].system_attrs)
    close_storage(ours)

    plain = RDBStorage(url)
    (seen,) = optuna.load_study(study_name="s", storage=plain).trials
    assert seen.user_attrs == {records.LABEL: "one"}, "what another program shows"
    # An earlier version's record has it as a user attribute.
    plain.set_study_user_attr(1, "x", 1)
    old = optuna.load_study(study_name="s", storage=plain).ask()
    old.set_user_attr(records.CONFIG, config)
    close_storage(plain)

    again = open_storage(url)
    assert optuna.load_study(study_name="s", storage=again).trials[1].user_attrs == {records.CONFIG: config}
    close_storage(again)
