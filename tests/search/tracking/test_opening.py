"""Opening MLflow's store: tables made once, at once, half, by others; what cannot be used is refused."""

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from search.errors import StorageError, Unavailable
from search.tracking import client
from search.tracking.client import Tracking, open_tracking
from search.urls import shown
from tests.search.tracking.recorded import copy_database, new_run
from tests.support import template
from tests.support.template import Forked
from trainer.common.cache import cache_folder

OPEN = """
import sys, warnings, logging
from pathlib import Path
from search.tracking.client import open_tracking
tracking = open_tracking(sys.argv[1], Path(sys.argv[2]))
tracking.experiment("demo")
print(tracking.parent_run("demo", {}))
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled()
"""


def test_processes_that_start_at_once_share_one_store_and_are_silent(tmp_path: Path) -> None:
    # pytest and CI switch telemetry off by themselves: without their variables it must be ours that does.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CI", "GITHUB", "MLFLOW", "DO_NOT"))}
    command = ["-c", OPEN, f"sqlite:///{tmp_path}/runs/mlflow.db", str(tmp_path / "a")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": kept}
    imports = subprocess.Popen([sys.executable, "-W", "error", *command], text=True, **pipes)
    at_once = [Forked([sys.executable, *command], **pipes) for _ in range(3)]
    done = [each.communicate(timeout=120) for each in (*at_once, imports)]
    assert [err for _, err in done] == [""] * 4
    assert len({out for out, _ in done}) == 1


KILLED = """
import os, sys, sqlalchemy
from sqlalchemy.engine import Engine
from pathlib import Path
from search.tracking.client import open_tracking
left = int(sys.argv[3])
@sqlalchemy.event.listens_for(Engine, "after_cursor_execute")
def count(connection, cursor, statement, *_):
    global left
    left -= statement.strip().upper().startswith(("CREATE", "ALTER", "DROP"))
    if left < 0:
        os._exit(9)
open_tracking(sys.argv[1], Path(sys.argv[2]))
"""


@pytest.mark.parametrize("statements", [1, 90])
def test_killed_while_the_tables_are_made_the_next_one_makes_them(
    tmp_path: Path, statements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    command = [sys.executable, "-c", KILLED, uri, str(tmp_path / "a"), str(statements)]
    assert template.run(command).returncode == 9
    tracking = open_tracking(uri, tmp_path / "a")
    assert new_run(tracking)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_tables_are_made_once_and_again_where_the_kept_file_is_damaged(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = cache_folder().glob("mlflow-*.db")
    kept = tmp_path / "cache" / made.name
    kept.parent.mkdir()
    shutil.copy(made, kept)
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(kept.parent))
    opened: list[str] = []
    real = client._client
    monkeypatch.setattr(client, "_client", lambda uri: (opened.append(uri), real(uri))[1])
    second = f"sqlite:///{tmp_path}/second.db"
    assert new_run(open_tracking(second, tmp_path / "a"))
    assert opened == [second], "the tables were made again"
    whole = kept.read_bytes()
    damaged = whole[: len(whole) // 2] + b"\x5a" * 8_192 + whole[len(whole) // 2 + 8_192 :]
    for name, content in (("third", whole[:50_000]), ("fourth", damaged)):
        kept.write_bytes(content)
        assert new_run(open_tracking(f"sqlite:///{tmp_path}/{name}.db", tmp_path / "a"))
        assert kept.read_bytes() != content, "it was not made anew"


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        *(("warm", name) for name in ("y?b=8", "z%20q", "a b", "lr=1e-4", "ü#1")),
        ("fresh", "y?b=8 z%20q"),  # two seconds; test_places.py has each by itself
    ],
)
def test_a_folder_may_have_any_name(cache: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs that mean something in a URL too, while MLflow makes the tables and when they are copied."""
    if cache == "fresh":
        monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    url = sqlalchemy.URL.create("sqlite", database=str(tmp_path / name / "mlflow.db")).render_as_string()
    assert new_run(open_tracking(url, tmp_path / name / "artifacts"))
    assert (tmp_path / name / "mlflow.db").is_file()


def test_an_empty_database_that_is_held_is_not_there_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`check` has let it pass a moment ago."""
    monkeypatch.setattr("search.tracking.address.check", lambda uri: None)
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match="database is locked"):
            open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "a")
        other.execute("ROLLBACK")
    assert new_run(open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "a"))


def test_tables_that_are_half_made_are_refused(empty_database: Path, tmp_path: Path) -> None:
    copy_database(empty_database, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("DELETE FROM alembic_version")
        database.execute("DROP TABLE webhooks")
        database.commit()
    with pytest.raises(StorageError, match=r"only some of MLflow's tables.*name another database"):
        open_tracking(f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "a")


def garbage(folder: Path) -> str:
    (folder / "x.db").write_text("this is no database, " * 100)
    return f"sqlite:///{folder}/x.db"


def optunas(folder: Path) -> str:
    with sqlite3.connect(folder / "x.db") as connection:
        connection.execute("CREATE TABLE studies (id INTEGER)")
    connection.close()
    return f"sqlite:///{folder}/x.db"


def a_folder_as_database(folder: Path) -> str:
    return f"sqlite:///{folder}"


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (lambda folder: str(folder / "mlruns"), "sqlite:///runs/mlflow.db"),
        (lambda folder: f"file://{folder}/mlruns", "no longer takes folders"),
        (
            lambda folder: "http://user:secret@127.0.0.1:9",
            r"no MLflow server answers at http://user:\*\*\*@127.0.0.1:9",
        ),
        (lambda folder: "http://[", "is not an address|no MLflow server"),
        (lambda folder: "postgresql://user:secret@127.0.0.1:9/mlflow", r"postgresql://user:\*\*\*@127.0.0.1:9/mlflow"),
        (lambda folder: "redis://user:secret@host/0", "'redis' is not supported"),
        (garbage, "file is not a database"),
        (a_folder_as_database, "unable to open database file"),
        (optunas, "Optuna's database"),
    ],
)
def test_a_store_that_cannot_be_used_is_refused_at_once(
    uri: Callable[[Path], str], message: str, tmp_path: Path
) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match=message) as told:
        open_tracking(uri(tmp_path), tmp_path / "artifacts")
    assert time.monotonic() - began < 15
    assert "secret" not in str(told.value)


def test_a_database_of_another_mlflow_says_how_to_upgrade(tracking: Tracking, tmp_path: Path) -> None:
    copy_database(tmp_path / "mlflow.db", tmp_path / "old.db")
    with sqlite3.connect(tmp_path / "old.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'bd07f7e963c5'")
    connection.close()
    with pytest.raises(StorageError, match="mlflow db upgrade sqlite:///"):
        open_tracking(f"sqlite:///{tmp_path}/old.db", tmp_path / "artifacts")


def test_a_password_is_not_shown() -> None:
    assert "secret" not in shown("postgresql://user:secret@host/db")
    assert "secret" not in shown("http://user:secret@host:port/nonsense")
