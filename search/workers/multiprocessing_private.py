"""Names of the standard library with an underscore, and one number, that worker processes need.

tests/search/workers/test_multiprocessing_private.py says which of them a new Python lacks.
"""

from __future__ import annotations

import atexit
import os
import signal
from contextlib import suppress
from multiprocessing import forkserver

UNSEEN = 255
"""Exit code of a forked process whose end could not be seen, since the process that it was forked from was killed:
`multiprocessing.popen_forkserver` has it as a bare number. Nothing says whether the process lives."""


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
