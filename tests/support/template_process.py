"""The process that `template` forks programs from: `python -m tests.support.template_process DESCRIPTOR`."""

from __future__ import annotations

import importlib
import io
import multiprocessing.process
import multiprocessing.util
import os
import pickle
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import warnings
from contextlib import suppress
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from search import preflight
from search.report.facts import gather
from search.report.write import write_all
from tests.support.near_probe import NearProbe
from tests.support.report_data import study, trial
from tests.support.template import LARGEST, Request
from trainer.common.imports import without_collection

PRELOAD = "search.workers.preload"
SUPERVISOR = (
    "search.session.opening",
    "search.session.left",
    "search.session.closing",
    "search.report.keeper",
    "search.tracking.delivery",
    "matplotlib.backends.backend_svg",
)
HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)


def main(descriptor: int) -> None:
    """Make the imports, then fork a program for each request, until the tests' process is gone."""
    with socket.socket(fileno=descriptor) as requests:
        for name in [each for each in os.environ if each.startswith(("MLFLOW_", "DO_NOT_TRACK"))]:
            del os.environ[name]  # the tests' own imports may have set it, and here it is to be seen who sets it
        before = dict(os.environ)
        make_imports()
        set_by_imports = {name: value for name, value in os.environ.items() if before.get(name) != value}
        wanted = serve(requests)
    if wanted is not None:  # in a program
        become(*wanted, set_by_imports)


def make_imports() -> None:
    """What workers are forked with, and what a supervisor imports beside it."""
    importlib.import_module(PRELOAD)
    with without_collection():
        for name in SUPERVISOR:
            importlib.import_module(name)
    write_a_log()
    preflight.Probe = NearProbe  # type: ignore[assignment,misc]  # torch is there: no process needs to be for it


def write_a_log() -> None:
    """Of a made-up study: templates are compiled and fonts read here, not in every program (1.5 of 8.8 s of CPU)."""
    with tempfile.TemporaryDirectory() as folder:
        write_all(gather(study([trial(0, [(2.0, 1.9), (1.8, 1.7)], norms=[1.0, 2.0])])), Path(folder))


def serve(requests: socket.socket) -> tuple[Request, list[int]] | None:
    """Fork programs and tell how they end.

    Returns:
        In each program what it is to be, and its descriptors 0 to 2; in the template None, once no test wants more.
    """
    asked: dict[int, socket.socket] = {}
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    while True:
        ready = select.select([requests, woken], [], [])[0]
        if woken in ready:
            os.read(woken, 4096)
            for pid in tuple(asked):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    with asked.pop(pid) as asker, suppress(OSError):  # it no longer wants to know
                        asker.send(str(os.waitstatus_to_exitcode(status)).encode())
        if requests in ready:
            message, descriptors, _, _ = socket.recv_fds(requests, LARGEST, 4)
            if not message:
                return None
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                for each in (woken, wake, descriptors[0], *(one.fileno() for one in asked.values())):
                    os.close(each)
                return pickle.loads(message), descriptors[1:]
            for each in descriptors[1:]:
                os.close(each)
            asked[pid] = socket.socket(fileno=descriptors[0])
            with suppress(OSError):
                asked[pid].send(str(pid).encode())


def become(request: Request, descriptors: list[int], set_by_imports: dict[str, str]) -> None:
    """Be the program: all that a new interpreter would have of its own, then its code."""
    if request.new_session:
        os.setsid()
    for number, given in enumerate(descriptors):
        os.dup2(given, number)
        os.close(given)
    for number in request.closed:
        os.close(number)
    own_signals()
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    os.environ.clear()
    os.environ.update({**set_by_imports, **request.env})
    os.chdir(request.cwd)
    multiprocessing.process.ORIGINAL_DIR = request.cwd  # type: ignore[attr-defined]
    sys.stdin, sys.stdout, sys.stderr = (stream(number) for number in range(3))
    multiprocessing.util.spawnv_passfds = fork_the_fork_server  # type: ignore[assignment]
    how, *rest = request.arguments
    if how == "-m":
        sys.path[0], sys.argv = request.cwd, rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif how == "-c":
        sys.path[0], sys.argv = "", ["-c", *rest[1:]]
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), module.__dict__)
    else:
        sys.path[0], sys.argv = str(Path(how).resolve().parent), [how, *rest]
        runpy.run_path(how, run_name="__main__")


def own_signals() -> None:
    """Python's handlers, as a new interpreter has them; what is ignored stays so where a program was started so."""
    for number in HANDLED:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stream(descriptor: int) -> Any:
    """Standard input, output or error, as a new interpreter makes it of a descriptor."""
    try:
        raw = io.FileIO(descriptor, "r" if descriptor == 0 else "w", closefd=False)
    except OSError:
        return None
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    below: Any = io.BufferedReader(raw) if descriptor == 0 else raw if unbuffered else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        below,
        errors="backslashreplace" if descriptor == 2 else "strict",
        line_buffering=descriptor == 2 or raw.isatty(),
        write_through=descriptor != 0 and unbuffered,
    )


_spawn = multiprocessing.util.spawnv_passfds


def fork_the_fork_server(path: Any, arguments: list[Any], passed: list[int]) -> int:
    """In place of `multiprocessing.util.spawnv_passfds`: the process that workers are forked from is forked as well.

    Only while no other thread than a session's watcher is there: locks that another holds would stay locked; and
    before the program has opened a database: SQLite's locks do not survive a fork.
    """
    code = arguments[-1]
    if "multiprocessing.forkserver import main" not in code or threading.active_count() > 2 or is_open({*passed}):
        return _spawn(path, arguments, passed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 on: of a fork beside another thread
        pid = os.fork()
    return pid or be_the_fork_server(code, {0, 1, 2, *passed})


def is_open(passed: set[int]) -> bool:
    """Whether this process has a file or a connection open, beside standard streams and those that are passed on."""
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in passed:
            with suppress(OSError):  # that of this listing
                found = os.readlink(f"/proc/self/fd/{name}")
                if found.startswith(("/", "socket:")) and not found.startswith(("/dev/", "/proc/")):
                    return True
    return False


def be_the_fork_server(code: str, kept: set[int]) -> NoReturn:
    """What `python -c code` does, with the imports made."""
    ended = 1
    try:
        for name in os.listdir("/proc/self/fd"):
            if int(name) not in kept:
                with suppress(OSError):
                    os.close(int(name))
        ignored = [number for number in HANDLED if signal.getsignal(number) == signal.SIG_IGN]
        own_signals()
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        for shared in (forkserver._forkserver, resource_tracker._resource_tracker):
            shared.__init__()  # type: ignore[misc]
        del sys.modules[PRELOAD]  # which says what signals do
        exec(code, {"__name__": "__main__"})
        ended = 0
    except SystemExit:
        ended = 0
    finally:
        os._exit(ended)


if __name__ == "__main__":
    main(int(sys.argv[1]))
