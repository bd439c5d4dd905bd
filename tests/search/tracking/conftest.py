"""What the tests of MLflow share: its empty tables, made once, and a client on a copy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from search.tracking.client import Tracking, open_tracking
from tests.search.tracking.recorded import copy_database


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: creating them takes seconds, once is enough."""
    folder = tmp_path_factory.mktemp("mlflow")
    open_tracking(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")
    return folder / "mlflow.db"


@pytest.fixture
def tracking(empty_database: Path, tmp_path: Path) -> Iterator[Tracking]:
    copy_database(empty_database, tmp_path / "mlflow.db")
    yield open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "artifacts")
