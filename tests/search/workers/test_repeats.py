"""Repeats in a study: when they are queued, what they train, and who does not see them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from search import leaderboard, records
from search.records import TrialRecord
from search.verdict.leaders import Rules, judge
from search.workers.protocol import TrialStarted
from search.workers.trial import TrialRun
from tests.search.workers.conftest import Search
from trainer import member

RULES = Rules(top=2, seeds=2)


def parts(trials: tuple[TrialRecord, ...]) -> tuple[list[TrialRecord], list[TrialRecord]]:
    """(trials of the search, repeats)."""
    return leaderboard.searched(trials), [t for t in trials if leaderboard.is_repeat(t)]


def test_the_leaders_come_again_on_the_same_seeds_and_splits(search: Search) -> None:
    trials, heard = search(trials=3, slots=4, confirm=RULES)
    own, repeats = parts(trials)
    assert [t.number for t in own] == [0, 1, 2] and [t.state for t in own] == ["COMPLETE"] * 3
    two = [t.number for t in leaderboard.ranked(own)[:2]]
    assert Counter(t.attrs[records.REPEAT_OF] for t in repeats) == dict.fromkeys(two, 2)
    blocks: dict[int, set[tuple[int, int]]] = {}
    for each in repeats:
        of = own[each.attrs[records.REPEAT_OF]]
        blocks.setdefault(each.attrs[records.BLOCK], set()).add((each.config["seed"], each.config["split_seed"]))
        changed = {k for k, v in each.config.items() if v != of.config[k]}
        assert changed == {"seed", "split_seed"} and each.params == of.params
        assert len(each.attrs[records.TRAIN_LOSSES]) == of.best_epoch == each.best_epoch
        assert (each.state, each.reason) == ("PRUNED", records.REPEAT) and each.value is not None
    assert {b: len(seeds) for b, seeds in blocks.items()} == {1: 1, 2: 1}
    assert blocks[1] != blocks[2] and (own[0].config["seed"], own[0].config["split_seed"]) not in blocks[1] | blocks[2]
    assert judge(trials, RULES).kind in ("winner", "tied", "undecided")
    labels = [m.label for m in heard if isinstance(m, TrialStarted)]
    assert labels[:3] == [None] * 3 and all(label and "repeat of" in label for label in labels[3:])


def test_without_a_word_nothing_is_repeated(search: Search) -> None:
    trials, _ = search(trials=2, slots=2)
    assert not parts(trials)[1]


@pytest.mark.long
def test_with_one_worker_the_same_seed_gives_the_same_study_and_slots_do_not_count(search: Search) -> None:
    first, _ = search(trials=3, slots=1, confirm=RULES)
    again, _ = search(trials=3, slots=1, confirm=RULES, where="again")
    assert [(t.params, t.config["seed"], t.value) for t in again] == [
        (t.params, t.config["seed"], t.value) for t in first
    ]


@pytest.mark.long
def test_a_study_that_goes_on_samples_what_a_longer_one_would_have(search: Search) -> None:
    """Neither the sampler nor its seeds see the repeats in between; the verdict counts those that are there."""
    whole, _ = search(trials=7, slots=1, where="whole", max_samples=8)
    search(trials=6, slots=1, confirm=RULES, max_samples=8)
    longer, _ = search(trials=7, slots=1, confirm=RULES, max_samples=8)
    assert [t.params for t in parts(longer)[0]] == [t.params for t in whole]
    cells = [(t.attrs[records.REPEAT_OF], t.attrs[records.BLOCK]) for t in parts(longer)[1]]
    assert len(cells) == len(set(cells))


def test_a_repeat_that_diverges_ends_its_candidate_and_one_that_rises_goes_on(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = member.Member.epoch_ended
    first: list[int] = []

    def rises(self: member.Member, val_loss: float, eval_s: float) -> Any:
        number = int(self.out_dir.name)
        if number < 2:
            val_loss = 1.0 - 0.1 * self.state.epoch if hasattr(self.state, "epoch") else val_loss
        elif not first or number in first:
            first[:] = [number]
            val_loss = float("nan")
        return original(self, val_loss, eval_s)

    monkeypatch.setattr(member.Member, "epoch_ended", rises)
    trials, _ = search(trials=2, slots=1, confirm=RULES)
    _, repeats = parts(trials)
    bad = [t for t in repeats if t.violated]
    assert [t.reason for t in bad] == [records.NON_FINITE]
    verdict = judge(trials, RULES)
    assert verdict.kind == "left" and verdict.choice != bad[0].attrs[records.REPEAT_OF]


@pytest.mark.long
def test_one_that_is_interrupted_or_lost_is_the_same_repeat_again(
    search: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    from search.storage import lifecycle

    undisturbed, _ = search(trials=2, slots=1, confirm=RULES, where="undisturbed")
    original = TrialRun.take
    lost: list[int] = []

    def taken(self: TrialRun, event: Any) -> Any:
        if self.repeat_of is not None and not lost:
            lost.append(self.trial.number)
            lifecycle.requeue_lost(self.study, is_alive=lambda worker: False)
        return original(self, event)

    monkeypatch.setattr(TrialRun, "take", taken)
    trials, _ = search(trials=2, slots=1, confirm=RULES)
    _, repeats = parts(trials)
    successor = next(t for t in repeats if records.RESUMES in t.attrs)
    assert successor.attrs[records.RESUMES] == lost[0]
    mine = {(t.attrs[records.REPEAT_OF], t.attrs[records.BLOCK]): t.value for t in repeats if t.state == "PRUNED"}
    theirs = {(t.attrs[records.REPEAT_OF], t.attrs[records.BLOCK]): t.value for t in parts(undisturbed)[1]}
    assert mine == theirs and len(mine) == 4


@pytest.mark.long
def test_trials_are_screened_and_their_leaders_repeated_in_the_bases_own_precision(search: Search) -> None:
    trials, _ = search(trials=2, slots=2, confirm=RULES, screen="bfloat16", max_samples=8)
    own, repeats = parts(trials)
    assert {t.config["base_dtype"] for t in own} == {"bfloat16"}
    assert {t.config["base_dtype"] for t in repeats} == {None} and len(repeats) == 4
    assert all(t.value is not None for t in trials)
    verdict = judge(trials, RULES)
    assert verdict.screened == ("bfloat16", leaderboard.ranked(own)[0].number)
