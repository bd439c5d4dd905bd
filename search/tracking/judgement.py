"""What a trial's run in MLflow says of it: tags to filter by, and the description on its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from search.diagnosis import Finding
from search.diagnosis.messages import key, sentence
from search.diagnosis.texts import TITLES
from search.markdown import escape

_PREFIX = "finding."
_OURS = re.compile(rf"\*\*[A-Z]+\*\* \(\w*\): .*|- `({'|'.join(TITLES)})`: .*|")
"""A line of a description that `description` made."""


def tags(findings: Sequence[Finding], before: Mapping[str, str] | None = None) -> dict[str, str]:
    """Tags `finding` (the most severe, by its `key`), `findings` (all, with commas) and `finding.<key>` ("true").

    Args:
        findings: The most severe first.
        before: The run's tags until now: a `finding.<key>` that no longer holds becomes "false".
    """
    found = [key(finding) for finding in findings]
    if not found:
        return {}
    gone = {name: "false" for name in before or () if name.startswith(_PREFIX)}
    return {**gone, **{_PREFIX + name: "true" for name in found}, "finding": found[0], "findings": ", ".join(found)}


def description(state: str, reason: str | None, detail: str | None, findings: Sequence[Finding]) -> str:
    """Markdown for the run's page: how it ended, and each finding with its evidence."""
    lines = [f"**{state}** ({reason or ''}): {escape(detail or '')}", ""]
    lines += [f"- `{key(finding)}`: {escape(sentence(finding))}" for finding in findings]
    return "\n".join(lines)


def is_ours(text: str) -> bool:
    """Whether a run's description has nothing that a person wrote."""
    return all(_OURS.fullmatch(line) for line in text.splitlines())
