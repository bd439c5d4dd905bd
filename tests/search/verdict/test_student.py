"""Student's t, against SciPy."""

from __future__ import annotations

import pytest
from scipy import special

from search.verdict.student import above, quantile


@pytest.mark.parametrize("freedoms", [1, 2, 3, 4, 5, 8, 9, 30, 101])
def test_as_scipy_has_it(freedoms: int) -> None:
    for t in (-3.0, -0.2, 0.0, 0.7, 2.1, 12.0):
        assert above(t, freedoms) == pytest.approx(special.stdtr(freedoms, -t), rel=1e-9, abs=1e-15)
    for level in (0.4, 0.05, 0.01, 0.001):
        assert quantile(level, freedoms) == pytest.approx(special.stdtrit(freedoms, 1 - level), rel=1e-6)


def test_no_deviation_leaves_no_doubt() -> None:
    assert above(float("inf"), 3) == 0 and above(float("-inf"), 3) == 1
