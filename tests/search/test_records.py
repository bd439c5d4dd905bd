"""Answers about recorded numbers: what is one, and which loss is the lowest."""

import math

from search.records import finite, lowest


def test_a_number_is_finite_only_if_it_is_there() -> None:
    assert [finite(value) for value in (1.5, 0.0, None, math.nan, math.inf, -math.inf)] == [True, True] + [False] * 4


def test_the_lowest_loss_is_finite_and_the_first_of_equals() -> None:
    assert lowest({1: 2.0, 2: 1.5, 3: 1.5, 4: math.nan, 5: None, 6: -math.inf}) == (1.5, 2)
    assert lowest({1: None, 2: math.nan}) is None
    assert lowest({}) is None
