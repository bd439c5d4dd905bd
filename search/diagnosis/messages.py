"""Every sentence of the diagnosis, in English and in Chinese, from the same facts.

The words are in `search.diagnosis.texts`. Its templates have these specs: `loss` five digits, `times` two, `rate` as
the log writes rates, `pct` a share in percent, `time` seconds or minutes, `end` why a run ended.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from typing import Any, Final, Literal

from search.diagnosis.finding import IDS, TOO_SLOW, Advice, Finding
from search.diagnosis.texts import ACTIONS, CAUSES, ENDS, EXTRAS, SENTENCES, TITLES
from search.diagnosis.tree import Leaf
from search.diagnosis.tree_texts import LEAVES, QUESTIONS

Lang = Literal["en", "zh"]
LANGS: Final[tuple[Lang, ...]] = ("en", "zh")
STILL_FALLING: Final = "still_falling"


class _Values(string.Formatter):
    """`str.format` with the specs of this module, for named values only."""

    def __init__(self, lang: Lang) -> None:
        self._lang = lang

    def format_field(self, value: Any, format_spec: str) -> str:
        if format_spec == "end":
            return _pick(ENDS[value], self._lang) if value in ENDS else str(value)
        if not format_spec or isinstance(value, str) or value is None:
            return str(value)
        if format_spec == "pct":
            share = 100 * float(value)
            digits = 1 if abs(share) < 9.95 and share != 0 else 0
            return f"{share:.{digits}f}{' %' if self._lang == 'en' else '%'}"
        if format_spec == "time":
            return self._time(float(value))
        if format_spec == "rate":
            return rate(float(value))
        if format_spec == "times" and float(value) >= 100:
            return f"{float(value):.0f}"
        return f"{float(value):.{'5' if format_spec == 'loss' else '2'}g}"

    def _time(self, seconds: float) -> str:
        minute, second = (" min", " s") if self._lang == "en" else (" 分钟", " 秒")
        return f"{seconds / 60:.3g}{minute}" if seconds >= 120 else f"{seconds:.3g}{second}"


def rate(value: float) -> str:
    """A learning rate as the hand-run log writes it: `2e-4`, `5.5e-5`, `0.01`."""
    if value == 0 or abs(value) >= 0.01:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _pick(texts: tuple[str, str], lang: Lang) -> str:
    return texts[LANGS.index(lang)]


def _fill(template: str, values: Mapping[str, Any], lang: Lang) -> str:
    return _Values(lang).vformat(template, (), values)


def title(finding_id: str, lang: Lang = "en") -> str:
    """A finding's name, by its id or by its `key`."""
    return _pick(TITLES[finding_id], lang)


def key(finding: Finding) -> str:
    """What a finding is called by: its id, but a slow run that only lacks epochs is not called too slow."""
    only_epochs = finding.id == TOO_SLOW and finding.cause is None
    return STILL_FALLING if only_epochs else finding.id


def rank(name: str) -> int:
    """The place of a `key` in the order of findings."""
    return IDS.index(TOO_SLOW if name == STILL_FALLING else name)


def sentence(finding: Finding, lang: Lang = "en") -> str:
    """The evidence in one line."""
    values = {"epoch": finding.epoch, "step": finding.step, **finding.evidence}
    parts = [_fill(_pick(SENTENCES[f"{finding.id}.{finding.kind}"], lang), values, lang)]
    for names, english, chinese in EXTRAS.get(finding.id, ()):
        if all(values.get(name) is not None for name in names):
            parts.append(_fill(_pick((english, chinese), lang), values, lang))
    return " ".join("".join(parts).split())


def cause(finding: Finding, lang: Lang = "en") -> str | None:
    """The cause, if it could be shown."""
    return None if finding.cause is None else _pick(CAUSES[finding.cause], lang)


def advice(item: Advice, lang: Lang = "en") -> str:
    """One thing to change: `lower learning_rate: 1e-3 → 2e-4`."""
    text = _fill(_pick(ACTIONS[item.action], lang), {"parameter": item.parameter, "after": item.after}, lang)
    if item.action in ("stop_at_best", "finish", "check", "adapters_float32") or item.after is None:
        return text
    before = "" if item.before is None else f"{_value(item.parameter, item.before)} → "
    return f"{text}{': ' if lang == 'en' else '：'}{before}{_value(item.parameter, item.after)}"


def _value(parameter: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return rate(value) if parameter in ("learning_rate", "adam_epsilon") else f"{value:g}"


def advices(items: Iterable[Advice], lang: Lang = "en") -> tuple[str, ...]:
    """All advice of a finding, in the order to try it."""
    return tuple(advice(item, lang) for item in items)


def question(node: str, lang: Lang = "en") -> str:
    """The question of a node of the decision tree."""
    return _pick(QUESTIONS[node], lang)


def leaf_text(leaf: Leaf | str, lang: Lang = "en") -> str:
    """What a leaf of the decision tree recommends."""
    return _pick(LEAVES[leaf if isinstance(leaf, str) else leaf.name], lang)
