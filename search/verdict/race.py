"""The race: repeats in rounds, one round a set of blocks, and after each a look at who is out and whether it is over.

A **block** is a seed (of adapter, order and dropout) and a split. All candidates are trained on the same blocks, so
the difference of two is a mean of paired differences: what a split or a seed makes harder for both falls out. Losses
are compared as logarithms, so that a difference is a share of the loss.

The candidates' own trials do not count. They were chosen because theirs were low, and the lowest of many noisy numbers
is too low: only losses that nothing was chosen by can confirm it.

**A candidate is out** if another is better by a one-sided paired t-test. Its level is `ALPHA` divided by the number of
its rivals (the one that is truly best is out by mistake if any of them beats it) and of the looks that the budget
allows (each is a chance to err). What is left alone is the **winner**. The deviation of the test is that of all
candidates that are left together: of one pair, three blocks say next to nothing about it.

**They are tied** if a candidate that is left is shown to be at most `margin` worse than each other (one-sided tests of
non-inferiority, each at the level `TIE_ALPHA`); it is the cheapest of which this holds. The margin is the standard
deviation of the difference of two trainings, at least `MARGIN` and at most `MARGIN_MOST`: what is chosen here is
trained once more, and then its seed matters more than the choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from search.verdict.student import above, quantile

ALPHA = 0.05
"""Chance of naming a wrong winner, at most."""
TIE_ALPHA = 0.1
"""Of each test that a candidate is not worse than another by more than the margin. It is not divided by the looks: of
made-up studies, at most 2.5 % name one in a tie that is worse by more (docs/search-quality.md)."""
MARGIN = 0.005
"""Smallest difference that is worth a decision, a share of the loss: with 32 validation samples one epoch's loss moves
by as much, on the recorded real runs by 0.4 % (search.diagnosis.noise.VAL_NOISE)."""
MARGIN_MOST = 0.01
"""Largest difference that counts as none, however noisy the trainings are."""
FIRST = 3
"""Blocks before the first look: two leave a single degree of freedom between two candidates."""
LONGEST_FORECAST = 100
"""More further repeats than this are not counted."""

Kind = Literal["winner", "left", "tied", "undecided", "alone", "running", "none"]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A leader of the search."""

    number: int
    """Of its trial."""
    epochs: int
    """Up to its best one: so many its repeats train."""
    cost: tuple[float, ...]
    """What makes it cheap, the most important first: less is cheaper."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much a race may cost."""

    epochs: float
    """Of repeats, in total."""
    blocks: int = 50
    """Most repeats of a candidate."""


Cell = tuple[int, int]
"""(number of a candidate's trial, block from 1)."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a candidate's repeats say."""

    number: int
    repeats: int
    mean: float | None
    """Mean validation loss (geometric) over its repeats."""
    behind: float | None
    """How far it lies behind the one that is named, over the blocks of both; negative if it leads. A share."""
    low: float | None
    high: float | None
    """Interval of `behind` at the level of the decision, two-sided."""
    chance: float | None
    """Of a difference like this one if there were none, corrected for rivals and looks, at most 1."""
    out: bool
    """Whether it is shown not to be the best."""
    failed: bool = False
    """Whether a repeat of it came to no loss."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the repeats say, and which come next."""

    kind: Kind
    """`none`: there is no candidate. `alone`: a single one, nothing to compare. `running`: repeats are to come.
    `left`: one is left, but repeats of others came to no loss, so that it was not compared with all of them."""
    choice: int | None
    """The winner, the one that is left, the cheapest of those tied, or the one that leads."""
    tied: tuple[int, ...] = ()
    """Numbers of those that are tied."""
    standings: tuple[Standing, ...] = ()
    """The best first, those that are out last."""
    wanted: tuple[Cell, ...] = ()
    """Repeats to be trained next; empty unless `running`."""
    margin: float = MARGIN
    noise: float | None = None
    """Standard deviation between trainings of one configuration, beside what their blocks have in common. A share."""
    freedoms: int = 0
    blocks: int = 0
    epochs: int = 0
    """That the repeats have cost."""
    level: float = ALPHA
    """Of a single test."""
    screened: tuple[str, int] | None = None
    """(precision of the search's trials, the one with the lowest loss among them), where the repeats have another."""
    more: int | None = None
    """Further repeats that a decision would take, as far as this can be told; None for more than
    `LONGEST_FORECAST`."""

    @property
    def names(self) -> bool:
        """Whether `choice` is the study's result, and does not only lead."""
        return self.kind in ("winner", "left", "tied")


def race(candidates: Sequence[Candidate], losses: Mapping[Cell, float | None], limits: Limits) -> Verdict:
    """The verdict so far. Pure: the same losses give the same race, on any host, however often it was interrupted.

    Args:
        candidates: The leaders, the best first.
        losses: Validation loss of each repeat that has ended, by cell; None for one that has none.
        limits: What it may cost.
    """
    if not candidates:
        return Verdict(kind="none", choice=None)
    if len(candidates) == 1:
        return Verdict(kind="alone", choice=candidates[0].number)
    return _Race(candidates, losses, limits).run()


class _Race:
    """One pass through the rounds from the first block on."""

    def __init__(self, candidates: Sequence[Candidate], losses: Mapping[Cell, float | None], limits: Limits) -> None:
        self.all = list(candidates)
        self.losses = losses
        self.limits = limits
        self.epochs_of = {c.number: c.epochs for c in candidates}
        self.left = [c.number for c in candidates]
        self.failed: set[int] = set()
        self.n = 0
        self._when_out: dict[tuple[int, int], tuple[float, float, int, float]] = {}
        """By (one that went out, one that was left): `pair` and the level of its test then. With those left later, the
        deviation is another, and the interval would not be that of the test which the candidate lost."""
        self._pooled: dict[tuple[int, tuple[int, ...]], tuple[float, int]] = {}
        first = min(FIRST, limits.blocks)
        a_block = max(1, sum(self.epochs_of.values()))
        affordable = limits.blocks if math.isinf(limits.epochs) else min(limits.blocks, int(limits.epochs // a_block))
        self.looks = 1 + max(0, affordable - first)
        """That the budget allows if no candidate drops out."""
        self.level = self.level_of(1)

    def run(self) -> Verdict:
        rivals = len(self.all) - 1
        step = min(FIRST, self.limits.blocks)
        look = 0
        while True:
            wanted = tuple(
                (number, block)
                for block in range(self.n + 1, self.n + step + 1)
                for number in self.left
                if (number, block) not in self.losses
            )
            if wanted:
                return self.verdict("running", self.leader() if self.n else self.all[0].number, wanted=wanted)
            self.n += step
            step = 1
            look += 1
            self.level = self.level_of(look)
            # Who has failed, and who is out.
            for number in list(self.left):
                if any(self.losses[number, block] is None for block in range(1, self.n + 1)):
                    self.failed.add(number)
                    self.left.remove(number)
            if not self.left:
                return self.verdict("undecided", None)
            beaten = [a for a in self.left if any(self.beats(b, a, rivals) for b in self.left if b != a)]
            for a in beaten:
                self._when_out |= {(a, b): (*self.pair(a, b), self.level) for b in self.left if b != a}
            self.left = [number for number in self.left if number not in beaten]
            if len(self.left) == 1:
                return self.verdict("left" if self.failed else "winner", self.left[0])
            cheapest = self.cheapest_of_tied()
            if cheapest is not None:
                return self.verdict("tied", cheapest, tied=tuple(self.left))
            cost = sum(self.epochs_of[number] for number in self.left)
            if self.n >= self.limits.blocks or self.spent() + cost > self.limits.epochs:
                return self.verdict("undecided", self.leader())

    def level_of(self, look: int) -> float:
        """Of the tests of a look. They add up to `ALPHA`, with the looks that dropped candidates leave room for: those
        get a half of the last one's level, then a quarter, and so on."""
        return ALPHA / self.looks / 2 ** max(0, look - self.looks + 1) if look >= self.looks else ALPHA / self.looks

    def spent(self) -> int:
        """Epochs of all repeats so far."""
        return sum(self.epochs_of[number] for number, _ in self.losses if number in self.epochs_of)

    def series(self, number: int) -> list[float]:
        """Logarithms of a candidate's losses, block by block, up to the first that is missing."""
        found: list[float] = []
        for block in range(1, self.n + 1):
            loss = self.losses.get((number, block))
            if loss is None:
                break
            found.append(math.log(loss))
        return found

    def leader(self) -> int:
        """The lowest mean of those left."""
        return min(self.left, key=lambda number: (fmean(self.series(number)), number))

    def pooled(self) -> tuple[float, int]:
        """(standard deviation of a loss beside candidate and block, its degrees of freedom) of those left."""
        key = (self.n, tuple(self.left))
        if key not in self._pooled:
            self._pooled[key] = residual([self.series(number) for number in self.left])
        return self._pooled[key]

    def pair(self, a: int, b: int) -> tuple[float, float, int]:
        """(how far `a` lies behind `b`, the standard error of it, its degrees of freedom)."""
        differences = [x - y for x, y in zip(self.series(a), self.series(b), strict=False)]
        n = len(differences)
        if n < 2:
            return (differences[0] if differences else 0.0), math.inf, 1
        deviation, freedoms = stdev(differences), n - 1
        if a in self.left and b in self.left and len(self.left) > 2:
            of_one, freedoms = self.pooled()
            deviation = of_one * math.sqrt(2)
        return fmean(differences), max(deviation, 1e-12) / math.sqrt(n), freedoms

    def beats(self, b: int, a: int, rivals: int) -> bool:
        """Whether `b` is shown to be better than `a`."""
        mean, error, freedoms = self.pair(a, b)
        return mean > quantile(self.level / rivals, freedoms) * error

    def margin(self) -> float:
        """Largest difference that counts as none."""
        return min(max(MARGIN, math.sqrt(2) * self.pooled()[0]), MARGIN_MOST)

    def cheapest_of_tied(self) -> int | None:
        """The cheapest that is at most the margin worse than each other; None if there is none."""
        margin = self.margin()
        cost = {c.number: (c.cost, c.number) for c in self.all}
        for a in sorted(self.left, key=cost.__getitem__):
            pairs = [self.pair(a, b) for b in self.left if b != a]
            if all(mean + quantile(TIE_ALPHA, freedoms) * error < margin for mean, error, freedoms in pairs):
                return a
        return None

    def forecast(self) -> int | None:
        """Further repeats of those left until a winner or a tie, if means and deviation stay what they are."""
        leader = self.leader()
        pairs = [self.pair(a, leader) for a in self.left if a != leader]
        if not pairs or any(math.isinf(error) for _, error, _ in pairs):
            return None
        margin, rivals, k = self.margin(), len(self.all) - 1, len(self.left)
        for n in range(self.n + 1, self.n + LONGEST_FORECAST // k + 1):
            level = self.level / 2
            free = max(n - 1, (k - 1) * (n - 1) if k > 2 else 1)
            shrink = math.sqrt(self.n / n)
            won = all(m > quantile(level / rivals, free) * e * shrink for m, e, _ in pairs)
            tied = all(-m + quantile(TIE_ALPHA, free) * e * shrink < margin for m, e, _ in pairs)
            if won or tied:
                return (n - self.n) * k
        return None

    def verdict(
        self, kind: Kind, choice: int | None, *, wanted: tuple[Cell, ...] = (), tied: tuple[int, ...] = ()
    ) -> Verdict:
        rivals = len(self.all) - 1
        reference = choice if choice is not None and self.n else None
        standings = [self.standing(c.number, reference, rivals) for c in self.all] if self.n else []
        order = {c.number: i for i, c in enumerate(self.all)}
        standings.sort(key=lambda s: (s.failed, s.out, s.mean if s.mean is not None else math.inf, order[s.number]))
        noise, freedoms = residual([self.series(c.number) for c in self.all if c.number not in self.failed])
        return Verdict(
            kind=kind,
            choice=choice,
            tied=tied,
            standings=tuple(standings),
            wanted=wanted,
            margin=self.margin() if self.n and len(self.left) > 1 else MARGIN,
            noise=noise if freedoms else None,
            freedoms=freedoms,
            blocks=self.n,
            epochs=self.spent(),
            level=self.level,
            more=self.forecast() if kind == "undecided" and len(self.left) > 1 else None,
        )

    def standing(self, number: int, reference: int | None, rivals: int) -> Standing:
        series = self.series(number)
        behind = low = high = chance = None
        if reference is not None and number != reference and number not in self.failed:
            now = (*self.pair(number, reference), self.level)
            mean, error, freedoms, level = self._when_out.get((number, reference), now)
            reach = quantile(level / rivals, freedoms) * error
            behind, low, high = (math.expm1(x) for x in (mean, mean - reach, mean + reach))
            chance = min(1.0, above(mean / error, freedoms) * rivals * ALPHA / level)
        return Standing(
            number=number,
            repeats=len(series),
            mean=math.exp(fmean(series)) if series else None,
            behind=behind,
            low=low,
            high=high,
            chance=chance,
            out=number not in self.left,
            failed=number in self.failed,
        )


def residual(rows: Sequence[Sequence[float]]) -> tuple[float, int]:
    """(standard deviation of what is left of each value beside its row's and its column's mean, degrees of freedom).

    Args:
        rows: A candidate's values by block each; only the blocks that all have count.
    """
    n = min((len(row) for row in rows), default=0)
    k = len(rows)
    freedoms = (k - 1) * (n - 1)
    if k < 2 or n < 2:
        return 0.0, 0
    cut = [list(row[:n]) for row in rows]
    whole = fmean(value for row in cut for value in row)
    columns = [fmean(row[j] for row in cut) for j in range(n)]
    means = [fmean(row) for row in cut]
    squares = sum((cut[i][j] - means[i] - columns[j] + whole) ** 2 for i in range(k) for j in range(n))
    return math.sqrt(squares / freedoms), freedoms
