"""Many rows wrong in the same way, told once."""

from __future__ import annotations

import re
from collections.abc import Iterable

ALONE = 5
"""Up to so many rows of one kind are listed each for itself."""
EXAMPLES = 3
"""Of more rows of one kind, so many are shown."""


def grouped(problems: Iterable[str], indent: str = "  - ") -> list[str]:
    """Lines for a message: problems of one kind together, with their number and three examples.

    Args:
        problems: each `place: what is wrong`.
        indent: before each line.
    """
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(kind_of(problem), []).append(problem)
    lines = []
    for kind, members in kinds.items():
        if len(members) <= ALONE:
            lines += [f"{indent}{member}" for member in members]
            continue
        lines.append(f"{indent}{len(members)} rows: {kind}, for example")
        lines += [f"{' ' * len(indent)}  {member}" for member in members[:EXAMPLES]]
    return lines


def kind_of(problem: str) -> str:
    """The problem without its place, its file name and its values."""
    place, _, rest = problem.partition(": ")
    named = re.match(r"(.+?): (?=the (?:image|file)\b)", rest)
    if named:
        rest = rest[named.end() :].replace(named.group(1), "...")
    rest = re.sub(r"\b(must be .*?), but is .*", r"\1", rest)
    rest = re.sub(r"(the (?:file name|folder)) .* (leads out)", r"\1 \2", rest)
    rest = re.sub(r"(?<=\s)'[^']*'", "'...'", rest)
    return re.sub(r"(?<![a-z])\d+(?![a-z])", "...", rest) or place
