"""Programs that are forked behave as those that are started: arguments, environment, streams, signals, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import template
from tests.support.template import Forked

FACTS = """
import os, sys
print(sys.argv[1:], os.getcwd(), os.environ.get("WORD"), os.environ.get("PYTEST_CURRENT_TEST"), __name__)
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


def code(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_arguments_environment_streams_and_exit_code(tmp_path: Path) -> None:
    done = template.run([*code(FACTS), "a", "b c"], env={"WORD": "x"}, cwd=tmp_path)
    assert done.stdout == f"['a', 'b c'] {tmp_path} x None __main__\n"
    assert (done.returncode, done.stderr) == (3, "to stderr\n")
    script = tmp_path / "script.py"
    script.write_text(FACTS)
    assert template.run([sys.executable, str(script), "c"], env={}, cwd=tmp_path).stdout.startswith("['c']")
    failed = template.run(code("1 / 0"))
    assert failed.returncode == 1 and failed.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_signals() -> None:
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGHUP):
        program = Forked(code("import time; print('up', flush=True); time.sleep(60)"), stdout=subprocess.PIPE)
        assert program.stdout is not None and program.stdout.readline() == "up\n" and program.poll() is None
        program.send_signal(number)
        assert program.communicate(20) == ("", "") and program.returncode == -number
    ignoring = "import os, signal; os.kill(os.getpid(), signal.SIGHUP); print(os.getsid(0) == os.getpid())"
    kept = Forked(code(ignoring), stdout=subprocess.PIPE, ignored=[signal.SIGHUP], start_new_session=True)
    assert kept.communicate(20) == ("True\n", "") and kept.returncode == 0
    with pytest.raises(subprocess.TimeoutExpired):
        template.run(code("import time; time.sleep(60)"), timeout=0.2)


def test_nothing_of_the_tests_or_of_other_programs_is_open_in_one(tmp_path: Path) -> None:
    one = Forked(code("input()"), stdin=None, stdout=subprocess.PIPE)
    with (tmp_path / "open").open("w"):
        listed = template.run(code("import os; print([os.readlink(f'/proc/self/fd/{n}') for n in range(3, 20) if "
                                   "os.path.exists(f'/proc/self/fd/{n}')])"), stdin=subprocess.DEVNULL)  # fmt: skip
    one.kill()
    one.communicate(20)
    assert "socket" not in listed.stdout and str(tmp_path) not in listed.stdout, listed.stdout + os.linesep


def test_processes_that_workers_are_forked_from_are_forked_until_a_file_is_open(tmp_path: Path) -> None:
    """As by the second of two searches of one program: a database that both would have open would be damaged."""
    search = (
        "import multiprocessing, os, psutil, sys; from search.workers.multiprocessing_private import end_fork_server\n"
        "def told():\n"
        "    multiprocessing.forkserver.ensure_running()\n"
        "    below = psutil.Process(multiprocessing.forkserver._forkserver._forkserver_pid)\n"
        "    print(below.cmdline() == psutil.Process().cmdline())\n"
        "    end_fork_server()\n"
        "from multiprocessing import forkserver\n"
        "told(); kept = open(sys.argv[1], 'w'); told()\n"
    )
    done = template.run([*code(search), str(tmp_path / "kept")])
    assert (done.stdout, done.stderr) == ("True\nFalse\n", "")
