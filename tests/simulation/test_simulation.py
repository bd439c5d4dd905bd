"""Schedules of faults keep every promise, and faults that were mended are found when they are put back."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from search import processes
from search.storage import lifecycle
from search.tracking.delivery import Delivery
from tests.simulation import world
from tests.simulation.__main__ import play
from tests.simulation.schedule import Simulation, Wrong

QUICK, ALL, AT_ONCE = 50, 1000, 50


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A database that is away is warned of thousands of times."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("seed", range(QUICK))
def test_a_schedule_keeps_every_promise(seed: int) -> None:
    assert play(seed) is None


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("first", range(QUICK, ALL, AT_ONCE))
def test_schedules_keep_every_promise(first: int) -> None:
    broken = {seed: problem for seed in range(first, min(ALL, first + AT_ONCE)) if (problem := play(seed)) is not None}
    assert not broken


def by_host_name(record: Any) -> bool | None:
    """As it once was decided who is alive: two containers of one name took each other's trials."""
    if not isinstance(record, dict) or record["host"] != processes.socket.gethostname():
        return None
    return processes.is_running(record["pid"])


def test_who_is_alive_by_the_host_s_name_alone_is_found(tmp_path: Path) -> None:
    with pytest.raises(Wrong, match="was taken from a live process"):
        Simulation(1, tmp_path / "runs", by_host_name).run()


def test_attempts_that_count_every_death_are_found(tmp_path: Path) -> None:
    with mock.patch.object(lifecycle, "_was_blamed", lambda _: True), pytest.raises(Wrong, match="not its fault"):
        Simulation(6, tmp_path / "runs").run()


def test_a_process_that_slept_and_drops_later_checkpoints_is_found(tmp_path: Path) -> None:
    def once(there: Any, epoch: int, best: int, *, final: bool) -> list[int]:
        before = [] if final else sorted(each for each in there if each < epoch)[-1:]
        return [each for each in there if each not in (epoch, best, *before)]

    with mock.patch.object(world, "superseded", once), pytest.raises(Wrong, match="no adapter of its best epoch"):
        Simulation(56, tmp_path / "runs").run()


def test_a_delivery_that_looks_for_no_earlier_run_is_found(tmp_path: Path) -> None:
    with mock.patch.object(Delivery, "_record", lambda *_: None), pytest.raises(Wrong, match="has 2 MLflow runs"):
        Simulation(16, tmp_path / "runs").run()
