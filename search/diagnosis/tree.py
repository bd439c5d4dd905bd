"""The hand-run log's decision tree as data. Every run ends in exactly one leaf.

The log asks three questions: NaN? falling? oscillating or overfitting? Three are added so that no answer is a guess:
whether there are enough epochs to tell, whether a loss that still falls needs only more of them, and in which
direction to change the rate if not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from search.diagnosis.finding import (
    DIVERGED,
    EXPLODING_GRADIENT,
    INCONCLUSIVE,
    NON_FINITE,
    NOT_LEARNING,
    OSCILLATING,
    OVERFITTING,
    TOO_SLOW,
    Finding,
)

SMALL_STEPS = ("low_rate", "straight")
"""Causes of a slow run that more epochs do not mend; without one of them its advice, too, is more epochs."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """One question, decided by whether there is a finding with one of these ids (and kinds, if any are given)."""

    name: str
    """Key of `tree_texts.QUESTIONS`."""
    ids: tuple[str, ...]
    kinds: tuple[str, ...] = ()
    but: tuple[str, ...] = ()
    """Causes with which a finding does not count."""
    answer: bool = True
    """The answer that such a finding gives: `not_learning` answers no to "is it falling?"."""
    yes: str
    """The next node, or a leaf."""
    no: str

    def catches(self, finding: Finding) -> bool:
        """Whether the finding decides this node."""
        known = finding.id in self.ids and (not self.kinds or finding.kind in self.kinds)
        return known and finding.cause not in self.but


TREE: tuple[Node, ...] = (
    Node(name="nan", ids=(NON_FINITE,), yes="non_finite", no="enough"),
    Node(name="enough", ids=(INCONCLUSIVE,), answer=False, yes="falling", no="undecided"),
    Node(
        name="falling", ids=(NOT_LEARNING, TOO_SLOW), answer=False, yes="oscillating_or_overfitting", no="enough_rate"
    ),
    Node(name="enough_rate", ids=(TOO_SLOW,), but=SMALL_STEPS, yes="longer", no="rate"),
    Node(name="rate", ids=(NOT_LEARNING,), kinds=("high_rate",), yes="rate_too_high", no="not_falling"),
    Node(
        name="oscillating_or_overfitting",
        ids=(EXPLODING_GRADIENT, DIVERGED, OSCILLATING, OVERFITTING),
        yes="unstable",
        no="good",
    ),
)
"""The first node is the root."""

LEAVES = ("non_finite", "undecided", "rate_too_high", "longer", "not_falling", "unstable", "good")


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """The leaf where a run ended, and the answers that led there."""

    name: str
    """One of `LEAVES`; key of `tree_texts.LEAVES`."""
    path: tuple[tuple[str, bool], ...]
    """(node, answer) from the root on."""
    findings: tuple[str, ...]
    """Ids of the deciding findings; empty if nothing is wrong."""


def leaf(findings: Iterable[Finding]) -> Leaf:
    """The leaf of a run with these findings; without any the run is undecided."""
    found = tuple(findings)
    if not found:
        return Leaf(name="undecided", path=(("nan", False), ("enough", False)), findings=())
    nodes = {node.name: node for node in TREE}
    name, path, deciding = TREE[0].name, [], []
    while name in nodes:
        node = nodes[name]
        hits = [f.id for f in found if node.catches(f)]
        answer = node.answer if hits else not node.answer
        deciding.extend(hits)
        path.append((name, answer))
        name = node.yes if answer else node.no
    return Leaf(name=name, path=tuple(path), findings=tuple(dict.fromkeys(deciding)))
