"""The verdict in words, in English and Chinese, for the terminal, the log, MLflow and the dashboard's note alike."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from search.diagnosis.messages import LANGS, Lang
from search.verdict.race import ALPHA, LONGEST_FORECAST, TIE_ALPHA, Standing, Verdict

# Each entry: (English, Chinese).
SENTENCES: Final = {
    "winner": (
        "winner: trial {choice}, better than each of the other {rivals} on the same {blocks} seeds and splits "
        "(paired t-test; a wrong winner in at most {alpha} of studies)",
        "胜者：实验 {choice}，在相同的 {blocks} 组种子与划分上优于其余 {rivals} 个"
        "（配对 t 检验；误判胜者的概率不超过 {alpha}）",
    ),
    "winner_of_two": (
        "winner: trial {choice}, better than the other one on the same {blocks} seeds and splits "
        "(paired t-test; a wrong winner in at most {alpha} of studies)",
        "胜者：实验 {choice}，在相同的 {blocks} 组种子与划分上优于另一个（配对 t 检验；误判胜者的概率不超过 {alpha}）",
    ),
    "left": (
        "only trial {choice} is left: repeats of trial {failed} came to no loss, so they were not compared",
        "只剩实验 {choice}：实验 {failed} 的重复训练未得到 loss，因此未作比较",
    ),
    "left_and_better": (
        "only trial {choice} is left: better than trial {beaten} on the same {blocks} seeds and splits (paired "
        "t-test), but repeats of trial {failed} came to no loss, so they were not compared",
        "只剩实验 {choice}：在相同的 {blocks} 组种子与划分上优于实验 {beaten}（配对 t 检验），"
        "但实验 {failed} 的重复训练未得到 loss，因此未作比较",
    ),
    "tied": (
        "tied: trials {tied} are not told apart on the same {blocks} seeds and splits; the one with the smallest "
        "adapter (then the fewest epochs) that is at most {margin} worse than any of them (with {sure} confidence for "
        "each) is trial {choice}",
        "平局：实验 {tied} 在相同的 {blocks} 组种子与划分上分不出高下；"
        "其中最多差 {margin}（每一对的置信度 {sure}）而适配器最小（其次 epoch 最少）的是实验 {choice}",
    ),
    "undecided": (
        "not decided: trial {choice} leads on {blocks} seeds and splits, within noise of the others; it would take "
        "{more} more repeats",
        "尚无定论：实验 {choice} 在 {blocks} 组种子与划分上领先，但与其他实验之差在噪声范围内；还需约 {more} 次重复",
    ),
    "failed": (
        "not decided: none of the leaders came to a loss in each of its repeats",
        "尚无定论：领先的实验重复时都未能每次得到 loss",
    ),
    "alone": (
        "no comparison: beside trial {choice} no other configuration ended with a loss on the same samples",
        "无从比较：除实验 {choice} 外，没有别的配置在相同样本上得到 loss",
    ),
    "running": (
        "not decided yet: repeats of the leaders are still to be trained",
        "尚无定论：领先实验的重复训练还未完成",
    ),
    "none": ("no verdict: no trial is complete", "没有结论：没有完成的实验"),
    "screened": (
        "; the search ran in {precision}, the repeats in the study's own precision: {effect}",
        "；搜索用 {precision}，重复训练用研究本来的精度：{effect}",
    ),
    "unchanged": ("no decision was changed by it", "未改变任何结论"),
    "changed": (
        "the search's lowest loss was trial {lowest}'s, which is not what they name (seeds and splits differ too)",
        "搜索中 loss 最低的是实验 {lowest}，与此不同（种子与划分也不同）",
    ),
    "many": ("more than {}", "{} 以上"),
    "comma": (", ", "、"),
}


def _pick(name: str, lang: Lang) -> str:
    return SENTENCES[name][LANGS.index(lang)]


def share(value: float, lang: Lang = "en") -> str:
    """A share of a loss in percent."""
    return f"{100 * value:.2g}{' %' if lang == 'en' else '%'}"


def listed(numbers: Iterable[int], lang: Lang = "en") -> str:
    """Numbers of trials in a row."""
    return _pick("comma", lang).join(map(str, sorted(numbers)))


def sentence(verdict: Verdict, lang: Lang = "en") -> str:
    """The verdict in one sentence, without a full stop."""
    name: str = "failed" if verdict.kind == "undecided" and verdict.choice is None else verdict.kind
    if verdict.kind == "winner" and len(verdict.standings) == 2:
        name = "winner_of_two"
    failed = [s.number for s in verdict.standings if s.failed]
    beaten = [s.number for s in verdict.standings if s.out and not s.failed]
    if verdict.kind == "left" and beaten:
        name = "left_and_better"
    said = _pick(name, lang).format(
        choice=verdict.choice,
        rivals=len(verdict.standings) - 1,
        blocks=verdict.blocks,
        alpha=share(ALPHA, lang),
        sure=share(1 - TIE_ALPHA, lang),
        tied=listed(verdict.tied, lang),
        failed=listed(failed, lang),
        beaten=listed(beaten, lang),
        margin=share(verdict.margin, lang),
        more=_pick("many", lang).format(LONGEST_FORECAST) if verdict.more is None else verdict.more,
    )
    return said + _screening(verdict, lang)


def _screening(verdict: Verdict, lang: Lang) -> str:
    """Whether the precision of the search has changed a decision, if it was another one."""
    if verdict.screened is None or not verdict.names:
        return ""
    precision, lowest = verdict.screened
    same = lowest in (verdict.choice, *verdict.tied)
    effect = _pick("unchanged" if same else "changed", lang).format(lowest=lowest)
    return _pick("screened", lang).format(precision=precision, effect=effect)


def table(verdict: Verdict) -> list[str]:
    """A line for each candidate, for the terminal."""
    return [_line(standing) for standing in verdict.standings]


def _line(standing: Standing) -> str:
    text = f"trial {standing.number}: {standing.repeats} repeats"
    if standing.mean is not None:
        text += f", mean {standing.mean:.4f}"
    if standing.behind is not None and standing.low is not None and standing.high is not None:
        text += f", {100 * standing.behind:+.2f} % ({100 * standing.low:+.2f} to {100 * standing.high:+.2f} %)"
    if standing.failed:
        return f"{text}, out: a repeat came to no loss"
    return f"{text}, out" if standing.out else text


def tags(verdict: Verdict) -> dict[str, str]:
    """For MLflow's run of the study."""
    found = {"verdict": verdict.kind, "verdict.sentence": sentence(verdict), "verdict.epochs": str(verdict.epochs)}
    if verdict.choice is not None:
        found["verdict.trial"] = str(verdict.choice)
    if verdict.noise is not None:
        found["verdict.noise"] = f"{verdict.noise:.6f}"
    return found
