"""The frame of all command lines: a user's mistake ends with exit code 2, an internal error with 1 and a traceback.

SIGTERM and SIGHUP (the terminal closes) end a command with 143 and 129, after it has tidied up; a search has handlers
of its own meanwhile. That its output goes away ends none.
"""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from trainer.common import output
from trainer.common.disk import no_room, out_of_room
from trainer.common.errors import UserError


def run(app: Callable[[], object], log_file: Callable[[], Path | None] = lambda: None) -> None:
    """Run a Typer app as a program.

    Args:
        app: the app; Typer itself ends with exit code 2 on wrong options.
        log_file: the file where the traceback of an internal error goes; None for standard error.
    """
    output.keep_going()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup has SIGHUP ignored, and so it stays
            signal.signal(number, _end)
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:  # the outermost place: reported and logged
        path = log_file()
        if out_of_room(error):
            print(f"error: {no_room(error, path.parent if path else 'it')}", file=sys.stderr)
            sys.exit(2)
        if path is None:
            traceback.print_exc()
        else:
            logging.getLogger("search").exception("ended by an internal error")
            print(f"Internal error: {type(error).__name__}: {error}\ntraceback in {path}", file=sys.stderr)
        sys.exit(1)


def _end(number: int, _frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
