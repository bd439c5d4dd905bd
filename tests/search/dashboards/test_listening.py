"""Where the dashboards listen: addresses of either family, and why one cannot be had, before anything is started."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from search import dashboard
from search.dashboards import listening
from search.places import Places
from search.storage.database import close_storage, open_storage
from search.ui import check
from tests.support import called
from trainer.common.errors import UserError

UNKNOWN = "nosuch.example.invalid"


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as tried:
            tried.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.fixture(params=["127.0.0.1", pytest.param("::1", marks=pytest.mark.skipif(not has_ipv6(), reason="no IPv6"))])
def taken(request: pytest.FixtureRequest) -> Iterator[tuple[str, int]]:
    """A host and a port of it that is in use."""
    with socket.socket(socket.AF_INET6 if ":" in request.param else socket.AF_INET) as listener:
        listener.bind((request.param, 0))
        listener.listen()
        yield request.param, listener.getsockname()[1]


def free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        return int(listener.getsockname()[1])


def test_a_port_in_use_is_told_from_a_free_one(taken: tuple[str, int]) -> None:
    host, port = taken
    assert listening.problem(host, free_port(host), "--port") is None
    told = listening.problem(host, port, "--port")
    assert told == f"port {port} is already in use, perhaps by another search.ui; choose a free one with --port"


def test_what_else_is_wrong_is_not_called_in_use() -> None:
    assert listening.problem("192.0.2.1", 18091, "--port") == "--host 192.0.2.1: this machine has no such address"
    refused = listening.problem_of(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "::1", 80, "--port")
    assert refused == "http://[::1]:80 cannot be listened on: Permission denied"
    for host in (UNKNOWN, "a..b", "x" * 300):
        with pytest.raises(UserError, match="is no host that is known here"):
            listening.family(host, 18091)


def test_localhost_is_ipv4_as_for_mlflows_server() -> None:
    assert listening.family("localhost", 18091) == socket.AF_INET


def test_search_ui_says_each_thing_once(tmp_path: Path) -> None:
    from search.dashboards.access import Access

    ports = {"--mlflow-port": free_port("127.0.0.1"), "--optuna-port": free_port("127.0.0.1")}
    for host, said in (("192.0.2.1", "no such address"), (UNKNOWN, "no host that is known here")):
        with pytest.raises(UserError) as told:
            check(Places.of(tmp_path), ports, Access(host=host))
        assert str(told.value).count(said) == 1 and "in use" not in str(told.value)


@pytest.fixture
def database(tmp_path: Path) -> Path:
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    optuna.create_study(study_name="demo", storage=storage)
    close_storage(storage)
    return tmp_path / "optuna.db"


Call = Callable[..., called.Outcome]


@pytest.fixture
def call(database: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    monkeypatch.setattr(dashboard.signal, "signal", lambda *_: None)
    return lambda *words: called.call(dashboard.app, ["--storage", f"sqlite:///{database}", *map(str, words)])


def test_the_dashboard_refuses_a_port_in_use(call: Call, taken: tuple[str, int]) -> None:
    host, port = taken
    call("--host", host, "--port", port).check_refused(f"port {port} is already in use", "with --port")


def test_who_was_faster_after_the_check_is_one_message_too(
    call: Call, taken: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "check", lambda *_: None)
    host, port = taken
    call("--host", host, "--port", port).check_refused(f"port {port} is already in use")


def test_a_folder_that_cannot_be_made_is_one_message(call: Call, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    port = free_port("127.0.0.1")
    call("--port", port, "--artifact-dir", tmp_path / "file" / "x").check_refused("cannot be made: Not a directory")


def test_the_database_is_looked_at_before_a_folder_is_made(call: Call, tmp_path: Path) -> None:
    where = ("--storage", f"sqlite:///{tmp_path}/none.db", "--artifact-dir", tmp_path / "new")
    call("--port", free_port("127.0.0.1"), *where).check_refused("there is no database")
    assert not list(tmp_path.glob("none*")) and not (tmp_path / "new").exists()


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6")
def test_the_dashboard_answers_on_ipv6(database: Path) -> None:
    port = free_port("::1")
    command = [sys.executable, "-m", "search.dashboard", "--storage", f"sqlite:///{database}"]
    process = subprocess.Popen(
        [*command, "--host", "::1", "--port", str(port)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    late = threading.Timer(60, process.kill)
    late.start()
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        assert f"optuna-dashboard on http://[::1]:{port}/dashboard/\n" in lines
        with urllib.request.urlopen(f"http://[::1]:{port}/api/studies", timeout=20) as answer:
            assert b"demo" in answer.read()
    finally:
        late.cancel()
        process.kill()
        process.communicate()
