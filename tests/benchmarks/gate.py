"""Whether both sides trained the same: the condition under which a makespan counts.

Each trial's final validation loss must agree within the scale's tolerance. Some trials cannot: with a high rate and
small batches float32 training is chaotic, and two runs that differ by one rounding part exponentially (measured:
rate 6e-4, alpha 4 r, batch 2: losses equal to 1e-7 for 10 steps, to 1e-3 after 30, unrelated after 50). Whether a
trial is of that kind is not for us to say: the peer is run against itself, its start moved by one or two units in the
last place. A trial counts as sensitive if that alone moves its loss by more than the tolerance, and agrees if the two
sides then differ by no more than `SLACK` times as much. How far a rounding is carried is chance, so up to three are
tried, and the one that is carried furthest counts. Its first steps are compared like all others'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from tests.benchmarks.sides import TrialLosses

NUDGES = (2.0**-23, -(2.0**-23), 2.0**-22)
"""Units in the last place of a float32 of magnitude 1: one up, one down, two up."""
SLACK = 10
"""The nudge is one rounding; two implementations differ by one in every operation of every step."""
FIRST_STEPS_TOLERANCE = 1e-4
"""Of the first steps' training losses: float32 rounding, grown by a few steps."""

Nudged = Callable[[Sequence[str], float], Mapping[str, TrialLosses]]
"""Runs some of the peer's trials again, their start moved by this much."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One trial on both sides."""

    label: str
    ours: float
    """Validation loss of the last epoch that both have."""
    peer: float
    difference: float
    """Relative."""
    first_steps: float
    """Largest relative difference of the first training losses."""
    sensitivity: float | None = None
    """How far the peer's own loss moves by one rounding; None if that was not needed."""

    def agrees(self, tolerance: float) -> bool:
        """Whether the trial is the same on both sides as far as float32 can tell."""
        if not self.first_steps <= FIRST_STEPS_TOLERANCE:  # NaN does not agree
            return False
        if self.difference <= tolerance:
            return True
        return self.sensitivity is not None and tolerance < self.sensitivity >= self.difference / SLACK


def relative(one: float, other: float) -> float:
    """|one - other| / |other|; 0 for two NaN, inf for one."""
    if math.isnan(one) and math.isnan(other):
        return 0.0
    if math.isnan(one) or math.isnan(other):
        return math.inf
    return abs(one - other) / abs(other)


def compare(
    ours: Mapping[str, TrialLosses], peer: Mapping[str, TrialLosses], tolerance: float, nudged: Nudged
) -> list[Compared]:
    """Every trial of the peer against ours; `nudged` is asked about those that do not agree.

    Raises:
        SystemExit: the two sides did not run the same trials.
    """
    if ours.keys() != peer.keys():
        raise SystemExit(f"not the same trials: ours {sorted(ours)}, peer {sorted(peer)}")
    compared = {label: _compare(label, ours[label], peer[label]) for label in sorted(peer)}
    for nudge in NUDGES:
        open_ = [c.label for c in compared.values() if _is_open(c, tolerance)]
        for label, moved in (nudged(open_, nudge) if open_ else {}).items():
            found = compared[label]
            epochs = min(len(ours[label].val), len(peer[label].val), len(moved.val))
            carried = max(map(relative, moved.val[:epochs], peer[label].val[:epochs]))
            compared[label] = replace(found, sensitivity=max(carried, found.sensitivity or 0.0))
    return list(compared.values())


def _is_open(compared: Compared, tolerance: float) -> bool:
    """Whether the peer's own sensitivity could yet show that a trial agrees."""
    return not compared.agrees(tolerance) and compared.first_steps <= FIRST_STEPS_TOLERANCE


def _compare(label: str, ours: TrialLosses, peer: TrialLosses) -> Compared:
    """A pruner may end a trial sooner on one side: what both have is compared."""
    epochs = min(len(ours.val), len(peer.val))
    if not epochs or len(ours.first) != len(peer.first):
        raise SystemExit(
            f"{label}: {len(ours.val)} and {len(peer.val)} epochs, {len(ours.first)} and {len(peer.first)} steps"
        )
    last = ours.val[epochs - 1], peer.val[epochs - 1]
    first = max(map(relative, ours.first, peer.first))
    return Compared(label=label, ours=last[0], peer=last[1], difference=relative(*last), first_steps=first)


def report(compared: Sequence[Compared], tolerance: float) -> tuple[bool, str]:
    """(whether the figure counts, in words)."""
    strict = [c for c in compared if c.difference <= tolerance]
    beyond = [c for c in compared if c.difference > tolerance]
    bad = [c for c in compared if not c.agrees(tolerance)]
    widest = max((c.difference for c in strict), default=0.0)
    lines = [
        f"validation losses: {len(strict)} of {len(compared)} trials agree within {tolerance:g} "
        f"(largest difference {widest:.1e}); first steps' losses within {max(c.first_steps for c in compared):.1e}"
    ]
    for c in beyond:
        moved = (
            ""
            if c.sensitivity is None
            else f"; the peer against itself, start moved by a rounding: {c.sensitivity:.1e}"
        )
        lines.append(f"  {c.label}: ours {c.ours:.6f}, peer {c.peer:.6f}, difference {c.difference:.1e}{moved}")
    lines.append("the figure counts" if not bad else f"THE FIGURE DOES NOT COUNT: {', '.join(c.label for c in bad)}")
    return not bad, "\n".join(lines)
