"""The facts of a run's machine and checkout."""

import os
import subprocess
import sys
from pathlib import Path

from search.tracking import environment as env


def test_facts_of_this_machine() -> None:
    facts = env.environment()
    assert facts["pid"] == str(os.getpid())
    assert facts["version.optuna"].startswith("5.")
    assert facts["cpu"] and facts["platform"]
    assert all(isinstance(value, str) and value for value in facts.values())


def test_the_commit_is_this_checkouts_or_none(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    ours = tmp_path / "search" / "tracking" / "environment.py"
    ours.parent.mkdir(parents=True)
    ours.write_text("x = 1\n")
    (tmp_path / "other").write_text("someone else's repository\n")
    git("add", "other")
    git("commit", "-q", "-m", "other")
    env.git.cache_clear()
    assert env.git(tmp_path) == {}, "this file is not that repository's"
    git("add", "search")
    git("commit", "-q", "-m", "ours")
    env.git.cache_clear()
    assert env.git(tmp_path) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": "false"}
    ours.write_text("x = 2\n")
    env.git.cache_clear()
    assert env.git(tmp_path)["git_dirty"] == "true"


def test_nothing_heavy_is_imported_for_the_facts() -> None:
    code = (
        "import sys; from search.tracking.environment import environment; environment(); "
        "print(sorted({'torch', 'mlflow', 'optuna', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
