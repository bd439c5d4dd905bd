"""Answers about recorded numbers: what is one, and which loss is the lowest."""

import ast
import math
from collections import Counter
from pathlib import Path

from search.records import finite, lowest


def test_a_number_is_finite_only_if_it_is_there() -> None:
    assert [finite(value) for value in (1.5, 0.0, None, math.nan, math.inf, -math.inf)] == [True, True] + [False] * 4


def test_the_lowest_loss_is_finite_and_the_first_of_equals() -> None:
    assert lowest({1: 2.0, 2: 1.5, 3: 1.5, 4: math.nan, 5: None, 6: -math.inf}) == (1.5, 2)
    assert lowest({1: None, 2: math.nan}) is None
    assert lowest({}) is None


def test_no_name_is_given_twice() -> None:
    """Of a module's constants: an attribute of the study was written under the name of a file."""
    for file in [*Path("search").rglob("*.py"), *Path("trainer").rglob("*.py")]:
        body = ast.parse(file.read_text(encoding="utf-8")).body
        targets = [t for node in body if isinstance(node, ast.Assign | ast.AnnAssign) for t in ast.walk(node)]
        names = [t.id for t in targets if isinstance(t, ast.Name) and isinstance(t.ctx, ast.Store)]
        capitals = Counter(name for name in names if name.isupper())
        assert not [name for name, times in capitals.items() if times > 1], file
