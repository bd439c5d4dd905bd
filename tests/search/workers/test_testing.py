"""The test loss of a verdict's candidates, read by the last worker of a study."""

from __future__ import annotations

from pathlib import Path

import pytest

from search import leaderboard
from search.evaluation import rows
from search.storage.database import close_storage, open_storage
from search.verdict.leaders import Rules, judge
from search.verdict.race import Verdict
from search.verdict.tested import ATTRIBUTE, NOTHING, TestLosses, is_due
from search.workers import testing
from search.workers.protocol import Notice
from tests.search.workers.conftest import Search
from trainer.common.errors import DataError

RULES = Rules(top=2, seeds=2)
NONE_NAMED = Verdict(kind="undecided", choice=None)


def read(runs: Path, verdict: Verdict = NONE_NAMED) -> TestLosses | None:
    """What the study has."""
    import optuna

    storage = open_storage(f"sqlite:///{runs / 'optuna.db'}")
    try:
        return TestLosses.of(optuna.load_study(study_name="work", storage=storage).user_attrs, verdict)
    finally:
        close_storage(storage)


@pytest.mark.long
def test_the_candidates_are_judged_once_by_rows_that_none_has_seen(
    search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[frozenset[Path]] = []
    original = testing.loss_sums
    monkeypatch.setattr(
        testing, "loss_sums", lambda *a: (seen.append(frozenset(row.image for row in a[3])), original(*a))[1]
    )
    trials, _ = search(trials=3, slots=4, confirm=RULES, test_images=20)
    found = read(tmp_path / "runs")
    verdict = judge(trials, RULES)
    assert found is not None and (found.rows, found.images) == ("unused", 20)
    assert found.read_s is not None and found.read_s >= max(trial.end_s or 0.0 for trial in trials)
    assert {each.trial for each in found.losses} == {standing.number for standing in verdict.standings}
    assert found.losses[0].trial == (verdict.choice if verdict.choice is not None else found.losses[0].trial)
    by_number = {trial.number: trial for trial in trials}
    for each in found.losses:
        assert each.low < each.loss < each.high and each.epoch == by_number[each.trial].best_epoch
        assert (each.above is None) == (each is found.losses[0])
    assert len(seen) == 2 and seen[0] == seen[1]
    again, _ = search(trials=3, slots=4, confirm=RULES, test_images=20)
    assert len(seen) == 2, "it was read again"
    assert len(again) == len(trials)


@pytest.mark.parametrize(("confirm", "test_images"), [(None, 20), (RULES, 0)])
def test_it_is_not_read_unasked(search: Search, tmp_path: Path, confirm: Rules | None, test_images: int) -> None:
    search(trials=2, slots=4, confirm=confirm, test_images=test_images, max_samples=8)
    assert read(tmp_path / "runs") is None


def test_where_no_rows_are_left_there_is_none(search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "FEWEST", 10_000)
    trials, heard = search(trials=2, slots=4, confirm=RULES, test_images=20, max_samples=8)
    assert read(tmp_path / "runs") is None and not is_due({ATTRIBUTE: NOTHING}, judge(trials, RULES))
    assert not [m for m in heard if isinstance(m, Notice) and "test loss" in m.text]


def test_what_goes_wrong_costs_no_trial(search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise DataError("image 7.png went bad")

    monkeypatch.setattr(testing, "loss_sums", broken)
    trials, heard = search(trials=2, slots=4, confirm=RULES, test_images=20, max_samples=8)
    assert {t.state for t in leaderboard.searched(trials)} == {"COMPLETE"}
    assert [m.text for m in heard if isinstance(m, Notice) and "test" in m.text] == [
        "no test losses: image 7.png went bad"
    ]
    assert read(tmp_path / "runs") is None


WRONG = {
    "rows": "test",
    "images": 3,
    "scenes": True,
    "fingerprint": "f",
    "losses": [{"trial": 1, "epoch": 1, "loss": "low", "low": 0, "high": 1, "above": None}],
}


def test_what_another_program_wrote_there_is_left_out() -> None:
    for value in (7, "x", {}, {"losses": []}, WRONG):
        assert TestLosses.of({ATTRIBUTE: value}, NONE_NAMED) is None
