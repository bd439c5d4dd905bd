"""The test loss of a verdict's candidates: read once, at the end, on rows that the search did not use.

The objective stays the validation loss, and the verdict is by repeats of it. That a trial was chosen among many by the
same few validation rows is what the test loss shows; nothing is chosen by it. The rows are those that no candidate
trained or validated on. Their repeats, which have other splits, may have: an adapter that is judged has not seen them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from search.verdict.race import Verdict

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
    read_s: float | None = None
    """When, by the worker's clock; earlier versions did not say."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def of(cls, attrs: Mapping[str, Any], verdict: Verdict | None) -> TestLosses | None:
        """What was read for a verdict, from a study's user attributes.

        None where nothing was, where it was for an earlier verdict that named another trial, and where the attribute
        is another program's.
        """
        try:
            data = attrs[ATTRIBUTE]
            found = cls(
                rows=str(data["rows"]),
                images=int(data["images"]),
                scenes=bool(data["scenes"]),
                fingerprint=str(data["fingerprint"]),
                losses=tuple(map(_loss, data["losses"])),
                read_s=None if data.get("read_s") is None else float(data["read_s"]),
            )
        except (KeyError, TypeError, ValueError):
            return None
        if verdict is None or not found.losses or verdict.choice not in (None, found.losses[0].trial):
            return None
        return found

    @property
    def lower(self) -> tuple[int, ...]:
        """Trials whose test loss is below that of the first by more than chance."""
        return tuple(each.trial for each in self.losses if each.above is not None and each.above[2] < 0)

    def sentence(self) -> str:
        """In a line, for the terminal and the model card."""
        kind = "of the test split" if self.rows == "test" else "that the search did not use"
        listed = ", ".join(f"trial {each.trial} {each.loss:.4f}{_aside(each.above)}" for each in self.losses)
        return f"test loss, read once on {self.images} images {kind}: {listed}"


NOTHING: Mapping[str, Any] = {"losses": []}
"""What `ATTRIBUTE` is where there was nothing to read: no rows beside the search, or no adapters."""


def is_due(attrs: Mapping[str, Any], verdict: Verdict) -> bool:
    """Whether the test loss of a verdict is still to be read, as after a search that was interrupted before it was."""
    if verdict.kind in ("none", "running"):
        return False
    stored = attrs.get(ATTRIBUTE)
    nothing = isinstance(stored, Mapping) and not stored.get("losses")
    return not nothing and TestLosses.of(attrs, verdict) is None


def _loss(data: Mapping[str, Any]) -> TestLoss:
    above = data["above"]
    if above is not None:
        value, low, high = map(float, above)
        above = (value, low, high)
    numbers = {name: float(data[name]) for name in ("loss", "low", "high")}
    return TestLoss(trial=int(data["trial"]), epoch=int(data["epoch"]), above=above, **numbers)


def _aside(above: tuple[float, float, float] | None) -> str:
    if above is None:
        return ""
    value, low, high = above
    return f" ({100 * value:+.2f} %, {100 * low:+.2f} to {100 * high:+.2f} %)"
