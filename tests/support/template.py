"""Programs under test, forked from a Python process that has made a worker's imports (`template_process`).

A search makes these imports twice, for its supervisor and for its workers: 10 of the 13.5 s of CPU of one with a quick
trial. A forked program has a process, a session, signals and descriptors of its own, and the supervisor forks its
workers from a process below it, as ever; only the imports are there. Tests of the imports themselves, of what is
printed meanwhile, and of an environment that libraries read at import start a new interpreter (`search_process`).
"""

from __future__ import annotations

import atexit
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
LARGEST = 200_000
"""Bytes of a request at most."""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
"""For the imports: as it is before any test has changed it."""


@dataclass(frozen=True)
class Request:
    """What a program is to be: that of `python -m module ...`, `python -c code ...` or `python script ...`."""

    arguments: tuple[str, ...]
    """All after the interpreter."""
    env: Mapping[str, str]
    cwd: str
    new_session: bool
    ignored: tuple[int, ...]
    """Signals that it ignores from its start, as under nohup."""
    closed: tuple[int, ...]
    """Which of the descriptors 0 to 2 are closed."""


class Forked:
    """A program that was forked, with as much of `subprocess.Popen` as tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        stdin: int | None = subprocess.DEVNULL,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | str | None = None,
        start_new_session: bool = False,
        ignored: Sequence[int] = (),
        closed: Sequence[int] = (),
    ) -> None:
        """Fork it.

        Args:
            arguments: `[sys.executable, "-m", ...]`, `[sys.executable, "-c", ...]` or `[sys.executable, script, ...]`.
            stdin, stdout, stderr: a descriptor, PIPE, DEVNULL, None for the tests' own; STDOUT for `stderr` alone.
            env, cwd: as `subprocess.Popen` has them.
        """
        assert arguments[0] == sys.executable, arguments
        self.args = list(arguments)
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        self.stderr: IO[str] | None = None
        ours: list[int] = []
        descriptors: list[int] = []
        for number, wanted in enumerate((stdin, stdout, stderr)):
            if wanted == subprocess.PIPE:
                read, write = os.pipe()
                setattr(self, "stdout" if number == 1 else "stderr", os.fdopen(read, encoding="utf-8"))
                ours.append(write)
                descriptors.append(write)
            elif wanted == subprocess.DEVNULL:
                ours.append(os.open(os.devnull, os.O_RDWR))
                descriptors.append(ours[-1])
            elif wanted == subprocess.STDOUT:
                descriptors.append(descriptors[1])
            else:
                descriptors.append(number if wanted is None else wanted)
        request = Request(
            tuple(arguments[1:]),
            dict(os.environ if env is None else env),
            str(Path.cwd() if cwd is None else cwd),
            start_new_session,
            tuple(ignored),
            tuple(closed),
        )
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        message = pickle.dumps(request)
        assert len(message) < LARGEST
        socket.send_fds(_template(), [message], [theirs.fileno(), *descriptors])
        theirs.close()
        for each in ours:
            os.close(each)
        self.pid = int(self._receive())

    def _receive(self) -> bytes:
        found = self._status.recv(64)
        assert found, "the template has died"
        return found

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its exit code; minus the signal's number if one ended it.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(self._receive())
            self._status.close()
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for its end; what it wrote to the pipes.

        Raises:
            subprocess.TimeoutExpired: it did not end, and was killed.
        """
        kept = {"stdout": "", "stderr": ""}

        def read(name: str, stream: IO[str]) -> None:
            with stream:
                kept[name] = stream.read()

        streams = [(name, getattr(self, name)) for name in kept if getattr(self, name) is not None]
        readers = [threading.Thread(target=read, args=each, daemon=True) for each in streams]
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
            raise
        for reader in readers:
            reader.join(timeout)
        return kept["stdout"], kept["stderr"]

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def run(arguments: Sequence[str], timeout: float = 120, **options: Any) -> subprocess.CompletedProcess[str]:
    """Fork a program and run it to its end, as `subprocess.run(capture_output=True, text=True)` does."""
    program = Forked(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    out, err = program.communicate(timeout)
    assert program.returncode is not None
    return subprocess.CompletedProcess(program.args, program.returncode, out, err)


_server: tuple[subprocess.Popen[bytes], socket.socket] | None = None


def _template() -> socket.socket:
    """The template's socket; started at the first call, and ended with this process."""
    global _server
    if _server is None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for kind in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            ours.setsockopt(socket.SOL_SOCKET, kind, 2 * LARGEST)
        command = [sys.executable, "-m", "tests.support.template_process", str(theirs.fileno())]
        process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL
        )
        theirs.close()
        _server = process, ours
        atexit.register(_end)
    return _server[1]


def _end() -> None:
    assert _server is not None
    process, ours = _server
    ours.close()
    process.wait()
