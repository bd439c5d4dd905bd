"""Which processes are alive: dead is only what is known to be dead."""

import json
import os
import shutil
import subprocess
import sys
import time
from typing import Any

import psutil
import pytest

from search import processes
from search.processes import NAMESPACE_TAG, STARTED_TAG, alive, is_gone, is_running, record, this_process
from search.tracking.environment import environment

BEYOND = 2**22 + 1
"""A process id beyond Linux' largest: there is none of it."""
ME = this_process()
BOOT, _, TICKS = ME["since_boot"].partition(":")
OTHER_BOOT = "6f9d7a0e-0000-4000-8000-000000000000"


@pytest.mark.parametrize(
    ("what", "changes", "answer"),
    [
        ("this process", {}, True),
        ("one that has ended", {"pid": BEYOND}, False),
        ("the id was given to another process", {"since_boot": f"{BOOT}:{int(TICKS) - 100}"}, False),
        ("another host", {"host": "elsewhere"}, None),
        ("another host, a dead id", {"host": "elsewhere", "pid": BEYOND}, None),
        ("a container on the host's network: one host name, one boot", {"pid_namespace": "4026532999"}, None),
        ("the same, and this namespace has no such id", {"pid_namespace": "4026532999", "pid": BEYOND}, None),
        ("apptainer: the host's name, boot and PID namespace", {"pid": BEYOND}, False),
        ("a cloned machine: its name, but its own boot", {"since_boot": f"{OTHER_BOOT}:{TICKS}"}, None),
        ("the host has booted since", {"since_boot": f"{OTHER_BOOT}:1", "pid": BEYOND}, None),
        ("an earlier version, which knows no namespace", {"pid_namespace": None, "pid": BEYOND}, None),
        ("a system without /proc", {"since_boot": None, "pid_namespace": None, "pid": BEYOND}, None),
        ("another program's: no id", {"pid": "seven"}, None),
        ("another program's: no start", {"since_boot": 7}, None),
    ],
)
def test_dead_is_only_what_is_known_to_be_dead(what: str, changes: dict[str, Any], answer: bool | None) -> None:
    assert alive({**ME, **changes}) is answer, what


@pytest.mark.parametrize(
    "what", ["a text", 7, None, [], {}, {"host": ME["host"]}, {"host": ME["host"], "pid": os.getpid()}]
)
def test_what_is_no_record_is_of_no_known_place(what: object) -> None:
    assert alive(what) is None


def test_a_dead_or_unreaped_process_is_not_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = record(child.pid)
    assert alive(worker) is True
    child.kill()
    deadline = time.monotonic() + 10
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(worker) is False and not is_running(child.pid)
    child.wait()
    assert child.stdin is not None
    child.stdin.close()
    assert alive(worker) is False and not is_running(child.pid)


def test_an_id_alone_says_whether_something_runs() -> None:
    assert is_running(os.getpid()) and not is_running(BEYOND)


def test_processes_that_proc_hides_are_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mount -o hidepid=2`: of other users' processes nothing can be read, but a signal would reach them."""
    monkeypatch.setattr(processes, "_since_boot", lambda pid: None)
    assert alive(ME) is None
    assert alive({**ME, "pid": BEYOND}) is False


ASK = """
import json, sys
from search.processes import alive, this_process
print(json.dumps([this_process()["pid_namespace"], [alive(record) for record in json.load(sys.stdin)]]))
"""


@pytest.mark.parametrize("proc", ["--mount-proc", None], ids=["a /proc of its own", "the outer /proc"])
def test_from_another_pid_namespace_nothing_is_known(proc: str | None) -> None:
    """Two containers on the host's network took each other's running trials for lost until none was left."""
    command = ["unshare", "--pid", "--fork", *([proc] if proc else [])]
    if shutil.which("unshare") is None or subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("no right to make a PID namespace")
    asked = [ME, {**ME, "pid": BEYOND}, {**ME, "pid": 1}]
    done = subprocess.run(
        [*command, sys.executable, "-c", ASK], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    namespace, answers = json.loads(done.stdout)
    assert answers == [None, None, None]
    assert namespace != ME["pid_namespace"] and (namespace is None) == (proc is None)


def test_runs_are_judged_by_their_tags() -> None:
    tags = {"kind": "trial", **environment()}
    pid = tags["pid"]
    dead = {
        **tags,
        "pid": str(BEYOND),
        STARTED_TAG: f"{BEYOND}@{BOOT}:1",
        NAMESPACE_TAG: f"{BEYOND}@{ME['pid_namespace']}",
    }
    assert not is_gone(tags)
    assert is_gone(dead)
    assert is_gone({**tags, STARTED_TAG: f"{pid}@{BOOT}:1"})  # a reused process id
    assert not is_gone({**tags, STARTED_TAG: f"{pid}@{OTHER_BOOT}:1"})
    assert not is_gone({**dead, NAMESPACE_TAG: f"{BEYOND}@4026532999"})
    assert not is_gone({**dead, "host": "elsewhere"})
    assert not is_gone({**dead, "kind": "study"})
    # A version that renews `pid` alone has continued the run; one that lacks a tag; another program's.
    assert not is_gone({**dead, "pid": str(BEYOND + 1)})
    assert not is_gone({name: value for name, value in dead.items() if name != NAMESPACE_TAG})
    assert not is_gone({**dead, "pid": "seven"})
    assert not is_gone({"kind": "trial", "host": tags["host"]})
