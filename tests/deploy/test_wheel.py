"""The project as a wheel: whatever a study needs is in it."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.search_process import ROOT, environment

PACKAGES = ("search", "trainer", "studies")
SCRIPT = """
import sys, search
from search.terminal.commands import main
print(search.__file__, flush=True)
small = ["--trials", "2", "--slots", "2", "--set", "max_samples=24", "--set", "num_epochs=1", "--no-confirm"]
if __name__ == "__main__":
    for command, *options in (["run", *small], ["report", "--format", "html"]):
        sys.argv = ["lora-search", command, "--study", "rsicap_mini", *options]
        try:
            main()
        except SystemExit as end:
            assert not end.code, command
"""
"""As the console script, which Python starts with its own folder in front of `sys.path`; a search and its report at
once, since importing everything takes five seconds."""


@pytest.mark.long
def test_the_demo_from_a_wheel_in_an_empty_folder(tmp_path: Path) -> None:
    """Built from the tracked files alone, unpacked, and run where no checkout is, but a `trainer.py` of somebody's."""
    source = tmp_path / "source"
    source.mkdir()
    tracked = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "pyproject.toml", "README.md", "LICENSE", *PACKAGES],
        capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, tracked):
        if (ROOT / name).is_file():  # not yet committed as moved
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([*build, str(tmp_path), str(source)], check=True, capture_output=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
        assert (
            "lora-search = search.terminal.commands:main"
            in packed.read(next(name for name in packed.namelist() if name.endswith("entry_points.txt"))).decode()
        )

    script = tmp_path / "bin" / "lora-search"
    script.parent.mkdir()
    script.write_text(SCRIPT, encoding="utf-8")
    where = tmp_path / "where"
    where.mkdir()
    (where / "trainer.py").write_text("raise RuntimeError('not ours')\n")
    env = {**environment(), "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, script], cwd=where, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith(str(site)), "not the wheel's code"
    assert "2 trials (2 COMPLETE)" in done.stdout
    assert {path.suffix for path in (where / "runs" / "rsicap_mini").glob("tuning-log.*")} == {".md", ".html"}
    assert {path.name for path in where.iterdir()} == {"runs", "trainer.py"}
