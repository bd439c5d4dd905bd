"""A search under the programs that people limit and detach it with, which send signals of their own."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.support.search_process import Search, command, trials_of

LONG = ("max_samples=80", "num_epochs=40", "warmup_steps=0")
TIMED_OUT = 124
"""The exit code of timeout(1) whose time is up, whatever the program's is."""


def child_of(program: psutil.Process) -> psutil.Process:
    """What the program started."""
    (found,) = program.children()
    return found


@pytest.mark.long
@pytest.mark.parametrize(
    "wrapped", [("timeout", "--foreground", "-s", "INT", "9999"), ("timeout", "9999"), ("nohup", "setsid", "--wait")]
)
def test_what_was_reported_is_kept(wrapped: tuple[str, ...], tmp_path: Path) -> None:
    """`timeout` signals the search alone, or its whole process group; SIGALRM is its time that is up. `setsid` leaves
    its group, `nohup` ignores SIGHUP, which a search then ignores, too."""
    runs = tmp_path / "runs"
    processes: list[psutil.Process] = []
    search = Search([*wrapped, *command(runs, "--trials", "1", settings=LONG)], fresh=True)
    try:
        search.wait_for("epoch 1:")
        program = psutil.Process(search.process.pid)
        processes = program.children(recursive=True)
        if wrapped[0] == "timeout":
            os.kill(program.pid, signal.SIGALRM)
            assert search.end() == TIMED_OUT, search.output()
        else:
            searching = child_of(program) if program.name() == "setsid" else program
            os.kill(searching.pid, signal.SIGHUP)  # the terminal has gone
            search.wait_for("epoch 2:")
            os.kill(searching.pid, signal.SIGINT)
            assert search.end() == 128 + signal.SIGINT, search.output()
        _, left = psutil.wait_procs(processes, timeout=30)  # what workers are forked from ends a moment later
        assert not [p for p in left if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    finally:
        search.kill()
        for process in processes:  # in a session of its own the search is not of its group
            with suppress(psutil.NoSuchProcess):
                process.kill()
    (trial,) = trials_of(runs)
    assert trial.state == "WAITING" and "Traceback" not in search.output()
