"""Trials that pause and go on, in a real worker: nothing is trained twice, and the same seed gives the same study."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from search import pruning, records
from search.planning.plan import Plan, is_paused
from search.planning.rungs import RungPlan
from search.records import TrialRecord
from search.sampling import make
from search.workers import trial as trial_module
from search.workers.captioning import Captioning
from search.workers.protocol import Order, TrialStarted
from tests.search.workers.conftest import RecordingLink, Search


@pytest.fixture
def rungs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's pruner pauses after epochs 1 and 2, and one in two goes on; the leader to its end."""

    class Pausing(RungPlan):
        def __init__(self, num_epochs: int) -> None:
            super().__init__(num_epochs, first=1, one_of=2, leaders=1)

    kind = pruning.Kind("pauses", plan=lambda study, _prior, _proposes: Pausing(study.base_config().num_epochs))
    monkeypatch.setitem(pruning.PRUNERS, "none", kind)  # the one that the fixture names


def losses(trials: Sequence[TrialRecord], storage: Any = None) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.value, tuple(sorted(t.params.items()))) for t in trials]


def test_paused_trials_go_on_or_are_given_up(rungs: None, search: Search) -> None:
    trials, heard = search(trials=4, slots=1, num_epochs=4)
    assert {t.state for t in trials} <= {"COMPLETE", "PRUNED"}
    given_up = [t for t in trials if records.GIVEN_UP in t.attrs]
    complete = [t for t in trials if t.state == "COMPLETE"]
    assert given_up and complete
    # Some trial was begun, paused and taken up again, and said where it goes on.
    resumed = [m for m in heard if isinstance(m, TrialStarted) and m.resumed_from_epoch]
    assert any(records.PAUSED_AT in t.attrs and t.state == "COMPLETE" for t in trials)
    assert resumed
    assert all(t.attrs[records.REASON] in (records.SUPERSEDED, records.SETTLED) for t in given_up)
    # Optuna's best is the lowest of all.
    assert min(t.value for t in complete if t.value) == min(t.value for t in trials if t.value)


@pytest.mark.parametrize("apart", [-1.0, 1e9], ids=["all are behind", "none is"])
def test_who_may_be_the_winner_is_captioned(
    rungs: None, search: Search, monkeypatch: pytest.MonkeyPatch, apart: float
) -> None:
    """A paused trial that is given up near the best as well: the verdict may name it."""
    asked: list[Path] = []
    monkeypatch.setattr(Captioning, "of", lambda self, config, adapter, trained_s: asked.append(adapter))
    monkeypatch.setattr(trial_module, "APART", apart)
    trials, _ = search(trials=4, slots=1, num_epochs=4, captions=1)
    may_win = [t for t in trials if t.state == "COMPLETE" or apart > 0]
    assert {str(path.parents[2].relative_to(path.parents[4])) for path in asked} == {
        t.attrs["folder"] for t in may_win
    }
    assert len(may_win) < len(trials) or apart > 0


@pytest.mark.long
def test_a_trial_that_paused_reaches_what_one_that_did_not_reaches(
    rungs: None, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused, _ = search(trials=3, slots=1, num_epochs=4)
    monkeypatch.setitem(pruning.PRUNERS, "none", pruning.Kind("train all epochs", rising=False))
    whole, _ = search(trials=3, slots=1, num_epochs=4, where="whole")
    by_params = {tuple(sorted(t.params.items())): t.value for t in whole}
    done = [t for t in paused if t.state == "COMPLETE" and records.PAUSED_AT in t.attrs]
    assert done
    for trial in done:
        assert trial.value == by_params[tuple(sorted(trial.params.items()))]


@pytest.mark.long
def test_the_same_seed_gives_the_same_study_interrupted_between_pauses_or_not(
    rungs: None, search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = search(trials=4, slots=1, num_epochs=3, where="whole")

    # Ctrl-C after the fifth epoch; the same study once more.
    order = RecordingLink.order

    def interrupted(self: RecordingLink) -> Order:
        found: Order = order(self)
        return Order.END_AFTER_EPOCH if sum(map(_is_epoch, self.heard)) >= 5 else found

    monkeypatch.setattr(RecordingLink, "order", interrupted)
    cut, _ = search(trials=4, slots=1, num_epochs=3, where="cut")
    assert any(t.state == "WAITING" for t in cut)
    monkeypatch.setattr(RecordingLink, "order", order)
    again, _ = search(trials=4, slots=1, num_epochs=3, where="cut")
    assert losses(again) == losses(whole)


@pytest.mark.parametrize("strategy", ["freeze-thaw", "joint"])
def test_a_budget_of_epochs_is_kept_to(search: Search, monkeypatch: pytest.MonkeyPatch, strategy: str) -> None:
    """A plan pauses what runs once so many epochs are trained; by other rules none begins that would take more."""
    monkeypatch.setattr(Captioning, "of", lambda self, config, adapter, trained_s: None)
    pruner = pruning.default_pruner(strategy)
    trials, _ = search(trials=20, epochs=7, slots=2, num_epochs=3, strategy=strategy, pruner=pruner)
    spent = sum(len(t.attrs[records.TRAIN_LOSSES]) for t in trials)
    given_up = [t for t in trials if t.reason in (records.SUPERSEDED, records.SETTLED)]
    assert {t.detail for t in given_up} == {"all 7 epochs of the search are trained"} or strategy == "joint"
    assert spent in {"freeze-thaw": (7, 7 + 1), "joint": (6,)}[strategy]
    assert {t.state for t in trials} <= {"COMPLETE", "PRUNED"}
    best = min((t for t in trials if t.state == "COMPLETE"), key=lambda t: t.value or math.inf)
    assert best.value == min(value for t in trials if (value := t.value) is not None)
    again, _ = search(trials=20, epochs=7, slots=2, num_epochs=3, strategy=strategy, pruner=pruner)
    assert len(again) == len(trials)  # nothing is left to do


def _is_epoch(message: Any) -> bool:
    from tests.search.workers.conftest import is_epoch

    return is_epoch(message) and not message.from_checkpoint


def test_the_default_of_a_study_pauses_at_rungs() -> None:
    from studies.lora_grid_mini import STUDY as GRID
    from studies.rsicap_mini import STUDY

    assert make.default_strategy(STUDY) == make.RUNGS
    assert pruning.default_pruner(make.RUNGS) == "rungs"
    assert pruning.default_pruner(make.FREEZE_THAW) == "freeze-thaw"
    assert (make.default_strategy(GRID), pruning.default_pruner("joint")) == ("joint", "rising")
    plan: Plan | None = pruning.plan_of(pruning.pruner_for("freeze-thaw", STUDY, proposes=True))
    assert plan is not None


def test_only_trials_that_a_plan_paused_count_as_paused() -> None:
    from optuna.trial import TrialState, create_trial

    def waiting(reason: str) -> FrozenTrial:
        return create_trial(
            state=TrialState.WAITING, user_attrs={records.REASON: reason}, intermediate_values={1: 0.5}
        )

    assert is_paused(waiting(records.PAUSED))
    assert not is_paused(waiting(records.INTERRUPTED))
