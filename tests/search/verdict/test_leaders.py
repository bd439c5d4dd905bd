"""Which trials are candidates, and what their repeats may cost."""

from __future__ import annotations

from typing import Any

from search import records
from search.records import TrialRecord
from search.verdict import text
from search.verdict.leaders import (
    FEWEST,
    TOP,
    PassedOver,
    Rules,
    field,
    judge,
    leaders,
    passed_over,
    precision,
    seed_of,
    winner,
)
from tests.support.candidate_trials import repeat, trial


def numbers(trials: list[TrialRecord]) -> list[int]:
    return [t.number for t in leaders(trials)]


def test_trials_on_the_same_samples_the_best_first() -> None:
    """One that was paused and given up has come to a loss as well; a probe was trained otherwise."""
    trials = [
        trial(0, 0.401),
        trial(1, 0.4),
        trial(2, 0.39, "PRUNED", reason=records.PROBE),
        trial(3, 0.39, violated=("non_finite",)),
        trial(4, 0.402, config={"split_seed": 7}),
        trial(5, 0.403),
        repeat(6, 0, 1, 0.1),
        trial(7, 0.4005, "PRUNED", reason=records.SUPERSEDED),
        trial(8, 0.39, "WAITING", reason="paused"),
        trial(9, 0.39, "FAIL"),
    ]
    assert numbers(trials) == [1, 7, 0, 5]


def test_who_is_clearly_behind_is_none_but_two_there_are() -> None:
    assert numbers([trial(0, 0.5), trial(1, 0.4), trial(2, 0.41), trial(3, 0.42)]) == [1, 2]
    assert numbers([trial(0, 0.9), trial(1, 0.4), trial(2, 0.8)]) == [1, 2]


def test_hosts_have_data_and_model_where_they_like() -> None:
    """A trial records the paths of its host; another's on the same samples is a candidate as well, and once."""
    here, there = {"data": "/data", "model": "/m"}, {"data": "/mnt/data", "model": "/home/m"}
    found = [trial(0, 0.4, config=here), trial(1, 0.401, config=there), trial(2, 0.402, config=here)]
    alike = {"learning_rate": 1e-4}
    assert numbers([*found, trial(3, 0.4, config={**there, **alike}), trial(4, 0.405, config=there)]) == [0, 1, 2, 4]
    # What a trial names itself is another matter.
    given: dict[str, Any] = {"attrs": {records.OVERRIDES: {"data": "/other"}}, "config": {**here, "data": "/other"}}
    assert numbers([*found, trial(3, 0.403, **given)]) == [0, 1, 2]


def test_what_would_be_trained_alike_is_a_candidate_once() -> None:
    alike = {"learning_rate": 1e-4}
    assert numbers([trial(0, 0.4, config=alike), trial(1, 0.4, config={**alike, "seed": 3}), trial(2, 0.41)]) == [0, 2]
    constant = {**alike, "lr_scheduler_type": "constant_with_warmup"}
    one, other = (
        trial(0, 0.4, config={**constant, "num_epochs": 6}),
        trial(1, 0.4, config={**constant, "num_epochs": 9}),
    )
    assert numbers([one, other, trial(2, 0.41)]) == [0, 2]


def test_the_budget_decides_how_many_and_three_are_always_affordable() -> None:
    few = [trial(n, 0.4 + n * 1e-4) for n in range(8)]
    found, limits = field(few, Rules())
    assert len(found) == FEWEST and limits.epochs == 3 * 3 * 4
    many = [trial(n, 0.4 + n * 1e-4) for n in range(60)]
    found, limits = field(many, Rules())
    assert len(found) == TOP and limits.epochs == 0.25 * 6 * 60
    asked, limits = field(few, Rules(top=4, seeds=5))
    assert len(asked) == 4 and limits.blocks == 5


def test_who_was_near_enough_and_is_no_candidate_has_a_reason() -> None:
    trials = [trial(n, 0.4 + n / 10_000) for n in range(7)]
    asked = {records.CONFIRM: {"top": 2}}
    assert passed_over(trials, asked) == PassedOver(trials=(2, 3, 4, 5, 6), why="asked")
    assert passed_over(trials, {records.CONFIRM: {"seeds": 3}}) == PassedOver(trials=(5, 6), why="most")
    assert passed_over(trials[:3], {}).trials == ()
    found = passed_over(trials[:4], {})
    assert len(field(trials[:4], Rules())[0]) == FEWEST and found == PassedOver(trials=(3,), why="budget")


def test_repeats_that_wait_run_or_are_taken_up_again_are_not_wanted_twice() -> None:
    search = [trial(0, 0.4), trial(1, 0.401)]
    assert len(judge(search, Rules()).wanted) == 6
    lost = {records.ATTEMPT: 1}
    held = [
        repeat(2, 0, 1, None, state="WAITING"),
        repeat(3, 1, 1, None, state="RUNNING"),
        repeat(4, 0, 2, None, state="FAIL", reason=records.LOST, attrs=lost),
        repeat(5, 1, 2, 0.4),
        repeat(6, 0, 3, 0.41, state="FAIL", reason=records.LOST),
        repeat(7, 0, 3, 0.41, attrs={records.RESUMES: 6}),
    ]
    verdict = judge([*search, *held], Rules())
    assert verdict.kind == "running" and verdict.wanted == ((1, 3),)
    # One that died with its host has used no attempt, and has a successor however often that happened.
    with_its_host = {records.ATTEMPT: records.MAX_RETRIES, records.BLAMED: False}
    held[2] = repeat(4, 0, 2, None, state="FAIL", reason=records.LOST, attrs=with_its_host)
    assert judge([*search, *held], Rules()).wanted == ((1, 3),)


def test_a_repeat_that_was_lost_for_good_ends_its_candidate() -> None:
    search = [trial(0, 0.4), trial(1, 0.401)]
    cells = [repeat(10 + 2 * b + n, n, b, 0.4 + n * 0.01 + b * 0.001) for n in range(2) for b in (1, 2, 3)]
    assert judge([*search, *cells], Rules()).choice == 0
    cells[0] = repeat(12, 0, 1, None, state="FAIL", reason=records.LOST, attrs={records.ATTEMPT: 2})
    assert (judge([*search, *cells], Rules()).kind, judge([*search, *cells], Rules()).choice) == ("left", 1)


def test_a_copy_of_a_repeat_that_failed_takes_no_loss_away() -> None:
    """Another program may queue one with the same attributes, which is refused."""
    search = [trial(0, 0.4), trial(1, 0.401)]
    cells = [repeat(10 + 2 * b + n, n, b, 0.4 + n * 0.01 + b * 0.001) for n in range(2) for b in (1, 2, 3)]
    copy = repeat(20, 0, 1, None, state="FAIL", reason=records.ERROR)
    assert judge([*search, *cells, copy], Rules()) == judge([*search, *cells], Rules())


def test_seeds_are_those_after_the_base_that_the_search_has_not_used() -> None:
    assert [seed_of(block, 42, {42, 44}) for block in (1, 2, 3)] == [43, 45, 46]
    assert seed_of(1, 2**32 - 1, set()) == 0


def test_the_winner_is_whom_the_verdict_names_and_the_lowest_until_it_names_one() -> None:
    trials = [trial(0, 0.4), trial(1, 0.401)]
    rules = Rules(top=2, seeds=3)
    found = winner(trials, judge(trials, rules))
    assert found is not None and found.number == 0
    first = [repeat(2 + block, 0, block, 0.42 + block / 1000) for block in (1, 2, 3)]
    second = [repeat(5 + block, 1, block, 0.40 + block / 1000) for block in (1, 2, 3)]
    found = winner(trials, judge([*trials, *first, second[0]], rules))
    assert found is not None and found.number == 0, "the repeats are not over"
    verdict = judge([*trials, *first, *second], rules)
    found = winner(trials, verdict)
    assert verdict.kind == "winner" and found is not None and found.number == 1
    found = winner(trials, None)
    assert found is not None and found.number == 0
    assert winner([], None) is None


def test_what_a_search_in_a_lower_precision_decided() -> None:
    """The sentence says whether the repeats, in float32, agree with it."""
    lower = {"base_dtype": "bfloat16"}

    def verdict(losses: dict[int, float]) -> str:
        trials = [trial(0, 0.40, config=lower), trial(1, 0.401, config=lower)]
        cells = [(of, block) for of in losses for block in range(1, 6)]
        trials += [repeat(i, of, block, losses[of] + 0.001 * block) for i, (of, block) in enumerate(cells, 2)]
        return text.sentence(judge(trials, Rules(top=2, seeds=5)))

    agreed, otherwise = verdict({0: 0.39, 1: 0.42}), verdict({0: 0.42, 1: 0.39})
    assert agreed.startswith("winner: trial 0,") and otherwise.startswith("winner: trial 1,")
    assert "the search ran in bfloat16" in agreed and agreed.endswith("no decision was changed by it")
    assert "the search's lowest loss was trial 0's, which is not what they name" in otherwise
    plain = [trial(0, 0.40), trial(1, 0.401), *(repeat(i, i % 2, i // 2, 0.4) for i in range(2, 12))]
    assert "the search ran in" not in text.sentence(judge(plain, Rules(top=2, seeds=5)))
    assert precision({"matmul_precision": "high"}) == "TF32" and precision({"torch_dtype": "float16"}) == "float16"
