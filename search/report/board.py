"""The table of all trials, and which of them are told in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search import leaderboard, records
from search.diagnosis.noise import relative
from search.records import StudyRecord
from search.report.experiment import UNFINISHED, Experiment
from search.report.measured_noise import Noise
from search.report.told import surprise
from trainer.config import MACHINE_FIELDS

MOST_IN_FULL = 4
"""Most trials told in full beside those given by hand: a log is read to its end only if that is near."""
MOST_BY_HAND = 10
"""Most trials given by hand that are told in full."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """A trial in the table."""

    rank: int | None
    """Among the complete trials; None for others."""
    e: Experiment
    gap: float | None
    """How far its loss lies above the lowest on the same samples, a share; None where it does not compare."""
    level: bool
    """Whether that is within noise."""


@dataclass(frozen=True, kw_only=True)
class Board:
    """All trials, best first."""

    fields: tuple[str, ...]
    """Searched or varied fields of the configuration."""
    lines: tuple[Line, ...]
    common: Mapping[str, Any]
    """Fields of the hand-run log's configuration that are the same for all."""


def board(record: StudyRecord, experiments: Sequence[Experiment], best: Experiment | None, noise: Noise) -> Board:
    """The table, in the order of the leaderboard."""
    by_number = {e.number: e for e in experiments}
    lines = []
    for rank, trial in enumerate(leaderboard.ranked(record.trials), start=1):
        e, complete = by_number[trial.number], trial.state == "COMPLETE"
        gap = _gap(e, best)
        level = complete and gap is not None and gap <= noise.difference
        lines.append(Line(rank=rank if complete else None, e=e, gap=gap, level=level))
    varied = [name for name in leaderboard.columns(record.trials) if name not in MACHINE_FIELDS]
    configs = [e.record.config for e in experiments if e.record.config]
    common = {n: configs[0][n] for n in leaderboard.LOG_FIELDS if configs and n in configs[0] and n not in varied}
    return Board(fields=tuple(varied), lines=tuple(lines), common=common)


def _gap(e: Experiment, best: Experiment | None) -> float | None:
    if best is None or best.value is None or e.value is None or e.samples != best.samples or e.record.violated:
        return None
    return relative(e.value, best.value)


def in_full(experiments: Sequence[Experiment], chosen: Experiment | None, best: Experiment | None) -> tuple[int, ...]:
    """Numbers of the trials told in full: given by hand, the best, the first of each failure, the surprising."""
    ended = [e for e in experiments if e.record.state not in UNFINISHED]
    by_hand = [e.number for e in ended if e.label or e.note][:MOST_BY_HAND]
    failures: dict[object, int] = {}
    for e in ended:
        failed = e.record.state == "FAIL" or e.record.violated or e.mark == "bad"
        failed = failed or (e.leaf is not None and e.leaf.name == "not_falling")
        if failed and e.record.reason != records.LOST:
            main = e.main_finding
            failures.setdefault((main.id, main.cause) if main else e.record.reason, e.number)
    surprising = sorted((e for e in ended if surprise(e) > 0), key=lambda e: (-surprise(e), e.number))
    wanted = (
        [e.number for e in (chosen, best) if e is not None] + [*failures.values()] + [e.number for e in surprising]
    )
    others = [number for number in dict.fromkeys(wanted) if number not in by_hand]
    return tuple(sorted({*by_hand, *others[:MOST_IN_FULL]}))
