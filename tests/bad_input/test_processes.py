"""The same through real processes: what only they show, from the shell's bytes to a worker that finds a mistake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.search_process import ROOT, environment


def run(*arguments: str | bytes, **variables: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "search.run", *arguments]
    return subprocess.run(
        command, capture_output=True, cwd=ROOT, env={**environment(), **variables}, timeout=120, check=False
    )


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    done = run("--study", "rsicap_mini", "--runs-dir", str(tmp_path / "runs"), "--set", b"data=/\xff\xfe")
    assert done.returncode == 2 and b"Traceback" not in done.stderr
    assert b"\\udcff" in done.stderr and not (tmp_path / "runs").exists()


def test_a_terminal_without_the_letters(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    text = "from search.study import *\nfrom search.space import *\n"
    text += "STUDY = Study(name='mine', description='汉字', space={'lora_r': Int(2, 8)}, n_trials=1)\n"
    file.write_text(text, encoding="utf-8")
    done = run("--study", str(file), "--dry-run", "--no-measure", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert b"\\u6c49" in done.stdout


def test_a_study_file_that_ends_the_program(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import os\nraise SystemExit(0)\n")
    # However the machine of the tests is set up: compiled code is not to lie beside a study file.
    done = run("--study", str(file), "--runs-dir", str(tmp_path / "runs"), PYTHONDONTWRITEBYTECODE="")
    assert done.returncode == 2 and b"line 2: SystemExit: 0" in done.stderr
    assert os.listdir(tmp_path) == ["mine.py"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setting", "said"),
    [("target_modules=querry", "did you mean 'query'?"), ("device=cuda:99", "device")],
)
def test_what_only_the_model_or_the_machine_shows_leaves_nothing_behind(
    tmp_path: Path, setting: str, said: str
) -> None:
    runs = tmp_path / "runs"
    arguments = ("--study", "rsicap_mini", "--runs-dir", str(runs), "--slots", "1", "--set", "max_samples=24")
    done = run(*arguments, "--set", setting)
    assert done.returncode == 2, done.stdout + done.stderr
    assert b"Traceback" not in done.stdout + done.stderr
    assert said in (done.stdout + done.stderr).decode()
    assert not runs.exists()
