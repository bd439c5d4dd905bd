"""A password in the query of a URL is nowhere: not on the terminal, in files, databases or the list of processes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa

from tests.faults.postgres import Postgres
from tests.support.search_process import Search, command, run

SECRET = "S3CRETpw"


@pytest.fixture
def postgres(open_folder: Callable[[], Path]) -> Iterator[Postgres]:
    server = Postgres(open_folder())
    yield server
    server.close()


def with_password(url: str) -> str:
    """The same database, user and password in the query. The server lets everyone in, so that any password will do."""
    parsed = sa.make_url(url)
    query = {**parsed.query, "user": parsed.username or "postgres", "password": SECRET}
    return sa.URL.create(parsed.drivername, database=parsed.database, query=query).render_as_string()


def arguments_of(pid: int) -> Iterator[str]:
    """The command lines of a process and of all below it."""
    with suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                yield " ".join(process.cmdline())


def rows(url: str) -> Iterator[str]:
    """Every row of every table of a database."""
    engine = sa.create_engine(url)
    with engine.connect() as connection:
        for table in sa.inspect(engine).get_table_names():
            for row in connection.execute(sa.text(f'SELECT * FROM "{table}"')):
                yield f"{table}: {tuple(row)}"
    engine.dispose()


def files_with(secret: str, folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    return [str(path) for path in files if secret.encode() in path.read_bytes() or secret in path.name]


@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_search_and_a_report_on_postgresql(
    postgres: Postgres,
    start: Callable[[list[str]], Search],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs = tmp_path / "runs"
    storage, tracking = with_password(postgres.new_database()), with_password(postgres.new_database())
    monkeypatch.setenv("LORA_SEARCH_STORAGE", storage)
    monkeypatch.setenv("LORA_SEARCH_TRACKING_URI", tracking)

    # A search, whose processes are looked at all the while.
    search = start(command(runs, "--trials", "1", "--slots", "1"))
    seen: set[str] = set()
    while search.process.poll() is None:
        seen.update(arguments_of(search.process.pid))
        time.sleep(0.2)
    assert search.end() == 0, search.output()
    assert len(seen) > 1 and not [line for line in seen if SECRET in line]
    assert "trial 0: COMPLETE" in search.output()
    assert SECRET not in search.output()

    # The log, written again by the command.
    report = [sys.executable, "-m", "search.report", "--study", "rsicap_mini", "--runs-dir", str(runs)]
    done = run(report)
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr

    # What is left: files, and both databases.
    assert (runs / "rsicap_mini" / "tuning-log.md").is_file()
    assert files_with(SECRET, runs) == []
    for url in (storage, tracking):
        kept = list(rows(url))
        assert len(kept) > 20 and not [row for row in kept if SECRET in row]
