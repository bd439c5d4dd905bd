"""The test loss of a verdict's candidates: read once, at the end, on rows that the search did not use.

The objective stays the validation loss, and the verdict is by repeats of it. That a trial was chosen among many by the
same few validation rows is what the test loss shows; nothing is chosen by it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

ATTRIBUTE = "test_losses"
"""User attribute of a study: `TestLosses.to_dict`."""
METRIC = "test_loss"
"""Of the candidates' MLflow runs."""


@dataclass(frozen=True, kw_only=True)
class TestLoss:
    """Of one trial's best adapter, with intervals of 95 %."""

    __test__ = False  # pytest takes it for a test

    trial: int
    epoch: int
    loss: float
    """Mean over all label tokens."""
    low: float
    high: float
    above: tuple[float, float, float] | None
    """(value, low, high): how far above that of the first candidate on the same rows, a share; None for the first."""


@dataclass(frozen=True, kw_only=True)
class TestLosses:
    """Of all candidates of a verdict."""

    __test__ = False

    rows: str
    """`test` for a given test split, `unused` for rows that the study left out."""
    images: int
    scenes: bool
    """Whether the intervals are from resampling scenes, which are known."""
    fingerprint: str
    losses: tuple[TestLoss, ...]
    """The one that the verdict names first, if it names one."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def of(cls, attrs: Mapping[str, Any]) -> TestLosses | None:
        """What a study's user attributes have; None where nothing, or what is not ours."""
        try:
            data = dict(attrs[ATTRIBUTE])
            losses = tuple(
                TestLoss(**{**each, "above": None if each["above"] is None else tuple(map(float, each["above"]))})
                for each in data.pop("losses")
            )
            return cls(**data, losses=losses) if losses else None
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def lower(self) -> tuple[int, ...]:
        """Trials whose test loss is below that of the first by more than chance."""
        return tuple(each.trial for each in self.losses if each.above is not None and each.above[2] < 0)

    def sentence(self) -> str:
        """In a line, for the terminal and the model card."""
        kind = "of the test split" if self.rows == "test" else "that the search did not use"
        listed = ", ".join(f"trial {each.trial} {each.loss:.4f}{_aside(each.above)}" for each in self.losses)
        return f"test loss, read once on {self.images} images {kind}: {listed}"


def _aside(above: tuple[float, float, float] | None) -> str:
    if above is None:
        return ""
    value, low, high = above
    return f" ({100 * value:+.2f} %, {100 * low:+.2f} to {100 * high:+.2f} %)"
