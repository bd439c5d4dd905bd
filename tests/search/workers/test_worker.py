"""One worker's loop over a pack: who is blamed for a fault, who goes on, how many train at once."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from search import records
from search.errors import DatabaseAway, DefinitionChanged
from search.storage import lifecycle
from search.study import Study
from search.study_file import load
from search.workers import slots
from search.workers.protocol import (
    Message,
    Notice,
    Order,
    SlotsChosen,
    TrialEnded,
    TrialStarted,
)
from search.workers.slots import Room, Slots
from search.workers.trial import TrialRun
from search.workers.worker import GaveUp
from tests.search.workers.conftest import RecordingLink, Search, is_epoch
from trainer import loop, member, passes, runtime
from trainer.common.disk import NoRoom
from trainer.common.errors import DataError
from trainer.events import EpochEnded, StepEnded
from trainer.model.base import Forward, forward
from trainer.model.batch import Batch
from trainer.workbench import Workbench


def most_at_once(heard: list[Message]) -> int:
    """The largest number of trials that had started and not ended."""
    running, most = 0, 0
    for message in heard:
        running += isinstance(message, TrialStarted)
        running -= isinstance(message, TrialEnded)
        most = max(most, running)
    return most


def test_a_worker_asks_for_no_first_trial_of_another_definition(search: Search) -> None:
    trials, _ = search(trials=2, fails=DefinitionChanged, redefined=True)
    assert trials == ()


@pytest.mark.parametrize(("wanted", "at_once"), [(1, 1), (None, 4)])
def test_as_many_train_at_once_as_there_are_slots(search: Search, wanted: int | None, at_once: int) -> None:
    trials, heard = search(trials=5 if wanted else 4, slots=wanted)
    assert [t.state for t in trials] == ["COMPLETE"] * len(trials)
    assert most_at_once(heard) == at_once
    assert [m.auto for m in heard if isinstance(m, SlotsChosen)] == [wanted is None]


def test_the_same_seed_and_slots_give_the_same_study(search: Search) -> None:
    first, heard = search(trials=5, slots=3)
    again, _ = search(trials=5, slots=3, where="again")
    assert [t.state for t in first] == ["COMPLETE"] * 5
    assert most_at_once(heard) == 3
    assert [m.auto for m in heard if isinstance(m, SlotsChosen)] == [False]
    assert [(t.params, t.value) for t in again] == [(t.params, t.value) for t in first]


def test_a_fault_of_the_shared_pass_lets_the_trials_go_on_one_by_one(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crowded(model: Any, batch: Batch) -> Forward:
        if torch.is_grad_enabled() and len(batch) > 4:
            raise RuntimeError("too much at once")
        return forward(model, batch)

    monkeypatch.setattr("search.workers.worker.Pack", partial(loop.Pack, forward=crowded))
    trials, heard = search(trials=3, slots=3)
    assert [t.state for t in trials] == ["COMPLETE"] * 3
    assert "too much at once; 3 trials resume one by one" in next(m.text for m in heard if isinstance(m, Notice))


@pytest.mark.parametrize("away", [False, True])
def test_a_fault_of_the_shared_pass_ends_no_search_if_one_of_its_trials_is_anothers(
    search: Search, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """Parking the first of three says that it was taken over; with `away` the database goes at the second."""
    opened: list[Any] = []
    parked: list[int] = []
    abandoned: list[tuple[int, str]] = []
    park, abandon, prepare = lifecycle.park, TrialRun.abandon, TrialRun._prepare

    def crowded(model: Any, batch: Batch) -> Forward:
        if torch.is_grad_enabled() and len(batch) > 4:
            lifecycle.requeue_lost(opened[0], is_alive=lambda worker: worker["trial"] != 0)
            raise RuntimeError("too much at once")
        return forward(model, batch)

    def goes_away(study: Any, trial: Any, *reason: str) -> None:
        park(study, trial, *reason)
        parked.append(trial.number)
        if away:
            raise DatabaseAway("gone")

    def noted(self: TrialRun, reason: str) -> None:
        abandoned.append((self.trial.number, reason))
        abandon(self, reason)

    def owned(self: TrialRun) -> Path:
        self.trial.set_user_attr(records.WORKER, {**self.trial.user_attrs[records.WORKER], "trial": self.trial.number})
        return prepare(self)

    monkeypatch.setattr(TrialRun, "_prepare", owned)
    monkeypatch.setattr(TrialRun, "abandon", noted)
    monkeypatch.setattr(lifecycle, "park", goes_away)
    monkeypatch.setattr("search.workers.worker.Pack", partial(loop.Pack, forward=crowded))
    trials, heard = search(trials=3, slots=3, prepare=opened.append, fails=DatabaseAway if away else None)
    said = [m.text for m in heard if isinstance(m, Notice)]
    assert said[1:] == ["trial 0 was taken over by another process, and is left to it"]
    assert (trials[0].state, trials[0].reason) == ("FAIL", records.LOST)
    if away:
        assert parked == [1]
        assert abandoned == [(0, records.LOST), (2, records.INTERRUPTED), (1, records.INTERRUPTED)]
    else:
        assert [t.state for t in trials[1:]] == ["COMPLETE"] * 3 and abandoned == [(0, records.LOST)]


def test_a_trial_of_its_own_fault_fails_alone(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    original = member.Member.next_group

    def broken(self: member.Member) -> Any:
        if self.out_dir.name == "0001" and self.next_step == 3:
            raise DataError("images/x.png: the image is truncated")
        return original(self)

    monkeypatch.setattr(member.Member, "next_group", broken)
    trials, heard = search(trials=4, slots=3)
    assert [t.state for t in trials] == ["COMPLETE", "FAIL", "COMPLETE", "COMPLETE"]
    assert trials[1].detail == "images/x.png: the image is truncated"
    assert [m.text for m in heard if isinstance(m, Notice)] == ["trial 1 failed: images/x.png: the image is truncated"]
    assert sorted((m.number, m.state) for m in heard if isinstance(m, TrialEnded)) == [
        (0, "COMPLETE"),
        (1, "FAIL"),
        (2, "COMPLETE"),
        (3, "COMPLETE"),
    ]


def test_a_full_disk_at_a_checkpoint_fails_no_trial(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loop.Member.epoch_ended

    def full(self: member.Member, val_loss: float, eval_s: float) -> Any:
        if self.out_dir.name == "0000":
            raise OSError(28, "No space left on device")
        return original(self, val_loss, eval_s)

    monkeypatch.setattr(member.Member, "epoch_ended", full)
    trials, _ = search(trials=2, slots=2, fails=NoRoom)
    assert [t.state for t in trials] == ["WAITING", "WAITING"]


@pytest.mark.long
def test_a_trial_too_large_for_memory_violates_a_constraint_and_its_neighbours_go_on(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, _ = search(trials=3, slots=3, where="alone")
    original = passes.Passes._pass

    def hungry(self: passes.Passes, work: Any) -> Any:
        self.passing = [member for member, _, _ in work]
        if any(member.out_dir.name == "0001" for member in self.passing):
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return original(self, work)

    monkeypatch.setattr(passes.Passes, "_pass", hungry)
    trials, _ = search(trials=3, slots=3)
    assert [t.state for t in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert trials[1].reason == records.OUT_OF_MEMORY and trials[1].violated == (records.OUT_OF_MEMORY,)
    assert trials[1].detail == "step 1: tried to allocate 20.00 GiB"
    for mine, theirs in zip(trials[::2], alone[::2], strict=True):
        assert mine.value == pytest.approx(theirs.value, rel=1e-5)


def test_a_trial_that_another_host_has_taken_over_is_let_go(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """This host slept, was taken for lost, and woke up: it must not touch what is another's now."""
    original = TrialRun.take

    def woken(self: TrialRun, event: Any) -> Any:
        if self.trial.number == 0 and isinstance(event, EpochEnded) and event.epoch == 1:
            lost = lifecycle.requeue_lost(self.study, is_alive=lambda worker: False)
            assert 0 in [each.number for each in lost]
        return original(self, event)

    monkeypatch.setattr(TrialRun, "take", woken)
    trials, heard = search(trials=1, slots=1)
    assert [(t.state, t.reason) for t in trials] == [("FAIL", records.LOST), ("COMPLETE", records.FINISHED)]
    assert "was taken over by another process" in next(m.text for m in heard if isinstance(m, Notice))
    ends = [(m.number, m.state, m.reason) for m in heard if isinstance(m, TrialEnded)]
    assert ends == [(0, "FAIL", records.LOST), (1, "COMPLETE", records.FINISHED)]
    assert len(trials[1].attrs["train_losses"]) == 2


def test_a_trial_that_is_taken_over_in_its_last_moment_ends_no_worker(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its last attribute and its end: Optuna cannot tell a FAIL trial, which is no fault of the trial."""
    original = TrialRun._annotate

    def late(self: TrialRun, outcome: Any, epochs: Any) -> None:
        original(self, outcome, epochs)
        if self.trial.number == 0:
            lifecycle.requeue_lost(self.study, is_alive=lambda worker: False)

    monkeypatch.setattr(TrialRun, "_annotate", late)
    trials, heard = search(trials=2, slots=1)
    assert [(t.state, t.reason) for t in trials if t.number == 0] == [("FAIL", records.LOST)]
    assert [t.state for t in trials if t.number] == ["COMPLETE", "COMPLETE"]
    assert [m.text for m in heard if isinstance(m, Notice)] == [
        "trial 0 was taken over by another process, and is left to it"
    ]


@pytest.mark.timeout(60)
def test_a_trial_that_another_finishes_between_its_history_and_its_checkpoint_is_let_go(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left of it to train, so it leaves the pack without an event; the worker waited for one for ever."""
    original = loop.Pack.add
    opened: list[Any] = []
    slept: list[EpochEnded] = []

    def woken(self: loop.Pack, config: Any, folder: Path) -> Any:
        monkeypatch.setattr(loop.Pack, "add", original)
        lifecycle.requeue_lost(opened[0], is_alive=lambda worker: False)
        slept.extend(event for event in loop.train(config, self.bench, folder) if isinstance(event, EpochEnded))
        return original(self, config, folder)

    monkeypatch.setattr(loop.Pack, "add", woken)
    trials, _ = search(trials=1, slots=1, prepare=opened.append)
    assert len(slept) == 2
    assert [(t.state, t.reason) for t in trials] == [("FAIL", records.LOST), ("COMPLETE", records.FINISHED)]
    assert len(trials[1].attrs["train_losses"]) == 2


def test_the_heartbeat_tells_that_a_trial_was_taken_over(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before an epoch ends, whose checkpoint would be written beside the other's."""
    original = TrialRun.take
    saved: list[int] = []

    def woken(self: TrialRun, event: Any) -> Any:
        if self.trial.number == 0 and isinstance(event, StepEnded) and event.step == 1:
            lifecycle.requeue_lost(self.study, is_alive=lambda worker: False)
            self.taken_over = not lifecycle.heartbeat(self.study, self.trial)
        if self.trial.number == 0 and isinstance(event, EpochEnded):
            saved.append(event.epoch)
        return original(self, event)

    monkeypatch.setattr(TrialRun, "take", woken)
    trials, _ = search(trials=1, slots=1)
    assert [t.state for t in trials] == ["FAIL", "COMPLETE"] and not saved


def test_trials_of_a_worker_that_died_are_run_one_by_one_at_first(search: Search) -> None:
    trials, heard = search(trials=4, slots=4, one_by_one=2)
    assert [t.state for t in trials] == ["COMPLETE"] * 4
    ends = [m.number for m in heard if isinstance(m, TrialEnded)]
    starts = [m.number for m in heard if isinstance(m, TrialStarted)]
    first_four = [type(m) for m in heard if isinstance(m, TrialStarted | TrialEnded)][:4]
    assert first_four == [TrialStarted, TrialEnded] * 2
    assert starts[:2] == ends[:2] == [0, 1]
    assert most_at_once(heard) == 2


def test_three_failures_in_a_row_end_the_worker_and_park_the_rest(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = member.Member.next_group

    def broken(self: member.Member) -> Any:
        if self.out_dir.name != "0000":
            raise DataError("gone")
        return original(self)

    monkeypatch.setattr(member.Member, "next_group", broken)
    trials, _ = search(trials=9, slots=4, fails=GaveUp)
    assert [t.state for t in trials].count("FAIL") == 3
    assert trials[0].state == "WAITING"
    assert not any(t.state == "RUNNING" for t in trials)


def test_trials_of_different_kinds_take_turns(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in float16 cannot train beside those in float32: it waits until they have ended."""
    original = Study.config

    def mixed(self: Study, params: Any, overrides: Any = None) -> Any:
        config = original(self, params, overrides)
        return config.model_copy(update={"cache_features": params["lora_r"] % 2 == 0})

    monkeypatch.setattr(Study, "config", mixed)
    trials, _ = search(trials=6, slots=3)
    assert len({t.params["lora_r"] % 2 for t in trials}) == 2
    assert [t.state for t in trials] == ["COMPLETE"] * 6


def test_one_that_waits_for_its_turn_is_parked_when_the_worker_is_to_end(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Study.config

    def mixed(self: Study, params: Any, overrides: Any = None) -> Any:
        config = original(self, params, overrides)
        return config.model_copy(update={"cache_features": not heard_of_steps})

    heard_of_steps: list[Message] = []
    original_send = RecordingLink.send

    def send(self: RecordingLink, message: Message) -> None:
        original_send(self, message)
        if isinstance(message, TrialStarted):  # the next trial is of another kind
            heard_of_steps.append(message)

    monkeypatch.setattr(Study, "config", mixed)
    monkeypatch.setattr(RecordingLink, "send", send)
    monkeypatch.setattr(
        RecordingLink,
        "order",
        lambda self: Order.END_AFTER_EPOCH if any(map(is_epoch, self.heard)) else Order.GO_ON,
    )
    trials, _ = search(trials=3, slots=2)
    assert [t.state for t in trials] == ["WAITING", "WAITING"]
    assert len(trials[0].attrs["train_losses"]) == 1 and "train_losses" not in trials[1].attrs


def test_room() -> None:
    assert Slots(3).room([16, 16]) and not Slots(3).room([1, 1, 1])
    few = Slots(16, samples=20)
    assert few.room([]) and few.room([16]) and few.room([2] * 9) and not few.room([16, 4])
    assert not few.room([1] * 16)


def test_room_for_one_at_a_time_until_those_to_blame_have_ended() -> None:
    room = Room(Slots(3), one_by_one=2)
    assert room.beside([]) and not room.beside([4])
    room.one_ended()
    assert not room.beside([4])
    room.one_ended()
    room.one_ended()
    assert room.beside([4, 4]) and not room.beside([4, 4, 4])


def test_auto_fills_a_pass_of_the_embedded_model_and_leaves_a_wide_one_alone(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load("rsicap_mini")
    chosen = slots.resolve(None, study, bench)
    assert 2 <= chosen.most <= slots.MOST and 8 < chosen.samples < 64
    assert slots.resolve(None, study, bench) == chosen
    monkeypatch.setattr(runtime, "free_memory", lambda device: 0)
    assert slots.resolve(None, study, bench).most == 1
    monkeypatch.setattr(slots, "BUSY_CPU", slots.BUSY_CPU / (768 / 128) ** 2)  # as for a model six times as wide
    assert slots.resolve(None, study, bench) == Slots(1)
    assert slots.resolve(5, study, bench) == Slots(5, math.inf)


def test_half_of_the_trials_are_handed_over_and_lose_nothing(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("search.workers.hand_over.WORTH_MOVING_S", 0.0)
    alone, _ = search(trials=4, num_epochs=3, where="alone")
    trials, heard = search(trials=4, num_epochs=3, where="shared", share_after=1)
    handed = [m.number for m in heard if isinstance(m, TrialEnded) and m.state == "WAITING"]
    assert len(handed) == 2
    # Here the worker itself takes them up again, once another trial of its own has ended.
    ended = [m.number for m in heard if isinstance(m, TrialEnded) and m.state == "COMPLETE"]
    assert sorted(ended) == [0, 1, 2, 3] and set(ended[:2]).isdisjoint(handed)
    for mine, theirs in zip(trials, alone, strict=True):
        assert mine.state == "COMPLETE" and len(mine.attrs["train_losses"]) == 3
        assert mine.value == pytest.approx(theirs.value, rel=1e-5)
        assert mine.attrs["train_losses"] == pytest.approx(theirs.attrs["train_losses"], rel=1e-5)


def test_a_trial_that_is_nearly_done_is_not_handed_over(search: Search) -> None:
    trials, heard = search(trials=2, share_after=1)
    assert [t.state for t in trials] == ["COMPLETE"] * 2
    assert all(m.state == "COMPLETE" for m in heard if isinstance(m, TrialEnded))
