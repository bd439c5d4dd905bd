"""What is used of MLflow beside its public interface is there, in the MLflow that is installed."""

from __future__ import annotations

import ast
import importlib.util
import logging
from pathlib import Path

import pytest
import sqlalchemy as sa
from mlflow.protos.databricks_pb2 import ErrorCode
from mlflow.utils import mlflow_tags

from search.tracking import mlflow_private
from search.tracking.client import open_tracking
from tests.support.compose import ROOT


@pytest.fixture(scope="module")
def columns(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The columns of MLflow's tables, by table."""
    folder = tmp_path_factory.mktemp("mlflow")
    url = f"sqlite:///{folder}/mlflow.db"
    open_tracking(url, folder / "artifacts")
    engine = sa.create_engine(url)
    inspector = sa.inspect(engine)
    found = {name: {column["name"] for column in inspector.get_columns(name)} for name in inspector.get_table_names()}
    engine.dispose()
    return found


def test_tables_and_columns(columns: dict[str, set[str]]) -> None:
    wanted = {f"{table.name}.{column.name}" for table in mlflow_private.TABLES for column in table.columns}
    assert len(wanted) == 15
    missing = sorted(wanted - {f"{table}.{column}" for table, names in columns.items() for column in names})
    assert missing == [], f"MLflow's tables lack {', '.join(missing)}"


def test_tags() -> None:
    known = {value for value in vars(mlflow_tags).values() if isinstance(value, str)}
    missing = [tag for tag in mlflow_private.SYSTEM_TAGS if tag not in known]
    assert missing == [], f"MLflow does not know the tags {', '.join(missing)}"


def test_the_pages_know_the_parts_of_a_view() -> None:
    folder = Path(mlflow_tags.__file__).parents[1] / "server" / "js" / "build" / "static" / "js"
    pages = "".join(path.read_text("utf-8") for path in folder.glob("main.*.js"))
    missing = [name for name in mlflow_private.PAGE_NAMES if name not in pages]
    assert missing == [], f"MLflow's pages do not know {', '.join(missing)}"


def test_error_codes() -> None:
    codes = (*mlflow_private.TRANSIENT, mlflow_private.ALREADY_EXISTS, mlflow_private.MISSING)
    missing = [code for code in codes if code not in ErrorCode.keys()]  # noqa: SIM118 - an enum of protobuf
    assert missing == [], f"MLflow does not know the error codes {', '.join(missing)}"


def test_modules_and_loggers() -> None:
    missing = [
        name
        for name in (mlflow_private.SQL_STORE, mlflow_private.DATABASE_LOGGER)
        if importlib.util.find_spec(name) is None
    ]
    assert missing == [], f"MLflow has no modules {', '.join(missing)}"
    assert mlflow_private.DATABASE_LOGGER in logging.root.manager.loggerDict


def imports(path: Path) -> set[str]:
    """The packages that a file imports, at any depth of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(str(node.module).partition(".")[0])
    return found


def test_one_module_imports_mlflow() -> None:
    files = [path for folder in ("search", "trainer", "studies") for path in (ROOT / folder).rglob("*.py")]
    assert [str(path.relative_to(ROOT)) for path in files if "mlflow" in imports(path)] == [
        "search/tracking/library.py"
    ]
