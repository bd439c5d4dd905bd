"""What the facts of a log cost as a study grows: in calls, which no busy machine changes."""

import cProfile
import pstats

from search.report.facts import gather
from tests.support.report_data import many

FEW, MANY = 40, 160


def calls(trials: int) -> int:
    """Function calls that gathering the facts of so many trials takes."""
    record = many(trials)
    with cProfile.Profile() as profile:
        gather(record)
    return int(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]


def test_many_trials_cost_no_more_each_than_few() -> None:
    """2,000 trials took minutes: each was compared with all before it, and each importance copied them all."""
    gather(many(FEW))  # imports
    few, lots = calls(FEW), calls(MANY)
    assert lots / MANY <= few / FEW, "the cost of a trial grows with the study"
    assert lots / MANY < 15_000, "8,000 when it was written; 27,000 where every resample copied all trials"
