"""Output that goes away ends nothing, and no file is written into by mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TALKER = """
import logging, os, sys
from trainer.common import cli

def app():
    logging.basicConfig(filename=sys.argv[1], level=logging.INFO)
    data = open(sys.argv[1] + ".data", "w")
    assert data.fileno() > 2, "what is printed would go into it"
    for line in range(10_000):
        print("a line of some length, until the pipe is full:", line)
    print("the same", file=sys.stderr)
    sys.stdout.flush()
    os.write(1, b"below Python")
    data.write("written")
    sys.exit(7)

cli.run(app)
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ('"$@" | head -1 > /dev/null; exit ${PIPESTATUS[0]}', "Broken pipe"),
        ('"$@" > /dev/full 2>&1', "No space left on device"),
        ('"$@" >&- 2>&- <&-', ""),
        ('"$@" > /dev/null 2>&1', ""),
    ],
)
def test_a_command_does_what_it_was_asked_and_ends_as_it_would_have(
    tmp_path: Path, how: str, said: str, unbuffered: str
) -> None:
    log = tmp_path / "log"
    command = ["bash", "-c", how, "bash", sys.executable, "-c", TALKER, str(log)]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "log.data").read_text() == "written"
    assert said in log.read_text() and "Traceback" not in done.stderr


def test_nobody_reads_the_list_of_commands() -> None:
    """It was printed beside the frame of the other commands: `| head` ended it with a traceback."""
    code = "import sys; from search.terminal.commands import main; sys.argv = ['lora-search', '--help']; main()"
    how = '"$@" | true; exit ${PIPESTATUS[0]}'
    command = ["bash", "-c", how, "bash", sys.executable, "-c", f"import time; time.sleep(0.5); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
