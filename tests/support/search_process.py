"""Starting `python -m search.run`, and waiting for what it prints.

Searches are forked from a process that has made the imports (`template`); those that are `fresh` start as users do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from search.records import TrialRecord
from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.storage.studies import find_study
from tests.support import template
from tests.support.template import Forked

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0
"""Longer than anything takes where twenty jobs share two cores: only what hangs comes to it."""
QUICK = ("max_samples=24", "num_epochs=2", "warmup_steps=0")


def command(runs: Path, *arguments: str, study: str = "rsicap_mini", settings: tuple[str, ...] = QUICK) -> list[str]:
    """The command line of a search on few samples; without repeats and pauses, unless they are asked for."""
    if "--confirm" not in arguments:
        arguments = (*arguments, "--no-confirm")
    if "--strategy" not in arguments:
        arguments = (*arguments, "--strategy", "joint")
    sets = [part for setting in settings for part in ("--set", setting)]
    return [sys.executable, "-m", "search.run", "--study", study, "--runs-dir", str(runs), *sets, *arguments]


def trials_of(runs: Path, name: str = "rsicap_mini") -> tuple[TrialRecord, ...]:
    """The trials of a study in a runs folder."""
    storage = open_storage(f"sqlite:///{runs / 'optuna.db'}")
    try:
        return lifecycle.read_trials(find_study(storage, name))
    finally:
        close_storage(storage)


def environment() -> dict[str, str]:
    """One thread, spinning never: two cores are shared."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "COLUMNS": "200"}


def run(arguments: list[str], *, fresh: bool = False, timeout: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    if not fresh:
        return template.run(arguments, timeout, cwd=ROOT, env=environment())
    return subprocess.run(
        arguments, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=timeout, check=False
    )


def workers_of(supervisor: int) -> list[psutil.Process]:
    """The worker processes of a supervisor's: forked from the process that makes their imports, or spawned.

    They are spawned from the moment in which that process was killed while it forked one.
    """
    found: list[psutil.Process] = []
    with suppress(psutil.NoSuchProcess):
        for below in psutil.Process(supervisor).children():
            with suppress(psutil.NoSuchProcess):
                found += [below] if "multiprocessing.spawn" in " ".join(below.cmdline()) else []
    with suppress(psutil.NoSuchProcess, LookupError):
        found += importer_of(supervisor).children()
    return [process for process in found if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def importer_of(supervisor: int) -> psutil.Process:
    """The process that workers are forked from.

    Raises:
        LookupError: there is none.
    """
    above = psutil.Process(supervisor)
    forked = above.cmdline()
    for below in above.children():
        with suppress(psutil.NoSuchProcess):
            if below.cmdline() == forked or "forkserver" in " ".join(below.cmdline()):
                return below
    raise LookupError(f"nothing to fork from below process {supervisor}")


class Search:
    """A search in the background, in a process group of its own as a shell would give it."""

    def __init__(self, arguments: list[str], *, fresh: bool = False) -> None:
        options: dict[str, Any] = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.STDOUT,
            "cwd": ROOT,
            "env": {**environment(), "PYTHONUNBUFFERED": "1"},
            "start_new_session": True,
        }
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would ignore it, as it then should
        try:
            self.process: Forked | subprocess.Popen[str] = (
                subprocess.Popen(arguments, text=True, **options) if fresh else Forked(arguments, **options)
            )
        finally:
            signal.signal(signal.SIGHUP, before)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))

    def wait_for(self, text: str, timeout_s: float = PATIENCE_S) -> str:
        """The first line that holds the text."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            for line in self.lines:
                if text in line:
                    return line
            if self.process.poll() is not None and not self._reader.is_alive():
                break
            time.sleep(0.05)
        raise AssertionError(f"no line with {text!r} in:\n" + "\n".join(self.lines))

    def end(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait for its exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout=10)
        return code

    def output(self) -> str:
        """All it printed."""
        return "\n".join(self.lines)

    def kill(self) -> None:
        """Whatever is left of it."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, 9)
            self.process.wait()
        self._reader.join(timeout=10)
        assert self.process.stdout is not None
        self.process.stdout.close()
