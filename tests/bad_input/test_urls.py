"""`--storage` and `--tracking-uri` of all commands that take them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from search import replay
from search.report import __main__ as report
from tests.bad_input.harness import TEXT, examples, folder, search, written
from tests.support.called import Started, call

SCHEMES = st.sampled_from(
    [
        *("sqlite", "SQLITE", "sqlite+aiosqlite", "sqlite+nothing", "postgresql", "postgres", "postgresql+asyncpg"),
        *(
            "mysql",
            "mssql+pyodbc",
            "oracle",
            "redis",
            "journal",
            "file",
            "http",
            "https",
            "HTTP",
            "",
            "s3",
            "databricks",
        ),
    ]
)
PLACES = st.sampled_from(
    [
        *("", "/", "//", "/:memory:", "/HERE/new.db", "/HERE", "/HERE/no/x.db", "/HERE/text.db", "/file:x?uri=true"),
        *("u:secret@127.0.0.1:1/x", "127.0.0.1:99999/x", "127.0.0.1:port/x", "[::1", "u:se%cret@127.0.0.1:1/x", "[/x"),
        *("/HERE/new.db?timeout=soon", "/HERE/new.db?nothing=1", "/HERE/new.db?isolation_level=X", "/HERE/\udcff.db"),
        *("127.0.0.1:1/x?sslmode=odd", "127.0.0.1:1/x?connect_timeout=soon", "127.0.0.1:1/x?nothing=1"),
        *("/HERE/{0}.db", "/n" * 2500),
    ]
)
URLS = (
    st.builds("{}:{}{}".format, SCHEMES, st.sampled_from(["//", "/", ""]), PLACES)
    | TEXT
    | st.builds("sqlite:///HERE/{}".format, TEXT)
)


@pytest.fixture(autouse=True)
def _no_name_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is no address would be asked for in the network."""
    import socket

    def refuse(host: Any, *rest: Any, **options: Any) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: real(host, *a, **k) if "127.0.0.1" in str(host) else refuse(host)
    )


def place(url: str, here: Any) -> str:
    return url.replace("HERE", str(here))


@pytest.mark.long
@examples(60)
@given(URLS)
@example("sqlite:///HERE/new.db?nothing=1")  # sqlite3 raises TypeError
@example("sqlite:////" + "n" * 300 + "/x.db")
@example("sqlite:/u:secret@127.0.0.1:1/x")  # a slash too few
@example("sqlite:///0/")  # a folder that is not there
def test_storage(url: str) -> None:
    from search.tracking import client

    with folder() as here, pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(client, "open_tracking", _accepted)
        (here / "text.db").write_text("no database")
        outcome = search(["--study", "rsicap_mini", "--runs-dir", str(here / "runs"), f"--storage={place(url, here)}"])
        outcome.check()
        assert ":secret" not in outcome.err
        assert not list(here.rglob("trials")) and not (here / "runs" / "mlflow.db").exists()
        if not outcome.accepted:
            assert [name for name in written(here) if "new.db" not in name] in (["runs", "text.db"], ["text.db"])


def _accepted(*_: Any) -> None:
    raise Started


@examples(70, deep_factor=43)
@given(URLS)
@example("sqlite:///HERE/new.db?nothing=1")
@example("http://127.0.0.1:99999")  # OverflowError
@example("sqlite:///0/")
@example("sqlite:///" + "n/" * 890 + "n")  # the path twice: in the URL, and in what the system says
def test_tracking(uri: str) -> None:
    """The check alone and the lock, up to where MLflow would create its tables."""
    from search.errors import StorageError
    from search.tracking import client

    with folder() as here, pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(client, "MlflowClient", _accepted_client)
        (here / "text.db").write_text("no database")
        try:
            client.open_tracking(place(uri, here), here / "artifacts")
        except Started:
            return
        except StorageError as error:
            text = str(error)
        assert ":secret" not in text and 10 < len(text) < 2500 and not (here / "artifacts").exists()


def test_what_the_system_says_of_a_long_path_is_cut() -> None:
    from search.urls import first_line

    text = first_line(OSError(36, "File name too long", "n/" * 1300))
    assert text.startswith("[Errno 36] File name too long") and len(text) < 1000


def _accepted_client(**_: Any) -> None:
    raise Started


@examples(60)
@given(st.sampled_from(["--storage", "--tracking-uri"]), URLS, st.sampled_from(["report", "replay"]))
@example("--storage", "postgresql://h:port/x", "report")
@example("--storage", "sqlite:////" + "n" * 300, "replay")
def test_commands_that_read(option: str, url: str, command: str) -> None:
    from search.tracking import client

    app, more = {"report": (report.app, []), "replay": (replay.app, ["--trial", "0"])}[command]
    with folder() as here, pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        patch.setattr(client, "open_tracking", _accepted)
        (here / "text.db").write_text("no database")
        outcome = call(app, ["--study", "s", f"--runs-dir={here}/runs", f"{option}={place(url, here)}", *more])
        assert not outcome.accepted or outcome.started
        outcome.check()
        assert ":secret" not in outcome.err


@examples(30)
@given(TEXT)
def test_studies_that_are_not_there(name: str) -> None:
    with folder() as here:
        call(report.app, [f"--study={name}", f"--runs-dir={here}"]).check_refused("--runs-dir")
        call(replay.app, [f"--study={name}", "--trial=0", f"--runs-dir={here}"]).check_refused("--runs-dir")
        assert written(here) == []
