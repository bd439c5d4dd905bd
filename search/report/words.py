"""Short words of the tuning log, in English and Chinese side by side; its sentences are in the templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from search.diagnosis.messages import LANGS, Lang
from search.diagnosis.texts import ENDS

# Each entry: (English, Chinese).
STATES: Final = {
    "COMPLETE": ("complete", "完成"),
    "PRUNED": ("pruned", "提前终止"),
    "FAIL": ("failed", "失败"),
    "RUNNING": ("running", "进行中"),
    "WAITING": ("waiting", "等待中"),
    "COMPLETE (stopped early)": ("complete (stopped early)", "完成（早停）"),
}

VERDICTS: Final = {
    "unknown": ("not yet known", "尚不清楚"),
    "unstable": ("mostly unstable", "多数不稳定"),
    "aggressive": ("too aggressive", "太激进"),
    "masked": ("not known: the warmup kept the rate from being reached", "无法判断：warmup 未结束，达不到设定值"),
    "conservative": ("too conservative", "太保守"),
    "good": ("good: as low as the best, within noise", "合适：与最佳相当（噪声范围内）"),
    "usable": (
        "usable: its best is as low as the best, its median is not",
        "可用：最好的一次接近最佳，中位数不及",
    ),
    "only": ("the only one with losses: nothing to compare it with", "只有这一档有结果，无从比较"),
    "behind": ("behind the best by more than noise", "逊于最佳，超出噪声"),
}

SIGNS: Final = {
    "train_falls": ("the training loss falls steadily", "训练 loss 平稳下降"),
    "val_follows": ("the validation loss follows", "验证 loss 跟随下降"),
    "finite": ("no NaN or infinity", "无 NaN/Inf 出现"),
    "gradients_stable": ("the gradient norm stays stable", "梯度范数稳定"),
    "train_rises": ("the training loss oscillates or rises", "训练 loss 震荡或上升"),
    "val_rises": ("the validation loss begins to rise (overfitting)", "验证 loss 开始上升（过拟合）"),
    "exploding": ("the gradient explodes", "梯度爆炸"),
    "too_slow": (
        "the loss still falls at the end, too slowly, or nothing is learnt",
        "收敛过慢（到最后仍在下降）或没有学到东西",
    ),
    "warmup": ("the warmup is longer than the training", "warmup 超过总训练步数"),
    "slow_epoch": ("an epoch takes too long", "每个 epoch 过慢"),
}

VERDICT_HEADING: Final = ("⚖️ Verdict", "⚖️ 结论")
REPEATS_HEADING: Final = ("Repeats of the leaders", "领先者的重复实验")
OTHERS_HEADING: Final = ("The other trials, a line each", "其余实验，每个一行")

QUANTITIES: Final = ("effective_rate",)
"""Of these, the ones that are no expression of fields."""

PARAMETERS: Final = {
    "effective_rate": ("effective rate", "等效学习率"),
    "alpha_per_r": ("lora_alpha / lora_r", "lora_alpha / lora_r"),
    "warmup_share": ("warmup / all steps", "warmup / 总步数"),
    "lora_alpha_per_lora_r": ("lora_alpha / lora_r", "lora_alpha / lora_r"),
}

TERMS: Final = {
    "percent": ("{} %", "{}%"),
    "seconds": ("{} s", "{} 秒"),
    "minutes": ("{} min", "{} 分钟"),
    "hours": ("{} h", "{} 小时"),
    "experiment": ("Experiment {}{} ({})", "实验 {}{} ({})"),
    "trial": ("trial {}", "实验 {}"),
    "trials": ("trials {}", "实验 {}"),
    "at_epoch": ("{}, epoch {}", "{} epoch {}"),
    "comma": (", ", "、"),
    "list": (", ", "，"),
    "more": ("{listed} and {more} more", "{listed} 等共 {all} 个"),
    "best": ("  ← best", "  ← 最佳"),
    "log": ("Tuning log: {}", "调参记录: {}"),
    "contents": ("Contents", "目录"),
}
"""Short parts that the program joins itself; `fill` puts the values in."""


def pick(texts: tuple[str, str], lang: Lang) -> str:
    """The text in a language."""
    return texts[LANGS.index(lang)]


def fill(term: str, lang: Lang, *values: object, **named: object) -> str:
    """One of `TERMS` with its values."""
    return pick(TERMS[term], lang).format(*values, **named)


def trials(shown: Sequence[str], total: int, lang: Lang) -> str:
    """Trials in a row; those of the total that are not shown are counted."""
    text = fill("trials" if total > 1 else "trial", lang, fill("comma", lang).join(shown))
    more = total - len(shown)
    return fill("more", lang, listed=text, more=more, all=total) if more else text


def reason(name: str | None, lang: Lang) -> str:
    """A trial's reason in words; an unknown one is returned as it is."""
    return pick(ENDS[name], lang) if name in ENDS else str(name or "")


def parameter(name: str, lang: Lang) -> str:
    """The subject of a table of the log: a field's name, or a quantity derived from several fields."""
    return pick(PARAMETERS[name], lang) if name in PARAMETERS else name


def state(text: str, lang: Lang) -> str:
    """A state with or without its reason, in the form of `search.leaderboard.state_of`: `PRUNED (rising)`."""
    if text in STATES:
        return pick(STATES[text], lang)
    name, _, why = text.partition(" (")
    known = pick(STATES[name], lang) if name in STATES else name
    left, right = ("（", "）") if lang == "zh" else (" (", ")")
    return f"{known}{left}{reason(why.rstrip(')'), lang)}{right}"
