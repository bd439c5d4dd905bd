"""New processes import our modules, whatever lies in the folder that they start in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from search.workers import pool
from trainer.common.imports import own_path

WHERE = "import trainer, search; print(trainer.__file__)"


@pytest.mark.parametrize("stranger", ["trainer.py", "trainer/__init__.py", "search/__init__.py"])
def test_a_stranger_in_the_current_folder_is_not_imported(tmp_path: Path, stranger: str) -> None:
    (tmp_path / stranger).parent.mkdir(exist_ok=True)
    (tmp_path / stranger).write_text("raise RuntimeError('not ours')\n", encoding="utf-8")
    beside = {"capture_output": True, "text": True, "cwd": tmp_path, "check": False}
    found = subprocess.run([sys.executable, "-c", WHERE], env={**os.environ, **own_path()}, **beside)
    assert Path(found.stdout.strip()).is_relative_to(Path(__file__).parents[3]), found.stderr
    without = subprocess.run([sys.executable, "-c", WHERE], **beside)
    assert "not ours" in without.stderr, "it would not have been found: the test says nothing"


def test_the_process_that_workers_are_forked_from_is_such_a_process() -> None:
    """Else it could not make their imports, and each would make its own: ten seconds later, without a word."""
    wanted = own_path()
    with pool._threads_of(1):
        assert wanted.items() <= os.environ.items()
    assert "PYTHONSAFEPATH" not in os.environ
