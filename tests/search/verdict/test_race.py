"""The race on made-up losses, of which the truth is known."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping

import pytest

from search.verdict.race import MARGIN, MARGIN_MOST, Candidate, Cell, Limits, Verdict, race
from search.verdict.text import sentence

Losses = dict[Cell, float | None]


def candidates(*epochs: int) -> list[Candidate]:
    """Candidates 0, 1, ...; the later, the cheaper."""
    return [Candidate(number=n, epochs=e, cost=(-n,)) for n, e in enumerate(epochs)]


def played(
    truth: Mapping[int, float], limits: Limits, *, noise: float, seed: int = 0, blocks: float = 0.03
) -> Verdict:
    """The verdict at the end, each round trained as it is asked for. Differences of `truth` are shares."""
    rng = random.Random(seed)
    common: dict[int, float] = {}
    losses: Losses = {}
    field = candidates(*(4 for _ in truth))
    while (verdict := race(field, losses, limits)).kind == "running":
        assert verdict.wanted
        for number, block in verdict.wanted:
            here = common.setdefault(block, rng.gauss(0, blocks))
            losses[number, block] = 0.4 * math.exp(truth[number] + here + rng.gauss(0, noise))
    return verdict


def test_rounds_are_whole_and_the_first_has_three_blocks() -> None:
    field, limits = candidates(4, 4), Limits(epochs=100)
    first = race(field, {}, limits)
    assert first.kind == "running" and first.choice == 0
    assert first.wanted == ((0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3))
    some: Losses = {(0, 1): 0.4, (1, 1): 0.41, (0, 3): 0.39}
    assert race(field, some, limits).wanted == ((0, 2), (1, 2), (1, 3))


def test_a_clear_winner_is_told_apart_at_the_first_look_whatever_blocks_have_in_common() -> None:
    for blocks in (0.0, 0.3):
        verdict = played({0: 0.05, 1: 0.0, 2: 0.06}, Limits(epochs=200), noise=0.002, blocks=blocks)
        assert (verdict.kind, verdict.choice, verdict.blocks) == ("winner", 1, 3)
        behind = {s.number: s for s in verdict.standings}
        assert verdict.standings[0].number == 1 and behind[1].behind is None
        for number, truth in ((0, 0.05), (2, 0.06)):
            found = behind[number]
            assert found.low is not None and found.high is not None and found.chance is not None
            assert 0 < found.low < math.expm1(truth) < found.high and found.chance < 0.05 and found.out


def test_equals_are_tied_and_the_cheapest_is_named() -> None:
    verdict = played({0: 0.0, 1: 0.0, 2: 0.0}, Limits(epochs=1000), noise=0.004)
    assert verdict.kind == "tied" and verdict.choice == 2 and set(verdict.tied) == {0, 1, 2}
    assert MARGIN <= verdict.margin <= MARGIN_MOST


def test_who_can_no_longer_win_is_trained_no_more() -> None:
    verdict = played({0: 0.0, 1: 0.001, 2: 0.5}, Limits(epochs=400), noise=0.05, seed=3)
    repeats = {s.number: s.repeats for s in verdict.standings}
    assert repeats[2] == 3 < repeats[0] == repeats[1]
    assert verdict.standings[-1].number == 2 and verdict.standings[-1].out


def test_the_interval_of_one_that_is_out_is_that_of_the_test_it_lost() -> None:
    """Else a winner is named beside an interval that holds zero: the deviation of all three is that of no pair."""
    losses: Losses = {(0, 1): 0.400, (0, 2): 0.410, (0, 3): 0.390, (1, 1): 0.404, (1, 2): 0.428, (1, 3): 0.404}
    losses |= {(2, 1): 0.432, (2, 2): 0.443, (2, 3): 0.421}
    verdict = race(candidates(4, 4, 4), losses, Limits(epochs=36))
    assert (verdict.kind, verdict.choice) == ("winner", 0)
    for standing in verdict.standings[1:]:
        assert standing.out and standing.low is not None and standing.low > 0
        assert standing.chance is not None and standing.chance <= 0.05


def test_it_ends_undecided_where_the_budget_does_and_says_what_more_it_would_take() -> None:
    verdict = played({0: 0.0, 1: 0.002}, Limits(epochs=3 * 8), noise=0.02)
    assert verdict.kind == "undecided" and verdict.blocks == 3 and verdict.epochs == 24
    assert verdict.more is None or verdict.more >= 2
    losses: Losses = {(0, b): 0.4 for b in (1, 2, 3)}
    losses |= {(1, b): 0.4 * math.exp(d) for b, d in ((1, -0.02), (2, 0.005), (3, 0.03))}
    near = race(candidates(4, 4), losses, Limits(epochs=24))
    assert near.kind == "undecided" and near.more is not None and 2 <= near.more <= 20 and near.more % 2 == 0


def test_a_repeat_without_a_loss_ends_its_candidate() -> None:
    losses: Losses = {(n, b): 0.4 + 0.001 * b * (n + 1) for n in range(2) for b in (1, 2, 3)}
    losses[0, 2] = None
    verdict = race(candidates(4, 4), losses, Limits(epochs=100))
    assert (verdict.kind, verdict.choice) == ("left", 1)
    assert verdict.standings[-1].failed
    said = sentence(verdict)
    assert said == "only trial 1 is left: repeats of trial 0 came to no loss, so they were not compared"
    assert "only trial 2 is left: better than trial 1 on the same 3 seeds" in sentence(
        race(
            candidates(4, 4, 4),
            {
                (0, 1): None,
                **{(n, b): 0.5 - 0.1 * n + 1e-4 * b * n for n in range(3) for b in (1, 2, 3) if n or b > 1},
            },
            Limits(epochs=100),
        )
    )
    lost: Losses = dict.fromkeys(losses)
    assert race(candidates(4, 4), lost, Limits(epochs=100)).kind == "undecided"


def test_nothing_to_compare() -> None:
    assert race([], {}, Limits(epochs=10)).kind == "none"
    alone = race(candidates(4), {}, Limits(epochs=10))
    assert alone.kind == "alone" and alone.choice == 0 and not alone.wanted


def test_identical_losses_are_a_tie_and_no_error() -> None:
    losses: Losses = {(n, b): 0.4 for n in range(3) for b in (1, 2, 3)}
    assert race(candidates(4, 4, 4), losses, Limits(epochs=100)).kind == "tied"


@pytest.mark.parametrize("noise", [0.004, 0.01])
def test_a_wrong_winner_is_rare_among_near_equals(noise: float) -> None:
    """The hardest case: the best is better by next to nothing, and every look and rival is a chance to err."""
    truth = {0: 1e-6, 1: 0.0, 2: 2e-6, 3: 1e-6}
    named = [played(truth, Limits(epochs=80), noise=noise, seed=seed) for seed in range(60)]
    wrong = sum(v.kind == "winner" and v.choice != 1 for v in named)
    assert wrong <= 0.05 * len(named)
