"""The same with twenty times the examples or more, others each time; a failure prints the example to be kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.search_process import ROOT, environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_with_many_more_examples() -> None:
    if os.environ.get("BAD_INPUT_DEEP"):
        pytest.skip("this is what it runs")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "tests/bad_input"]
    deselected = ("--deselect", "tests/bad_input/test_processes.py")
    done = subprocess.run(
        [*command, *deselected],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**environment(), "BAD_INPUT_DEEP": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:]
