"""Calling a command line in this process, which has the libraries loaded, as its program does.

What a user sees is kept: the exit code and the two streams.
"""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from trainer.common import cli

MOST_CHARACTERS = 20_000
"""A message longer than this is no message."""


class Started(BaseException):
    """The input was accepted: from here on, workers would train."""


@dataclass(frozen=True)
class Outcome:
    """What a program left behind."""

    code: int
    out: str
    err: str
    started: bool
    """Whether workers would have got a job."""

    @property
    def accepted(self) -> bool:
        return self.code == 0

    def check_refused(self, *shown: str) -> None:
        """Exit code 2, one message without a traceback, which holds these texts."""
        assert self.code == 2, f"exit code {self.code}\n{self.out}\n{self.err}"
        assert not self.started
        assert "Traceback" not in self.err and "Internal error" not in self.err, self.err
        assert self.err.strip(), "no message"
        assert len(self.err) < MOST_CHARACTERS, f"a message of {len(self.err)} characters"
        said = " ".join(self.err.split())
        for text in shown:
            assert " ".join(text.split()) in said, f"{text!r} is not in {said}"

    def check(self, *shown: str) -> None:
        """Accepted, or refused as it should be."""
        if not self.accepted:
            self.check_refused(*shown)


def call(app: Callable[[], object], arguments: Sequence[str], log_file: Any = lambda: None) -> Outcome:
    """The program of this app on these arguments."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace")]
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level
    started = False
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *arguments])
        patch.setattr(sys, "stdout", streams[0])
        patch.setattr(sys, "stderr", streams[1])
        try:
            cli.run(app, log_file)
            code = 0
        except Started:
            code, started = 0, True
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        finally:
            _restore_logging(handlers, level)
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8"))  # type: ignore[attr-defined]
    return Outcome(code, *texts, started)


def _restore_logging(handlers: list[logging.Handler], level: int) -> None:
    root = logging.getLogger()
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
