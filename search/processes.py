"""Whether a process is alive: the one answer, for trials, for MLflow runs and for the supervisor.

A process id means something only within a PID namespace of a boot of a host, and only as long as its process lives:
two containers on the host's network have one host name and both a process 7, and a restarted host gives the number
to another. So a record holds the host, the boot, the namespace, the id and when the process started. Of a process
whose place is not known to be this one nothing is said (None): heartbeats decide.

    same host, boot and PID namespace      alive or dead, by its id and its start
    anything else, or a part not known     None
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

STARTED_TAG = "process_started"
"""MLflow tag of a run: `<pid>@<boot>:<ticks>` of the process that writes it, where the start is known (Linux).

The id is repeated, here and below, so that the tag says which `pid` it belongs to: an earlier version, which does not
know this tag, renews `pid` alone when it continues a run.
"""
NAMESPACE_TAG = "process_namespace"
"""MLflow tag of a run: `<pid>@<PID namespace>` of the process that writes it."""


def this_process() -> dict[str, Any]:
    """This process as a record, see `record`."""
    return record(os.getpid())


def record(pid: int) -> dict[str, Any]:
    """A process of this PID namespace as a record.

    Keys: `host`, `pid`, `started_s` (seconds since 1970, for people and earlier versions), `since_boot` (the boot's id
    and clock ticks since) and `pid_namespace`; the last two are None where they are not known.

    Raises:
        psutil.NoSuchProcess: there is none of this id.
    """
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "started_s": psutil.Process(pid).create_time(),
        "since_boot": _since_boot(pid),
        "pid_namespace": _namespace(),
    }


def alive(record: object) -> bool | None:
    """Whether the process of a record is alive; None if its place is not known to be this one. A zombie is not alive.

    Args:
        record: As `record` makes it. Records come out of a database that other programs write to as well, so it may
            be anything: what is no record is of no known place.
    """
    if not isinstance(record, Mapping):
        return None
    since_boot, pid = record.get("since_boot"), record.get("pid")
    if not (isinstance(since_boot, str) and isinstance(pid, int)):
        return None
    mine = _namespace()
    if mine is None or (record.get("host"), record.get("pid_namespace")) != (socket.gethostname(), mine):
        return None
    if since_boot.partition(":")[0] != _boot():
        return None
    if not is_running(pid):
        return False
    now = _since_boot(pid)
    if now is None:  # it ended just now, or /proc hides the processes of other users
        return None if is_running(pid) else False
    return now == since_boot


def is_running(pid: int) -> bool:
    """Whether a process of this id runs in this PID namespace; a zombie does not."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # another user's
    except (OSError, OverflowError):
        return False
    state = _stat(pid)
    return state is None or state[0] not in "ZX"


def tags() -> dict[str, str]:
    """This process as tags of an MLflow run; what is not known is left out."""
    pid, since_boot, namespace = os.getpid(), _since_boot(os.getpid()), _namespace()
    found = {"host": socket.gethostname(), "pid": str(pid)}
    if since_boot is not None:
        found[STARTED_TAG] = f"{pid}@{since_boot}"
    if namespace is not None:
        found[NAMESPACE_TAG] = f"{pid}@{namespace}"
    return found


def is_gone(tags: Mapping[str, str]) -> bool:
    """Whether the process that writes a trial's MLflow run, by the run's tags, was here and is gone.

    Of runs of earlier versions, which lack a tag, nothing is known. Once their trial is lost, its run is ended too.
    """
    pid = tags.get("pid", "")
    if tags.get("kind") != "trial" or not pid.isdecimal():
        return False

    def own(tag: str) -> str | None:
        owner, _, value = tags.get(tag, "").partition("@")
        return value if owner == pid else None

    writer = {"host": tags.get("host"), "pid": int(pid)}
    return alive({**writer, "since_boot": own(STARTED_TAG), "pid_namespace": own(NAMESPACE_TAG)}) is False


def _since_boot(pid: int) -> str | None:
    """When a process started, as Linux counts it: the boot's id and clock ticks since; None where it is not known.

    Unlike psutil's start time, which is derived from the time of day, no change of the clock moves it.
    """
    boot, stat = _boot(), _stat(pid)
    return None if boot is None or stat is None else f"{boot}:{stat[19]}"  # the 22nd field, counted from the 3rd


def _stat(pid: int) -> list[str] | None:
    """The fields of a process's `stat` from the third on (its state); None if it cannot be read."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()  # the second field, in brackets, may hold spaces


def _boot() -> str | None:
    """The boot's id, which no two boots of any machines share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _namespace() -> str | None:
    """The PID namespace that this process is in; None if it is not known, or if /proc shows another one's processes.

    A number may be that of an earlier namespace, all of whose processes have ended by then: they are gone, as said.
    """
    try:
        if str(Path("/proc/self").readlink()) != str(os.getpid()):
            return None
        return str(Path("/proc/self/ns/pid").readlink()).partition("[")[2].rstrip("]") or None
    except OSError:
        return None
