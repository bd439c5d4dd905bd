"""`WorkerPool`: a search's worker processes on this machine, each with its devices and threads.

On a machine without GPUs they are forked from a process that has made the imports of all of them, once
(`search.workers.preload`): two workers on two cores begin two seconds earlier, and one that takes a dead one's place
begins at once. If that process is killed, its workers look dead to the supervisor; it starts others, and they give
their trials back as they do when a supervisor is gone. CUDA does not outlive a fork, so beside GPUs each imports for
itself.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from typing import Any, Protocol

from search import processes
from search.errors import StudyError
from search.workers.worker import environment, work

UNSEEN = 255
"""Exit code of a forked process that nobody could wait for, since what it was forked from was killed: the standard
library's own (`multiprocessing.popen_forkserver`). Nothing says whether the process lives."""

log = logging.getLogger("search.workers.pool")


class WorkerProcess(Protocol):
    """A worker's process, here or (search.workers.ray_pool) on another machine, as `multiprocessing` has it."""

    @property
    def pid(self) -> int | None: ...
    @property
    def sentinel(self) -> int: ...
    @property
    def exitcode(self) -> int | None: ...
    def is_alive(self) -> bool: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...
    def join(self, timeout: float | None = None) -> None: ...
    def close(self) -> None: ...


class WorkerPool:
    """Worker processes, each with its devices and threads; what they import is, before there is a job for them.

    A context: leaving it ends those that were given none.

    Args:
        size: How many.
        threads: BLAS threads of each.
        gpus_per_worker: GPUs that each sees. Where there are fewer GPUs than the workers need, workers share them.

    Raises:
        StudyError: the machine has not as many as one worker is to see.
    """

    def __init__(self, size: int, threads: int, gpus_per_worker: int = 1) -> None:
        self.size = size
        self.threads = threads
        self._devices = device_groups(gpus(), gpus_per_worker)
        self._forks = not self._devices
        self._ready: dict[int, tuple[WorkerProcess, Connection]] = {}

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Within, the imports of workers that will be forked are being made, or have been."""
        if not self._forks:
            yield
            return
        try:
            _start_importing(self.threads)
        except OSError as error:  # no room for its socket, or a TMPDIR too long to be a socket's address
            log.info("workers make their imports themselves: %s", error)
            self._forks = False
            yield
            return
        try:
            yield
        finally:
            _end_importing()

    def __enter__(self) -> WorkerPool:
        if not self._forks:  # to fork one, it would have to wait for the imports
            for index in range(self.size):
                self._ready[index] = self._spawn(index)
        return self

    def __exit__(self, *_: object) -> None:
        for process, link in self._ready.values():
            process.kill()  # without a job it has nothing to lose
            process.join()
            link.close()
        self._ready.clear()

    def alive(self, worker: Mapping[str, Any]) -> bool | None:
        """Whether the process of a `records.WORKER` still runs; None if nothing is known of it."""
        return processes.alive(worker)

    def take(self, index: int) -> tuple[WorkerProcess, Connection]:
        """The process of a place: the one that is ready, or a new one if that was taken and has ended."""
        return self._ready.pop(index, None) or self._spawn(index)

    def _spawn(self, index: int) -> tuple[WorkerProcess, Connection]:
        context: Any = multiprocessing.get_context("forkserver" if self._forks else "spawn")
        ours, theirs = context.Pipe()
        gpu = self._devices[index % len(self._devices)] if self._devices else None
        process = context.Process(target=_main, args=(theirs, gpu, self.threads), name=f"worker-{index}", daemon=False)
        try:
            with _threads_of(self.threads):  # should the process to fork from have to be started anew
                process.start()
        except (OSError, EOFError):  # it was killed in this moment, or cannot be started: its socket needs a place
            if not self._forks:
                raise
            log.exception("no worker could be forked; from now on they import for themselves")
            self._forks = False
            ours.close()
            theirs.close()
            return self._spawn(index)
        theirs.close()  # so that the worker's death closes the pipe
        return process, ours


def _start_importing(threads: int) -> None:
    """Start the process that workers are forked from."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["search.workers.preload"])
    with _threads_of(threads):
        forkserver.ensure_running()


def _end_importing() -> None:
    """End it, without waiting for what it may still import."""
    server = forkserver._forkserver
    pid = getattr(server, "_forkserver_pid", None)
    if pid is not None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(OSError):  # somebody has tidied up TMPDIR, where its socket lay
            server._stop()  # type: ignore[attr-defined]


@contextmanager
def _threads_of(threads: int) -> Iterator[None]:
    """Within, processes are started that compute with so many threads: OpenMP asks but once, when it is loaded."""
    wanted = environment(threads)
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _main(connection: Connection, gpu: str | None, threads: int) -> None:
    """A worker's process. It ends without a second of taking torch's and Transformers' modules apart.

    What wants to be called at exit is called. SQLite's write-ahead logs are folded in by the last process that closes
    the databases, the supervisor.
    """
    code = 1
    try:
        work(connection, gpu, threads)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:  # noqa: BLE001 - whatever `work` itself did not tell
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()  # semaphores given back, logs closed
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # whoever read it has gone
                    stream.flush()
        finally:
            os._exit(code)


def device_groups(devices: list[str], size: int) -> list[str]:
    """What each worker sees, as CUDA_VISIBLE_DEVICES names it: so many of the devices; the rest is left idle.

    Raises:
        StudyError: there are fewer than that.
    """
    if size > max(1, len(devices)):
        found = f"{len(devices)} GPU" + ("" if len(devices) == 1 else "s")
        raise StudyError(f"--gpus-per-worker {size}: this machine has {found} that can be seen")
    return [",".join(devices[low : low + size]) for low in range(0, len(devices) - size + 1, size)]


def gpus() -> list[str]:
    """The GPUs workers may have, as CUDA_VISIBLE_DEVICES names them; empty on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    query = shutil.which("nvidia-smi")
    if query is None:
        return []
    found = subprocess.run(
        [query, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return found.stdout.split() if found.returncode == 0 else []
