"""By how much two validation losses must differ before the difference counts."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from search import records
from search.diagnosis.noise import SIGNIFICANT, VAL_NOISE
from search.leaderboard import is_repeat, sample_key
from search.records import TrialRecord, finite
from search.verdict.leaders import cells
from search.verdict.race import residual
from trainer.config import MACHINE_FIELDS

FEWEST_JUMPS = 8
"""Fewest second differences for a deviation read from the study's own curves."""
FROM_EPOCH = 3
"""Curves bend before it, which second differences take for noise."""
RECORDED_SPLIT = 500
"""About the validation samples of the recorded real runs that VAL_NOISE was measured on."""
LEAST = 1e-6
"""Least deviation, a share of the loss: seeds that come to equal losses do not say that a last digit counts."""
FEWEST_FREEDOMS = 3
"""Fewest degrees of freedom for which a deviation measured on repeats is used: with two runs it is off by a factor of
two or more in half of the cases."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The standard deviation of a trial's best validation loss over seeds, as a share of the loss."""

    deviation: float
    measured: float | None
    """The deviation of the study's own repeats; None where nothing was repeated."""
    trials: tuple[int, ...]
    """Numbers of the repeats."""
    freedoms: int
    jumps: float | None = None
    """By how much an epoch's validation loss jumps about its own curve in this study; None with too few epochs."""
    split: int | None = None
    """Validation samples of most trials."""

    @property
    def widened(self) -> float | None:
        """How many times as much a loss on this split may move by chance as on that of the recorded runs, by the
        square root of the samples; None where the split is not known, or half as large."""
        return math.sqrt(RECORDED_SPLIT / self.split) if self.split and self.split < RECORDED_SPLIT / 2 else None

    def sigmas(self, share: float) -> float:
        """A difference between two trials in standard deviations of such a difference."""
        return share / (self.deviation * math.sqrt(2))

    @property
    def is_measured(self) -> bool:
        """Whether `deviation` is the study's own."""
        return self.measured is not None and self.freedoms >= FEWEST_FREEDOMS

    @property
    def difference(self) -> float:
        """The smallest difference between two trials that counts as real, a share of the loss."""
        return SIGNIFICANT * self.deviation * math.sqrt(2)


def measure(trials: Sequence[TrialRecord]) -> Noise:
    """Noise from trials that differ only in the seed; without enough of them the diagnosis' own figure.

    Repeats differ in the split too. What a seed and a split have in common for all candidates is not counted: it is
    the same for all trials of a search, which have one split.

    The diagnosis' figure (search.diagnosis.noise.VAL_NOISE) is that of one epoch's validation loss on the recorded
    real runs, with some 500 validation samples; on a smaller split a loss moves by more. Where nothing was repeated,
    the study's own curves say by how much at least.
    """
    groups: defaultdict[str, dict[int, tuple[int, float]]] = defaultdict(dict)
    for trial in trials:
        if trial.state != "COMPLETE" or trial.value is None or "seed" not in trial.config:
            continue
        same = {k: v for k, v in trial.config.items() if k != "seed" and k not in MACHINE_FIELDS}
        # The same seed twice gives the same loss twice, which says nothing about noise.
        groups[json.dumps(same, sort_keys=True)].setdefault(trial.config["seed"], (trial.number, trial.value))
    squares, freedoms, repeats = 0.0, 0, []
    for group in groups.values():
        if len(group) < 2:
            continue
        mean = fmean(value for _, value in group.values())
        if mean == 0:
            continue
        squares += sum((value / mean - 1) ** 2 for _, value in group.values())
        freedoms += len(group) - 1
        repeats += [number for number, _ in group.values()]
    again, of_repeats, numbers = _of_repeats(trials)
    squares, freedoms, repeats = squares + again, freedoms + of_repeats, repeats + numbers
    measured = math.sqrt(squares / freedoms) if freedoms else None
    enough = measured is not None and freedoms >= FEWEST_FREEDOMS
    jumps = _jumps(trials)
    return Noise(
        # Few repeats may show that there is more noise than the figure says, not that there is less.
        deviation=max(LEAST, measured)
        if enough and measured is not None
        else max(VAL_NOISE, measured or 0.0, jumps or 0.0),
        measured=measured,
        jumps=jumps,
        split=_split(trials),
        trials=tuple(sorted(repeats)),
        freedoms=freedoms,
    )


def _of_repeats(trials: Sequence[TrialRecord]) -> tuple[float, int, list[int]]:
    """(sum of squares, degrees of freedom, numbers) of the repeats that the study made of its leaders.

    Of those with two repeats or more, the blocks that all of them have: a block's own seed and split move all losses,
    often by more than a training does.
    """
    ended, _ = cells(trials)
    rows: defaultdict[int, dict[int, float]] = defaultdict(dict)
    for (number, block), loss in sorted(ended.items()):
        if loss is not None and loss > 0:
            rows[number][block] = math.log(loss)
    several = [row for row in rows.values() if len(row) > 1]
    blocks = sorted(set.intersection(*map(set, several))) if several else []
    deviation, freedoms = residual([[row[block] for block in blocks] for row in several])
    numbers = [t.number for t in trials if is_repeat(t) and t.reason == records.REPEAT] if freedoms else []
    return deviation**2 * freedoms, freedoms, numbers


def _jumps(trials: Sequence[TrialRecord]) -> float | None:
    """The deviation of an epoch's validation loss from its own curve: second differences over sqrt(6), by the
    median.

    By the better half of the trials on the same samples: a rate that is too low hardly moves the loss, up or down.
    """
    groups: defaultdict[tuple[object, ...], list[TrialRecord]] = defaultdict(list)
    for trial in trials:
        if trial.value is not None:
            groups[sample_key(trial)].append(trial)
    found: list[float] = []
    for group in groups.values():
        middle = median(t.value for t in group if t.value is not None)
        for trial in group:
            losses = [e.val_loss for e in trial.epochs if e.epoch >= FROM_EPOCH]
            if len(group) < 2 or trial.value is None or trial.value > middle:
                continue
            for a, b, c in zip(losses, losses[1:], losses[2:], strict=False):
                if finite(a) and finite(b) and finite(c) and b > 0:
                    found.append(abs(a - 2 * b + c) / b)
    return 1.4826 * median(found) / math.sqrt(6) if len(found) >= FEWEST_JUMPS else None


def _split(trials: Sequence[TrialRecord]) -> int | None:
    counts = Counter(text for t in trials if (text := t.tags.get("num_val_samples", "")).isdecimal())
    return int(counts.most_common(1)[0][0]) if counts else None
