"""Captions end before their deadline, not after it."""

from __future__ import annotations

import pytest
import torch

from trainer.captions.deadline import Deadline


@pytest.mark.parametrize("slow", [0.0, 2.0])
def test_no_token_is_begun_that_would_probably_be_late(monkeypatch: pytest.MonkeyPatch, slow: float) -> None:
    """Tokens that take a second each, the third of them longer: the last ends before the deadline."""
    ends = [10.0, 11.0, 12.0, 13.0 + slow, *(14.0 + slow + n for n in range(20))]
    limit = Deadline(at=20.5)
    for end in ends:
        monkeypatch.setattr("time.time", lambda end=end: end)
        done = limit(torch.zeros(3, 5), None)
        assert done.shape == (3,) and done.dtype == torch.bool and bool(done.all()) == limit.over
        if limit.over:
            break
    assert 20.5 - (1 + slow) - 1 <= end <= 20.5
