"""Places: paths with signs that URLs use, no twin folder, no wrong database, commands that can be pasted."""

from __future__ import annotations

import shlex
import shutil
import signal
import socket
import sqlite3
import subprocess
from pathlib import Path

import pytest

from search.errors import StorageError
from search.places import Places, sqlite_file, sqlite_url
from tests.support.search_process import command, run

NAMES = ["lr=1e-4", "z%20q", "y?b=8#x", "two words", "ü(1)", "100%", "a&b;c'd"]
OWN = ("z%20q", "y?b=8#x")


@pytest.mark.parametrize("name", NAMES)
def test_a_url_leads_back_to_its_file(name: str) -> None:
    path = Path(name) / "optuna.db"
    assert sqlite_file(sqlite_url(path)) == path
    assert sqlite_file(sqlite_url(Path("/") / path)) == Path("/") / path


def test_mlflow_still_makes_the_folder_of_a_url_as_it_stands() -> None:
    """The reason for the driver's name in a URL with quoted signs; once this fails, it can go."""
    from mlflow.store.db import utils

    assert hasattr(utils, "_make_parent_dirs_if_sqlite")


@pytest.mark.parametrize(
    ("cache", "name"),
    [
        *(("warm", name) for name in NAMES),
        # MLflow takes two seconds to make its tables: here where the name has what a URL has for its own.
        *(pytest.param("fresh", name, marks=[pytest.mark.slow] * (name not in OWN)) for name in NAMES),
    ],
)
def test_one_folder_and_no_other(name: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both databases are made and opened there, whether MLflow makes its tables or they are copied."""
    from search.storage.database import close_storage, open_storage
    from search.tracking.client import open_tracking

    if cache == "fresh":
        monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    name = f"{cache} {name}"  # MLflow keeps its stores by URL, and a relative one means another file here
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    places = Places.of(Path(name))
    places.runs_dir.mkdir()
    close_storage(open_storage(places.storage_url))
    tracking = open_tracking(places.tracking_uri, places.artifacts)
    tracking.experiment("study")
    assert [path.name for path in work.iterdir()] == [name]
    with sqlite3.connect(work / name / "mlflow.db") as database:
        assert database.execute("SELECT name FROM experiments WHERE name = 'study'").fetchone()
    places.check_recorded()


@pytest.mark.slow  # the parts are tested above, each by its own call
def test_a_search_its_log_and_its_pages_in_such_a_folder(tmp_path: Path) -> None:
    """The same commands from the search's log and the report's, and each can be pasted into a shell."""
    runs = tmp_path / "y?b=8 %20#x"
    done = run(command(runs, "--trials", "1", "--slots", "1"))
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {runs.name}
    written = (runs / "rsicap_mini" / "tuning-log.md").read_text(encoding="utf-8")
    commands = [line for line in written.splitlines() if "python -m search" in line and "--runs-dir" in line]
    assert commands
    for line in commands:
        words = shlex.split(line.strip().strip("`").partition("python -m ")[2].partition("`")[0])
        assert words[words.index("--runs-dir") + 1] == str(runs)
    report = next(line for line in done.stdout.splitlines() if "search.ui" in line)
    assert str(runs) in shlex.split(report)

    again = run([*_python("search.report"), "--study", "rsicap-mini", "--runs-dir", str(runs)])
    assert again.returncode == 0, again.stderr
    assert (runs / "rsicap_mini" / "tuning-log.md").read_text(encoding="utf-8") == written
    assert {path.name for path in tmp_path.iterdir()} == {runs.name}

    ports = [word for option in ("--mlflow-port", "--optuna-port") for word in (option, str(free_port()))]
    pages = subprocess.Popen(
        [*_python("search.ui"), "--runs-dir", str(runs), *ports], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert pages.stdout is not None
        shown = list(iter(pages.stdout.readline, "Ctrl-C ends both.\n"))
        assert any("rsicap_mini" in line for line in shown), shown
    finally:
        pages.send_signal(signal.SIGINT)
        pages.communicate(timeout=60)
    assert {path.name for path in tmp_path.iterdir()} == {runs.name}


def test_commands_that_read_make_nothing(tmp_path: Path) -> None:
    for name in NAMES:
        places = Places.of(tmp_path / name)
        with pytest.raises(StorageError, match="there is no database"):
            places.check_recorded()
    assert not list(tmp_path.iterdir())


def test_options_of_other_commands() -> None:
    assert Places.of().options() == ()
    assert Places.of(Path("runs"), "sqlite:///runs/optuna.db").options() == ()
    elsewhere = Places.of(Path("my runs"), "postgresql:///optuna?host=/run", "http://mlflow:5000")
    assert elsewhere.command("python", "-m", "search.ui") == (
        "python -m search.ui --runs-dir 'my runs' --storage 'postgresql:///optuna?host=/run' "
        "--tracking-uri http://mlflow:5000"
    )
    for secret in ("postgresql://u:S3CRET@h/d", "postgresql:///d?host=h&user=u&password=S3CRET"):
        assert "S3CRET" not in " ".join(Places.of(Path("r"), secret, secret).options())
        assert "S3CRET" not in repr(Places.of(Path("r"), secret, secret))


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _python(module: str) -> list[str]:
    import sys

    return [sys.executable, "-m", module]


def test_the_console_script_and_strangers(tmp_path: Path) -> None:
    """A folder with a `trainer.py`, `studies/` of its own: the script works, `python -m` says what is in the way.

    tests/deploy/test_wheel.py has a whole search beside a stranger.
    """
    script = shutil.which("lora-search") or str(Path(_python("")[0]).parent / "lora-search")
    for stranger in ("trainer.py", "studies/__init__.py"):
        folder = tmp_path / stranger.partition("/")[0].removesuffix(".py")
        (folder / stranger).parent.mkdir(parents=True)
        (folder / stranger).write_text("raise RuntimeError('not ours')\n")
        refused = subprocess.run(
            [*_python("search.run"), "--list"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert refused.returncode == 2, refused.stderr
        assert len(refused.stderr.splitlines()) == 1
        assert str(folder / stranger) in refused.stderr and "lora-search" in refused.stderr
        listed = subprocess.run([script, "run", "--list"], cwd=folder, capture_output=True, text=True, check=False)
        assert listed.returncode == 0 and "rsicap_mini" in listed.stdout, listed.stderr


@pytest.mark.long
def test_commands_of_the_console_script() -> None:
    from search.terminal.commands import COMMANDS

    script = str(Path(_python("")[0]).parent / "lora-search")
    shown = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in COMMANDS)
    wrong = subprocess.run([script, "reprot"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "did you mean 'report'" in wrong.stderr
    for name in COMMANDS:
        helped = subprocess.run([script, name, "--help"], capture_output=True, text=True, check=True).stdout
        assert f"lora-search {name}" in helped, name
