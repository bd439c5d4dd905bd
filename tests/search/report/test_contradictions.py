"""No log contradicts itself: over made-up studies of all kinds, no two sentences of a list stand side by side."""

from __future__ import annotations

import functools
import math
import random
import re
from dataclasses import replace
from typing import Any

import pytest

from search import records
from search.diagnosis import finding as ids
from search.diagnosis.messages import LANGS, Lang
from search.diagnosis.tree import SMALL_STEPS
from search.records import StudyRecord, TrialRecord
from search.report.facts import Facts, gather
from search.report.render import markdown
from tests.support.report_data import study, trial

SEEDS = range(24)
Curve = list[tuple[float | None, float | None]]


def curve(rng: random.Random, kind: str, epochs: int, noise: float, depth: float) -> Curve:
    """Losses of a run that falls, is a line, overfits, diverges, swings, is flat, or breaks."""
    found: Curve = []
    for n in range(1, epochs + 1):
        share = math.log(n) / math.log(max(epochs, 2))
        train, val = 2.0 - (2.0 - depth) * share, 1.8 - (1.8 - depth) * share
        if kind == "line":
            train = val = 1.8 - 0.004 * n
        elif kind == "overfits" and n > epochs // 2:
            val = depth + 0.06 * (n - epochs // 2)
        elif kind == "diverges" and n > epochs // 2:
            # As experiment 3 did it: the validation loss leaves its best first, then both are up.
            train, val = 1.95 if n > epochs // 2 + 1 else train, val + 0.08 * (n - epochs // 2)
        elif kind == "swings":
            train += 0.2 * (n % 2)
        elif kind == "flat":
            train = val = 2.0
        elif kind == "breaks" and n > 1:
            return found
        found.append((train * (1 + rng.gauss(0, noise / 2)), val * (1 + rng.gauss(0, noise))))
    return found


KINDS = ("falls", "falls", "falls", "line", "overfits", "diverges", "swings", "flat", "breaks")


def one(rng: random.Random, number: int, epochs: int, noise: float) -> TrialRecord:
    kind = rng.choice(KINDS)
    rank = rng.choice([4, 8, 16, 32])
    values = {
        "learning_rate": 10 ** rng.uniform(-5.3, -2.9), "lora_r": rank, "lora_alpha": rank * rng.choice([1, 2, 4]),
        "batch_size": rng.choice([2, 4, 8]), "warmup_steps": rng.choice([0, 20, 200, 5000]), "num_epochs": epochs,
        "max_samples": rng.choice([400, 400, 400, 100]), "lora_dropout": rng.choice([0.0, 0.05, 0.1]),
    }  # fmt: skip
    losses = curve(rng, kind, epochs, noise, rng.uniform(1.2, 1.5))
    how: dict[str, Any] = {}
    if kind == "breaks":
        how = {"state": "PRUNED", "reason": records.NON_FINITE, "violated": (records.NON_FINITE,)}
    elif kind == "diverges" and rng.random() < 0.5:
        how = {"state": "PRUNED", "reason": records.DIVERGED}
    elif rng.random() < 0.3:
        losses = losses[: rng.randint(1, epochs)]
        how = {"state": "PRUNED", "reason": records.SUPERSEDED, "detail": "paused"}
    elif kind == "overfits" and rng.random() < 0.5:
        how = {"reason": records.RISING}
    elif rng.random() < 0.05:
        how = {"state": "FAIL", "reason": records.ERROR, "detail": "gone"}
    label = "by hand" if rng.random() < 0.1 else None
    return trial(number, losses, values=values, label=label, **how)


def made_up(seed: int) -> StudyRecord:
    rng = random.Random(seed)
    epochs, noise = rng.choice([4, 6, 10, 15]), rng.choice([0.0, 0.003, 0.01, 0.03])
    trials = [one(rng, n, epochs, noise) for n in range(rng.choice([1, 3, 6, 9, 12]))]
    complete = [t for t in trials if t.state == "COMPLETE" and t.value is not None][:3]
    found = study(trials)
    if len(complete) < 2 or rng.random() < 0.5:
        return found
    again: list[TrialRecord] = []
    for block in (1, 2, 3):
        for t in complete:
            attrs = {records.REPEAT_OF: t.number, records.BLOCK: block, records.TRAINS_TO: t.best_epoch}
            values = {**t.config, "seed": 42 + block, "split_seed": block}
            value = (t.value or 0.0) * (1 + rng.gauss(0, max(noise, 0.002)))
            each = trial(len(trials) + len(again), [(1.6, value)], state="PRUNED", reason=records.REPEAT, attrs=attrs)
            again.append(replace(each, config=values, value=value, attrs={**each.attrs, records.CONFIG: values}))
    rules = {"top": len(complete), "seeds": 3}
    return replace(study([*trials, *again]), attrs={**found.attrs, records.CONFIRM: rules})


@functools.cache
def told(seed: int) -> tuple[Facts, dict[Lang, str]]:
    facts = gather(made_up(seed))
    return facts, {lang: markdown(facts, lang, {}, "tuning-log-data.csv") for lang in LANGS}


def of_trials(text: str, lang: Lang) -> dict[int, str]:
    """What is told of each trial, by number."""
    word, line = ("Experiment", "trial") if lang == "en" else ("实验", "实验")
    history = text.split("## 🔧")[1].split("## 📈")[0]
    # What another trial had been advised is quoted, not said of this one.
    history = re.sub(r" taught \(.*?\) with|的教训（.*?）取", "", history)
    parts = {
        int(n): body for n, body in re.findall(rf"^### {word} (\d+)[^\n]*\n(.*?)(?=^### |\Z)", history, re.M | re.S)
    }
    return parts | {int(n): body for n, body in re.findall(rf"^- \S+ \*\*{line} (\d+)\*\*(.*)$", history, re.M)}


OF_A_TRIAL: dict[Lang, tuple[tuple[str, str], ...]] = {
    "en": (
        (r"`diverged`", r"`overfitting`"),
        (r"`healthy`", r"`(overfitting|diverged|oscillating|too_slow|not_learning)`"),
        (r"raise num_epochs", r"raise learning_rate|raise lora_r"),
        (r"raise learning_rate", r"lower learning_rate"),
        (r"effective rate .* is too low", r"lower learning_rate|much of the training was warmup|never reached"),
        (r"\*\*Within noise\*\*", r"the difference is due to it|\*\*Better\*\*|\*\*Worse\*\*"),
        (r"\*\*Better\*\*", r"\*\*Next\*\*: keep"),
        (r"Stopped behind|Stopped while", r"let it run all"),
        (r"stayed within noise of it", r"Take the checkpoint"),
        (r"repeat both with other seeds", r"both were repeated"),
        (r"No loss to compare", r"\*\*Better\*\*|\*\*Worse\*\*|\*\*Within noise\*\*"),
        (r"still falling", r"too slow\*\*"),
    ),
    "zh": (
        (r"`diverged`", r"`overfitting`"),
        (r"`healthy`", r"`(overfitting|diverged|oscillating|too_slow|not_learning)`"),
        (r"提高 num_epochs", r"提高 learning_rate|提高 lora_r"),
        (r"提高 learning_rate", r"降低 learning_rate"),
        (r"等效学习率（.*过低", r"降低 learning_rate|warmup 占了|达不到设定"),
        (r"\*\*在噪声范围内\*\*", r"差异由它引起|\*\*更好\*\*|\*\*更差\*\*"),
        (r"时被终止", r"跑完全部"),
        (r"此后在噪声范围内波动", r"应取 epoch"),
        (r"没有可比的 loss", r"\*\*更好\*\*|\*\*更差\*\*"),
        (r"仍在下降\*\*", r"收敛过慢\*\*"),
    ),
}
OF_A_LOG: dict[Lang, tuple[tuple[str, str], ...]] = {
    "en": (
        (r"nothing was trained again|Nothing was repeated|nothing was repeated", r"named by the repeats"),
        (r"\*\*not decided", r"named by the repeats"),
        (r"\*\*Epochs\*\*: enough", r"\*\*Train longer\*\*"),
        (r"matters most, and this is well founded", r"what matters most is not yet known"),
        (r"none is shown to matter", r"Higher .* went with|The medians for"),
        (r"no result yet", r"\*\*winner|\*\*tied"),
        (r"no trial overfitted", r"overfitting ×"),
        (r"winner: trial|tied: trials", r"\*\*Tell the leaders apart|\*\*Decide\*\*"),
        (r"this study agrees", r"this study does not show it"),
        (r"Nothing is open", r"\*\*Next command\*\*"),
    ),
    "zh": (
        (r"还没有换种子重复训练", r"由重复实验选定"),
        (r"\*\*尚无定论", r"由重复实验选定"),
        (r"大多已经足够", r"\*\*训练更久\*\*"),
        (r"影响最大，依据充分", r"哪个参数影响最大尚不清楚"),
        (r"看不出哪个参数有影响", r"取值越大|各范围的中位数相差"),
        (r"没有实验过拟合", r"过拟合 ×"),
        (r"胜者：实验|平局：实验", r"分出领先者的高下|做出判定"),
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
def test_no_two_sentences_contradict_each_other(seed: int) -> None:
    facts, texts = told(seed)
    for lang, text in texts.items():
        parts = of_trials(text, lang)
        assert set(parts) == {e.number for e in facts.experiments}
        for number, part in parts.items():
            for a, b in OF_A_TRIAL[lang]:
                assert not (re.search(a, part) and re.search(b, part)), (seed, number, a, b, part)
        for a, b in OF_A_LOG[lang]:
            assert not (re.search(a, text) and re.search(b, text)), (seed, a, b)


@pytest.mark.parametrize("seed", SEEDS)
def test_verdict_cause_advice_and_place_come_from_one_source(seed: int) -> None:
    facts, _ = told(seed)
    for e in facts.experiments:
        main = e.main_finding
        if main is None or e.leaf is None:
            continue
        first = next(iter(main.advice), None)
        wanted = first.parameter if first is not None and first.action == "raise" else None
        if main.id == ids.TOO_SLOW:
            assert (e.leaf.name == "not_falling") == (main.cause in SMALL_STEPS)
            assert wanted != "num_epochs" or e.leaf.name == "longer"
            assert wanted not in ("learning_rate", "lora_r") or e.leaf.name == "not_falling"
        assert not (e.has(ids.DIVERGED) and e.has(ids.OVERFITTING))
        assert not any(row.is_best and row.mark == "bad" for row in e.rows)
        for item in e.learnt:
            if item.kind in ("remedy_worked", "remedy_failed"):
                assert e.has(item.values["finding"]) == (item.kind == "remedy_failed")
    assert {*facts.next.falling} <= {*facts.next.ran}
    assert not {*facts.next.falling} & {*facts.tree["not_falling"]}


@pytest.mark.parametrize("seed", SEEDS)
def test_a_parameter_is_told_once_and_by_one_comparison(seed: int) -> None:
    facts, _ = told(seed)
    best = facts.best
    for table in facts.tables.values():
        if table.direction is not None:
            assert table.chance is None or (table.differs and not table.within_noise)
        for row in table.rows:
            level = {best.best.number, *best.within_noise} if best is not None else set()
            assert row.verdict != "conservative" or not level & {*row.trials}


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_named_is_recommended_and_done_steps_are_not_advised(seed: int) -> None:
    facts, texts = told(seed)
    if facts.verdict is not None and facts.verdict.kind in ("winner", "tied"):
        assert facts.chosen is not None and facts.chosen.number == facts.verdict.choice
        assert facts.next.command("confirm") is None and facts.next.command("decide") is None
    kinds = [step.kind for step in facts.next.steps]
    assert len(kinds) == len(set(kinds))
    assert all(step.command in texts[lang] for step in facts.next.steps for lang in LANGS)
    assert not any("trainer.run" in step.command for step in facts.next.steps)


@pytest.mark.parametrize("seed", SEEDS)
def test_chinese_has_no_stray_spaces_and_counts_nothing_as_zero(seed: int) -> None:
    text = re.sub(r"```.*?```", "", told(seed)[1]["zh"], flags=re.DOTALL)
    text = re.sub(r"\[([^\]]*)\]\([^()]*\)", r"\1", re.sub(r"`[^`]*`", "x", text))
    wrong = re.findall(r".{6}(?:[。，；：、（）”“] [一-鿿]|[一-鿿] [。，；：、（）]|有 0 次|中 0 次).{0,6}", text)
    assert wrong == []
