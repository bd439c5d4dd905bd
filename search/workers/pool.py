"""`WorkerPool`: a search's worker processes on this machine, each with its devices and threads.

On a machine without GPUs they are forked from a process that has made the imports of all of them, once
(`search.workers.preload`): two workers on two cores start two seconds earlier, and a replacement for a dead one
starts at once. If that process is killed, its workers look dead to the supervisor; it starts others, and they give
their trials back as they do when a supervisor is gone. CUDA does not survive a fork, so on machines with GPUs each
worker makes its own imports: all start with the search, and import while it looks at model and data.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from typing import Any, Protocol

from search import processes
from search.errors import StudyError
from search.workers.multiprocessing_private import WORKER, end_fork_server
from search.workers.start import OF_A_TERMINAL, environment, main
from trainer.common import nvidia
from trainer.common.imports import own_path

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
    """Worker processes with their devices and threads, imports already loaded.

    A context: leaving it ends the workers that were given no job.

    Args:
        size: Number of workers.
        threads: BLAS threads of each.
        gpus_per_worker: GPUs that each sees. Where there are fewer GPUs than the workers need, workers share them.

    Raises:
        StudyError: the machine has fewer GPUs than one worker is to see.
    """

    def __init__(self, size: int, threads: int, gpus_per_worker: int = 1) -> None:
        self.size = size
        self.threads = threads
        self._devices = device_groups(gpus(), gpus_per_worker)
        self._forks = not self._devices
        self._ready: dict[int, tuple[WorkerProcess, Connection]] = {}

    @contextmanager
    def importing(self) -> Iterator[None]:
        """Make the workers' imports while this block runs: in a process that they are forked from, or in their own."""
        if self._forks:
            try:
                _start_importing(self.threads)
            except OSError as error:  # no room for its socket, or a TMPDIR too long to be a socket's address
                log.info("each worker makes its own imports: %s", error)
                self._forks = False
        forks = self._forks
        try:
            if not forks:
                self._start_all()
            yield
        finally:
            self._end_idle()
            if forks:
                end_fork_server()

    def __enter__(self) -> WorkerPool:
        if not self._forks:  # to fork one now would mean to wait for the imports
            self._start_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._end_idle()

    def _start_all(self) -> None:
        """Start the workers that there are not yet."""
        for index in range(self.size):
            if index not in self._ready:
                self._ready[index] = self._spawn(index)

    def _end_idle(self) -> None:
        """End the workers that were given no job: they have nothing to lose."""
        for process, link in self._ready.values():
            process.kill()
            process.join()
            link.close()
        self._ready.clear()

    def alive(self, worker: Mapping[str, Any]) -> bool | None:
        """Whether the process of a `records.WORKER` still runs; None if nothing is known about it."""
        return processes.alive(worker)

    def take(self, index: int) -> tuple[WorkerProcess, Connection]:
        """The process of a worker slot: the one that is ready, or a new one if that was taken before."""
        return self._ready.pop(index, None) or self._spawn(index)

    def _spawn(self, index: int) -> tuple[WorkerProcess, Connection]:
        context: Any = multiprocessing.get_context("forkserver" if self._forks else "spawn")
        ours, theirs = context.Pipe()
        gpu = self._devices[index % len(self._devices)] if self._devices else None
        process = context.Process(
            target=main, args=(theirs, gpu, self.threads), name=f"{WORKER}-{index}", daemon=False
        )
        try:
            # The threads in case the process to fork from has to be started again.
            with _threads_of(self.threads), _deaf():
                process.start()
        except (OSError, EOFError):  # it was killed just now, or its socket finds no room
            if not self._forks:
                raise
            log.exception("no worker could be forked; from now on each makes its own imports")
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


@contextmanager
def _threads_of(threads: int) -> Iterator[None]:
    """Processes started in this block use this many threads; OpenMP reads the setting once, when it is loaded."""
    wanted = {**environment(threads), **own_path()}
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


@contextmanager
def _deaf() -> Iterator[None]:
    """Ctrl-C does not reach a process that is started in this block until it is ready to ignore it.

    It comes to the whole process group; while a new process still imports, it would print where it was interrupted.
    """
    resource_tracker.ensure_running()  # starting it later would let signals through again (Python 3.11)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_A_TERMINAL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def device_groups(devices: list[str], size: int) -> list[str]:
    """What each worker sees, as CUDA_VISIBLE_DEVICES names it.

    Args:
        size: Devices in a group; those left over stay idle.

    Raises:
        StudyError: there are fewer than `size` devices.
    """
    if size > max(1, len(devices)):
        found = f"{len(devices)} GPU" + ("" if len(devices) == 1 else "s")
        raise StudyError(f"--gpus-per-worker {size}: this machine has {found} that a process can see")
    return [",".join(devices[low : low + size]) for low in range(0, len(devices) - size + 1, size)]


def gpus() -> list[str]:
    """The GPUs that workers may use, as CUDA_VISIBLE_DEVICES names them; empty on a machine without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    there = nvidia.gpus()
    if all(gpu.uuid for gpu in there):
        return [gpu.uuid for gpu in there]
    # CUDA counts from the fastest, nvidia-smi along the bus; but each worker has one of its own either way.
    return [gpu.index for gpu in there]
