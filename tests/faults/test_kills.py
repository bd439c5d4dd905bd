"""kill -9 at random moments: of a worker, of the supervisor, of both."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.faults.harness import Place, check_records, storm, write_study
from tests.search_process import Search

Start = Callable[[list[str]], Search]


def test_two_kills(tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any) -> None:
    place = Place(tmp_path / "runs")
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=2, num_epochs=30))
    storm(lambda: start(command), ["both", "worker"], random.Random(1), longest_s=8)
    check_records(place, bench, num_trials=2, num_epochs=30)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills_in_one_study(tiny_checkpoint: Path, tmp_path: Path, start: Start, bench: Any) -> None:
    rng = random.Random(0)
    place = Place(tmp_path / "runs")
    command = place.command(write_study(tmp_path, tiny_checkpoint, trials=12, num_epochs=60), workers=2)
    kills = rng.choices(["worker", "supervisor", "both"], weights=[5, 3, 2], k=50)
    done = storm(lambda: start(command), kills, rng, longest_s=6)
    print(dict(done))
    check_records(place, bench, num_trials=12, num_epochs=60)
