"""A full disk: no trial fails for it, what was saved stays, there is one message; with room all goes on."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Place, check_records, write_study
from tests.support.search_process import Search, run
from trainer.common.disk import NoRoom, no_room, out_of_room

Start = Callable[[list[str]], Search]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all room that is left."""
    file = disk / "filler"
    with file.open("wb", buffering=0) as stream:
        for block in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    stream.write(b"x" * block)
            except OSError:
                continue
    return file


@pytest.mark.slow
def test_a_full_disk_under_the_checkpoints(
    tiny_checkpoint: Path, tmp_path: Path, disk: Path, start: Start, bench: Any
) -> None:
    urls = [f"sqlite:///{tmp_path / name}" for name in ("optuna.db", "mlflow.db")]
    place = Place(disk / "runs", *urls)
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=20))
    search = start(command)
    search.wait_for("trial 0: epoch 3:")
    filler = fill(disk)
    assert search.end() == 2, search.output()
    check_told(search)
    assert [t.state for t in place.trials] == ["WAITING"]
    reported = dict(place.reports[0])
    assert reported, "nothing had been reported"
    filler.unlink()
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"after epoch {len(reported)}" in done.stdout
    assert [t.state for t in place.trials] == ["COMPLETE"]
    check_records(place, bench, num_trials=1, num_epochs=20)


@pytest.mark.slow
def test_a_full_disk_under_everything(
    tiny_checkpoint: Path, tmp_path: Path, disk: Path, start: Start, bench: Any
) -> None:
    place = Place(disk / "runs")
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=20))
    search = start(command)
    search.wait_for("trial 0: epoch 3:")
    filler = fill(disk)
    assert search.end() == 2, search.output()
    check_told(search)
    filler.unlink()
    done = run(command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after epoch" in done.stdout
    check_records(place, bench, num_trials=1, num_epochs=20)


def check_told(search: Search) -> None:
    """One message, and no traceback."""
    assert "the disk is full" in search.output() and "run the same command again" in search.output()
    assert "Traceback" not in search.output() and "Logging error" not in search.output()


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, os.strerror(28)), True),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), True),
        (OSError(5, os.strerror(5)), False),
        (ValueError("full of errors"), False),
    ],
)
def test_what_counts_as_a_full_disk(error: Exception, full: bool) -> None:
    assert out_of_room(error) == full
    try:
        raise KeyError("x") from error
    except KeyError as wrapped:
        assert out_of_room(wrapped) == full


def test_the_message_is_made_once() -> None:
    first = no_room(OSError(28, os.strerror(28)), "/runs")
    assert isinstance(first, NoRoom) and "/runs" in str(first)
    assert no_room(first, "elsewhere") is first
