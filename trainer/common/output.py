"""Standard output and standard error that may go away without ending what a command does.

A pipe's reader ends (`| head`), a terminal closes (ssh gone under nohup), the disk under a log file is full: from then
on every write would raise, in whatever a command happens to be doing, and hours of training would end for a line that
nobody reads. Here the first write that fails turns the stream over to /dev/null, and says so in the log.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any

log = logging.getLogger("trainer.common.output")


def keep_going() -> None:
    """Let this process outlive its output. To be called once, before anything is printed.

    Descriptors 0 to 2 that are closed (`>&-`) are opened on /dev/null: the next file would get the number, and be
    written into by whatever prints; of a SQLite database that would be the end.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number: this one
    for name in ("stdout", "stderr"):
        setattr(sys, name, _steady(getattr(sys, name), 1 if name == "stdout" else 2))


def _steady(stream: Any, descriptor: int) -> Any:
    """The stream over a `_Steady` file; unchanged if it is no file of the system's (a notebook's, a test's)."""
    if stream is None:  # its descriptor was closed when Python started
        return io.TextIOWrapper(io.BufferedWriter(_Steady(descriptor, "w", closefd=False)), encoding="utf-8")
    below = getattr(stream, "buffer", None)
    raw = getattr(below, "raw", below)  # with PYTHONUNBUFFERED the file itself
    if not isinstance(stream, io.TextIOWrapper) or not isinstance(raw, io.FileIO) or isinstance(raw, _Steady):
        return stream
    try:
        stream.flush()
    except OSError:
        log.debug("nobody reads descriptor %d", descriptor)
    steady = _Steady(raw.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        steady if below is raw else io.BufferedWriter(steady),
        encoding=stream.encoding,
        errors="backslashreplace",  # a character that the terminal's encoding lacks must not end it either
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


class _Steady(io.FileIO):
    """A file whose first failing write turns it over to /dev/null, for this process and those it starts."""

    def write(self, data: Any, /) -> int:
        """Write, or pretend to."""
        try:
            return super().write(data) or 0
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            log.warning("the output goes nowhere from now on: %s", error.strerror)
            return memoryview(data).nbytes
