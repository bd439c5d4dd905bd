"""Whether a process is alive: the one answer, for trials, for MLflow runs and for the supervisor.

A process id alone is not enough, since the system gives it to another process some day: a record holds the host,
the id and when the process started.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

STARTED_TAG = "process_started"
"""MLflow tag of a run: `<pid>@<start>` of the process that writes it, where the start is known (Linux).

The id is repeated so that the tag says which `pid` it belongs to: an earlier version, which does not know this tag,
renews `pid` alone when it continues a run.
"""

_TOLERANCE_S = 2.0
"""psutil derives start times from the boot's time of day and clock ticks, which two readings may round differently."""


def this_process() -> dict[str, Any]:
    """This process as a record, see `record`."""
    return record(os.getpid())


def record(pid: int) -> dict[str, Any]:
    """A process of this host as a record: `host`, `pid`, `started_s` (seconds since 1970), `since_boot` (or None).

    Raises:
        psutil.NoSuchProcess: there is none of this id.
    """
    started_s = psutil.Process(pid).create_time()
    return {"host": socket.gethostname(), "pid": pid, "started_s": started_s, "since_boot": _since_boot(pid)}


def alive(record: Mapping[str, Any]) -> bool | None:
    """Whether the process of a record is alive; None if it is on another host.

    What the record does not say (`started_s`, `since_boot`) is not compared. A zombie is not alive.
    """
    if record.get("host") != socket.gethostname():
        return None
    return is_running(record["pid"], started_s=record.get("started_s"), since_boot=record.get("since_boot"))


def is_running(pid: int, *, started_s: float | None = None, since_boot: str | None = None) -> bool:
    """Whether a process of this id, and of this start if one is given, runs on this host; a zombie does not."""
    try:
        process = psutil.Process(pid)
        same = True
        if since_boot is not None:
            same = since_boot == _since_boot(pid)
        elif started_s is not None:
            same = abs(process.create_time() - started_s) < _TOLERANCE_S
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def started_tag() -> str | None:
    """The value of `STARTED_TAG` for this process; None where its start is not known."""
    since_boot = _since_boot(os.getpid())
    return None if since_boot is None else f"{os.getpid()}@{since_boot}"


def is_gone(tags: Mapping[str, str]) -> bool:
    """Whether the process that writes a trial's MLflow run, by the run's tags, was on this host and is gone.

    Runs of earlier versions have no `STARTED_TAG`: they are judged by the process id alone.
    """
    if tags.get("kind") != "trial":
        return False
    pid = tags.get("pid") or "0"
    owner, _, since_boot = tags.get(STARTED_TAG, "").partition("@")
    writer = {"host": tags.get("host"), "pid": int(pid), "since_boot": since_boot if owner == pid else None}
    return alive(writer) is False


def _since_boot(pid: int) -> str | None:
    """When a process started, as Linux counts it: the boot's id and clock ticks since; None elsewhere.

    Unlike psutil's start time, which is derived from the time of day, no change of the clock moves it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return f"{boot}:{stat.rpartition(')')[2].split()[19]}"  # the 22nd field; the second, in brackets, may hold spaces
