"""What the tests of sampling share: a quiet Optuna, and a database."""

import optuna
import pytest

from search.storage.database import close_storage, open_storage


@pytest.fixture(autouse=True)
def quiet():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(optuna.logging.INFO)


@pytest.fixture
def storage(tmp_path):
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    yield storage
    close_storage(storage)
