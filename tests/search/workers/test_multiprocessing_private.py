"""What worker processes use of the standard library that it does not promise: a new Python may lack it."""

from __future__ import annotations

import atexit
import inspect
import os
import subprocess
import sys
from multiprocessing import forkserver, popen_forkserver
from pathlib import Path
from typing import Any

import pytest

from search.workers.multiprocessing_private import UNGUARDED, UNSEEN

NAMES = [
    (forkserver, "_forkserver", "the fork server that `ensure_running` starts"),
    (forkserver.ForkServer, "_stop", "the end of the fork server, its socket removed"),
    (atexit, "_run_exitfuncs", "exit handlers, before `os._exit`"),
]


@pytest.mark.parametrize(("owner", "name", "what"), NAMES, ids=[name for _, name, _ in NAMES])
def test_the_standard_library_still_has(owner: Any, name: str, what: str) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} went missing: {what}"


def test_the_fork_server_still_keeps_its_pid() -> None:
    """`end_fork_server` would leave the process alive, and a search that cannot start would wait for its imports."""
    assert hasattr(forkserver._forkserver, "_forkserver_pid"), "ForkServer._forkserver_pid went missing"
    assert "self._forkserver_pid = pid" in inspect.getsource(forkserver.ForkServer), "it is set elsewhere now"


def test_a_process_whose_end_cannot_be_seen_still_has_this_exit_code() -> None:
    """Whoever would report its end closes the pipe without a word."""
    read, write = os.pipe()
    os.close(write)
    popen: Any = object.__new__(popen_forkserver.Popen)
    popen.returncode, popen.sentinel = None, read
    assert popen.poll() == UNSEEN, "multiprocessing.popen_forkserver has another exit code for it now"
    os.close(read)


def test_the_fork_server_is_ended_at_once_and_exit_handlers_run() -> None:
    code = """
import atexit, os, psutil, time
from multiprocessing import forkserver
from search.workers.multiprocessing_private import end_fork_server, run_exit_handlers

atexit.register(print, "handled", flush=True)
end_fork_server()  # none was started: nothing happens
forkserver.ensure_running()
server = psutil.Process(forkserver._forkserver._forkserver_pid)
end_fork_server()
assert not server.is_running()
run_exit_handlers()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "handled\n", "")


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_only_a_worker_that_imports_the_program_ends(tmp_path: Path, method: str) -> None:
    """Else a program without `if __name__ == "__main__":` would start a search in each of its workers."""
    code = f"""
import multiprocessing
from search.workers.multiprocessing_private import WORKER, refuse_in_a_worker

refuse_in_a_worker()
context = multiprocessing.get_context("{method}")
if __name__ == "__main__":
    for name in (WORKER + "-0", "somebody's"):
        process = context.Process(target=print, args=("runs",), name=name)
        process.start()
        process.join()
        print(process.exitcode, flush=True)
"""
    (tmp_path / "unguarded.py").write_text(code, encoding="utf-8")
    ran = [sys.executable, "unguarded.py"]
    done = subprocess.run(ran, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.split() == [str(UNGUARDED), "runs", "0"], done.stderr
