"""Files that were damaged, and a runs folder that was moved, between one start of a study and the next."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import NAME, Place, check_records, write_study
from tests.support.search_process import Search, run

Start = Callable[[list[str]], Search]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [("adapter/adapter_model.safetensors", flip), ("optimizer.safetensors", cut), ("state.json", cut)],
)
def test_a_damaged_checkpoint_and_a_moved_folder(
    name: str,
    damage: Callable[[Path], None],
    tiny_checkpoint: Path,
    tmp_path: Path,
    start: Start,
    bench: Any,
) -> None:
    """The run goes back to the checkpoint before, and says so; where the folder lies does not matter."""
    file = write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=60)
    place = Place(tmp_path / "runs")
    search = start(place.command(file))
    search.wait_for("trial 0: epoch 3:")
    os.killpg(search.process.pid, signal.SIGINT)
    assert search.end() == 130
    reported = len(place.reports[0])
    moved = Place(tmp_path / "elsewhere")
    place.runs.rename(moved.runs)
    checkpoints = sorted((moved.runs / NAME / "trials" / "0000" / "checkpoints").iterdir())
    assert checkpoints[-1].name == f"epoch-{reported:04d}"
    damage(checkpoints[-1] / name)
    done = run(moved.command(file))
    assert done.returncode == 0, done.stdout + done.stderr
    before = int(checkpoints[-2].name[-4:]) if len(checkpoints) > 1 else 0
    assert f"trial 0 resumes after epoch {before}: " in done.stdout
    assert str(checkpoints[-1].relative_to(moved.runs)) in done.stdout
    assert not place.runs.exists(), "something was written to the old place"
    check_records(moved, bench, num_trials=1, num_epochs=60)


@pytest.mark.slow
def test_a_damaged_feature_store_is_mended(
    tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_SEARCH_CACHE", str(tmp_path / "cache"))
    file = write_study(tmp_path, tiny_checkpoint, trials=1, num_epochs=3)
    assert run(Place(tmp_path / "one").command(file)).returncode == 0
    (rows,) = (tmp_path / "cache" / "features").rglob("segment-*.bin")
    flip(rows)
    second = Place(tmp_path / "two")
    assert run(second.command(file)).returncode == 0
    log = (second.runs / NAME / "search.log").read_text()
    assert "1 damaged rows; their vision features are computed again" in log
    assert second.reports == Place(tmp_path / "one").reports
    check_records(second, bench, num_trials=1, num_epochs=3)
