"""Names of the standard library with an underscore, and one number, that worker processes need.

tests/search/workers/test_multiprocessing_private.py says which of them a new Python lacks.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from contextlib import suppress
from multiprocessing import forkserver

UNSEEN = 255
"""Exit code of a forked process whose end could not be seen, since the process that it was forked from was killed:
`multiprocessing.popen_forkserver` has it as a bare number. Nothing says whether the process lives."""


WORKER = "lora-search-worker"
"""How the names of worker processes begin."""
UNGUARDED = 86
"""Exit code of a worker that was to start a search, see `refuse_in_a_worker`."""


def refuse_in_a_worker() -> None:
    """End this process if it is a worker that imports the program's main file, which is how it begins: a program that
    starts a search outside of `if __name__ == "__main__":` would start one in each of its workers.
    """
    process = multiprocessing.current_process()
    if getattr(process, "_inheriting", False) and process.name.startswith(WORKER):
        os._exit(UNGUARDED)  # a fork server makes 1 of SystemExit


def end_fork_server() -> None:
    """End the process that workers are forked from, if there is one.

    It is killed first: `_stop`, the library's own, waits until it has made its imports.
    """
    server = forkserver._forkserver
    pid = getattr(server, "_forkserver_pid", None)
    if pid is None:
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(OSError):  # somebody has tidied up TMPDIR, where its socket lay
        server._stop()  # type: ignore[attr-defined]


def run_exit_handlers() -> None:
    """Run the functions registered with `atexit`, for a process that ends by `os._exit`, which leaves them out."""
    atexit._run_exitfuncs()
