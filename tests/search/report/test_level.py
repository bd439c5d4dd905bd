"""Which trials of a range are as low as the best."""

from __future__ import annotations

from search.report.facts import gather
from search.report.level import level
from tests.support.report_data import study, trial


def test_as_low_is_what_differs_by_no_more_than_counts() -> None:
    losses = (1.0, 1.019, 1.021, 1.5)
    facts = gather(study([trial(n, [(1.9, 1.8), (1.1, loss)]) for n, loss in enumerate(losses)]))
    members = [(value, facts.experiment(n)) for n, value in enumerate((4, 16, 8, 32))]
    compared = [e for _, e in members]
    found = level(members, compared, compared[0], 0.02)
    assert found is not None
    assert (found.low, found.high, found.trials) == (4, 16, (0, 1))
    assert (found.behind, found.stopped) == ((2,), ()), "the one at 32 lies outside"
    assert level(members[2:], compared, compared[0], 0.02) is None and level(members, compared, None, 0.02) is None
