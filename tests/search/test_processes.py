"""Which processes are alive."""

import os
import subprocess
import sys
import time

import psutil

from search.processes import STARTED_TAG, alive, is_gone, is_running, record, this_process
from search.tracking.environment import environment


def test_this_process_is_alive_and_others_are_told_apart():
    me = this_process()
    assert alive(me) is True
    assert alive({**me, "since_boot": "a-boot:1"}) is False  # a reused process id
    elsewhere = {**me, "since_boot": None}  # where there is no /proc
    assert alive(elsewhere) is True
    assert alive({**elsewhere, "started_s": me["started_s"] - 60}) is False
    assert alive({**me, "host": "elsewhere"}) is None


def test_a_dead_or_unreaped_process_is_not_alive():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = record(child.pid)
    assert alive(worker) is True
    child.kill()
    deadline = time.monotonic() + 10
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.01)
    assert alive(worker) is False
    child.wait()
    child.stdin.close()
    assert alive(worker) is False


def test_a_record_without_a_start_is_judged_by_its_id():
    assert alive({"host": this_process()["host"], "pid": os.getpid()}) is True
    assert is_running(os.getpid()) and not is_running(2**22 + 1)  # beyond Linux' largest id


def test_runs_are_judged_by_their_tags():
    tags = {"kind": "trial", **environment()}
    assert not is_gone(tags)
    assert is_gone({**tags, "pid": str(2**22 + 1)})
    assert is_gone({**tags, STARTED_TAG: f"{os.getpid()}@another-boot:1"})  # a reused process id
    assert not is_gone({**tags, STARTED_TAG: "7@another-boot:1"})  # continued by a version that renews `pid` alone
    assert not is_gone({name: value for name, value in tags.items() if name != STARTED_TAG})
    assert not is_gone({**tags, "host": "elsewhere", "pid": "7"})
    assert not is_gone({**tags, "kind": "study", "pid": str(2**22 + 1)})
    assert is_gone({"kind": "trial", "host": tags["host"]})
