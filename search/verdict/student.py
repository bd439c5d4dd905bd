"""Student's t for whole degrees of freedom: its distribution and its quantiles.

SciPy has both, but takes half a second to import, which each worker would wait for. The sums are finite (Abramowitz
and Stegun 1964, 26.7.3 and 26.7.4); tests/search/verdict/test_student.py compares them with SciPy.
"""

from __future__ import annotations

import math
from functools import lru_cache


def above(t: float, freedoms: int) -> float:
    """The chance of a value above `t`.

    Args:
        t: Any number.
        freedoms: Degrees of freedom, at least 1.
    """
    if math.isinf(t):
        return 0.0 if t > 0 else 1.0
    angle = math.atan2(t, math.sqrt(freedoms))
    cosine = math.cos(angle)
    odd = freedoms % 2
    # Of the even ones, terms from 1 on; of the odd ones from the cosine on.
    term = cosine if odd else 1.0
    total = 0.0 if freedoms == 1 else term
    for k in range(2 + odd, freedoms, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
    return (1 - inside) / 2


@lru_cache(maxsize=4096)
def quantile(level: float, freedoms: int) -> float:
    """The value that is exceeded with the chance `level`, between 0 and 0.5."""
    low, high = 0.0, 1.0
    while above(high, freedoms) > level:
        low, high = high, high * 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if above(middle, freedoms) > level else (low, middle)
    return (low + high) / 2
