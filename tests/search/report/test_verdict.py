"""The verdict where it is shown: the log in both languages, MLflow's tags, the measured noise, the next steps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest

from search import export, leaderboard, records
from search.captions import CAPTIONS, IMAGES
from search.diagnosis.noise import VAL_NOISE
from search.records import StudyRecord, TrialRecord
from search.report import card
from search.report.facts import gather
from search.report.render import markdown
from search.terminal import summary
from search.verdict import text
from search.verdict.leaders import verdict_of
from search.verdict.race import LONGEST_FORECAST, Verdict
from search.verdict.tested import ATTRIBUTE, TestLoss, TestLosses
from tests.support.report_data import study, trial

RULES = {"top": 2, "seeds": 3}
LOSSES = [(1.6, 1.5), (1.4, 1.41)]


def repeat(number: int, of: int, block: int, value: float) -> TrialRecord:
    attrs = {records.REPEAT_OF: of, records.BLOCK: block, records.TRAINS_TO: 2, records.TRAIN_LOSSES: [1.6, 1.4]}
    values = {"learning_rate": (of + 1) * 1e-4, "seed": 42 + block, "split_seed": block}
    found = trial(
        number, [(1.6, 1.5), (1.4, value)], state="PRUNED", reason=records.REPEAT, attrs=attrs, values=values
    )
    return replace(found, value=value)


def repeated(**losses: list[float]) -> StudyRecord:
    """Two trials, each with its repeats: `repeated(a=[...], b=[...])`."""
    own = [
        trial(n, LOSSES, values={"learning_rate": (n + 1) * 1e-4}, attrs={records.TRAIN_LOSSES: [1.6, 1.4]})
        for n in range(2)
    ]
    again = [
        repeat(2 + 3 * n + block, n, block + 1, value)
        for n, series in enumerate(losses.values())
        for block, value in enumerate(series)
    ]
    found = study([*own, *again])
    return replace(found, attrs={**found.attrs, records.CONFIRM: RULES})


@pytest.mark.parametrize(
    ("losses", "kind", "words"),
    [
        ({"a": [1.40, 1.45, 1.38], "b": [1.50, 1.55, 1.481]}, "winner", ("winner: trial 0", "胜者：实验 0")),
        ({"a": [1.40, 1.45, 1.38], "b": [1.401, 1.449, 1.381]}, "tied", ("tied: trials 0, 1", "平局：实验 0、1")),
        ({"a": [1.40, 1.45, 1.38], "b": [1.45, 1.39, 1.39]}, "undecided", ("not decided: trial", "尚无定论：实验")),
        ({"a": [1.40], "b": []}, "running", ("not decided yet", "尚无定论：领先实验")),
    ],
)
def test_every_kind_is_in_the_log_in_both_languages(
    losses: dict[str, list[float]], kind: str, words: tuple[str, str]
) -> None:
    facts = gather(repeated(**losses))
    assert facts.verdict is not None and facts.verdict.kind == kind
    english, chinese = markdown(facts, "en", {}), markdown(facts, "zh", {})
    assert "## ⚖️ Verdict" in english and words[0] in english
    assert "## ⚖️ 结论" in chinese and words[1] in chinese
    assert words[0] in text.sentence(facts.verdict)
    named = kind in ("winner", "tied")  # who only leads is not named
    assert ("named by the repeats" in english) == ("由重复实验选定" in chinese) == named


def test_repeats_are_no_experiments_and_count_nowhere_else() -> None:
    record = repeated(a=[1.0, 1.01, 1.02], b=[1.1, 1.12, 1.13])
    facts, without = gather(record), gather(study(record.trials[:2]))
    assert [e.number for e in facts.experiments] == [0, 1] and len(facts.repeats) == 6
    assert facts.best is not None and without.best is not None
    assert facts.best.best.number == without.best.best.number == 0
    assert replace(facts.budget, again=(0, 0.0)) == without.budget and facts.states == without.states
    assert not facts.incomparable
    assert leaderboard.summary(record.trials).startswith("2 trials (2 COMPLETE), 4 epochs, and")
    assert leaderboard.summary(record.trials).endswith(", and 6 repeats, 12 epochs")
    heads, rows = leaderboard.rows(record.trials)
    assert "seed" not in heads and [row[1] for row in rows][2:5] == [f"{n} (repeat of 0)" for n in (2, 3, 4)]


def test_budget_and_date_are_those_of_repeats_and_test_losses_too() -> None:
    """The overview left out more epochs than it counted, and the log was older than its last repeat."""
    record = repeated(a=[1.0, 1.01, 1.02], b=[1.1, 1.12, 1.13])
    facts = gather(record)
    assert (facts.budget.epochs, facts.budget.again) == (4, (12, 6 * 2 * 75.0))
    ends = [trial.end_s or 0.0 for trial in record.trials]
    assert facts.updated_s == max(ends) > max(ends[:2])
    english, chinese = markdown(facts, "en", {"timeline": "t.svg"}), markdown(facts, "zh", {"timeline": "t.svg"})
    assert "- **Budget**: 4 epochs in 5 min, and 12 epochs in 15 min by 6 repeats on" in english
    assert "- **开销**: 4 个 epoch，5 分钟，另有 6 次重复训练：12 个 epoch，15 分钟，" in chinese
    assert "5 min of training; not drawn: 12 epochs in 15 min by repeats" in english
    assert "(the latest trial, repeat or test loss)_" in english
    assert "（最近一次实验、重复训练或测试 loss）_" in chinese
    later = (facts.updated_s or 0.0) + 60
    losses = {**read((0, 1.4321, None), (1, 1.5432, (0.0776, 0.05, 0.1)))[ATTRIBUTE], "read_s": later}
    assert gather(replace(record, attrs={**record.attrs, ATTRIBUTE: losses})).updated_s == later
    none = gather(study(record.trials[:2]))
    assert none.budget.again == (0, 0.0) and "repeat or test loss" not in markdown(none, "en", {})


def test_who_was_no_candidate_is_said_and_why() -> None:
    """A trial within noise of the lowest was neither repeated nor mentioned, and advised to repeat itself."""
    record = repeated(a=[1.40, 1.45, 1.38], b=[1.401, 1.449, 1.381])
    third = trial(8, [(1.6, 1.5), (1.4, 1.412)], values={"lora_r": 4}, attrs={records.TRAIN_LOSSES: [1.6, 1.4]})
    facts = gather(replace(record, trials=(*record.trials, third)))
    assert (facts.passed_over.trials, facts.passed_over.why, facts.candidates) == ((8,), "asked", (0, 1))
    english, chinese = markdown(facts, "en", {}), markdown(facts, "zh", {})
    said = "as many as were asked for. Not repeated, though as near: trial [8]"
    assert f"**Candidates** were trials at most 3.4 % above the lowest, the lowest first: {said}" in english
    assert "取所要求的个数。同样接近而未重复的有：实验 [8]" in chinese
    (line,) = re.findall(r"^- \S+ \*\*trial 8\*\*.*$|^### Experiment 8 .*?(?=^##)", english, re.M | re.S)
    assert re.search(r"trial \[8\]\(\S+\) was not among the candidates that are repeated", line)
    assert "repeat both" not in line
    everyone = markdown(gather(record), "en", {})
    assert "at most 3.4 % above the lowest, the lowest first.\n" in everyone


def test_captions_begin_with_the_trial_that_is_named() -> None:
    """They showed the two lowest losses, not the trial that the log recommends."""
    record = repeated(a=[1.50, 1.55, 1.481], b=[1.40, 1.45, 1.38])
    said = [replace(t, attrs={**t.attrs, CAPTIONS: [f"said by {t.number}"]}) for t in record.trials]
    pictured = {"images": ["a.png"], "labels": [None], "references": ["a ship"], "instruction": "?", "base": ["sea"]}
    attrs = {**record.attrs, IMAGES: pictured}
    facts = gather(replace(record, trials=tuple(said), attrs=attrs))
    assert [number for number, _ in facts.captions[0].trials] == [1, 0]
    (line,) = (line for line in markdown(facts, "en", {}).splitlines() if line.startswith("| image"))
    labels = [("1", "recommended"), ("0", "lowest loss")]
    assert re.findall(r"trial (\d)\]\(\S+\) \((.*?)\)", line) == labels
    assert "（推荐）" in markdown(facts, "zh", {})


def test_a_tie_says_what_its_choice_is_chosen_by() -> None:
    """ "The cheapest" was the one that took the most seconds an epoch."""
    tied = Verdict(kind="tied", choice=0, tied=(0, 1), blocks=3)
    assert "the one with the smallest adapter (then the fewest epochs) that is at most" in text.sentence(tied)
    assert "适配器最小（其次 epoch 最少）的是实验 0" in text.sentence(tied, "zh")


def test_noise_is_measured_by_repeats_beside_what_their_splits_have_in_common() -> None:
    alone = gather(study(repeated().trials))
    assert not alone.noise.is_measured and alone.verdict is None
    assert alone.next.command("confirm") == "python -m search.confirm --study rsicap"
    decided = repeated(a=[1.40, 1.45, 1.38, 1.52], b=[1.41, 1.45, 1.39, 1.52])
    noise = gather(decided).noise
    assert noise.is_measured and noise.freedoms == 3 and noise.deviation < VAL_NOISE
    assert len(noise.trials) == 8


def test_measuring_the_noise_is_advised_until_it_is_done_and_then_what_would_decide() -> None:
    open_ = gather(repeated(a=[1.40, 1.45, 1.38], b=[1.44, 1.42, 1.39]), options=("--runs-dir", "my runs"))
    assert open_.verdict is not None and open_.verdict.kind == "undecided" and open_.verdict.more
    decide = open_.next.command("decide")
    assert open_.next.command("confirm") is None and decide is not None
    assert decide.startswith("python -m search.confirm --study rsicap --top 2 --seeds ")
    assert decide.endswith("--runs-dir 'my runs'")
    assert decide in markdown(open_, "en", {})
    done = gather(repeated(a=[1.40, 1.45, 1.38], b=[1.401, 1.449, 1.381]))
    assert done.next.command("confirm") is None and done.next.command("decide") is None


def test_mlflow_has_it_as_tags_and_a_study_without_has_none() -> None:
    record = repeated(a=[1.40, 1.45, 1.38], b=[1.50, 1.55, 1.481])
    tags = summary.study_tags(record.trials, verdict_of(record.trials, record.attrs))
    assert tags["verdict"] == "winner" and tags["verdict.trial"] == tags["best_trial"] == "0"
    assert tags["verdict.epochs"] == "12" and 0 < float(tags["verdict.noise"]) < 0.01
    plain = study(record.trials[:2])
    assert verdict_of(plain.trials, plain.attrs) is None and "verdict" not in summary.study_tags(plain.trials)


@pytest.mark.parametrize(
    "verdict",
    [
        Verdict(kind="none", choice=None),
        Verdict(kind="alone", choice=3),
        Verdict(kind="undecided", choice=None),
        Verdict(kind="undecided", choice=1, more=None),
    ],
)
def test_all_have_words(verdict: Verdict) -> None:
    said: Any = [text.sentence(verdict, "en"), text.sentence(verdict, "zh")]
    assert all("{" not in words and "None" not in words for words in said)
    if verdict.choice == 1:
        assert f"more than {LONGEST_FORECAST}" in said[0]


@pytest.mark.parametrize(
    ("losses", "named"),
    [
        ({"a": [1.40, 1.45, 1.38], "b": [1.50, 1.55, 1.481]}, 0),
        ({"a": [1.50, 1.55, 1.481], "b": [1.40, 1.45, 1.38]}, 1),
    ],
)
def test_the_card_of_an_export_tells_the_verdict_that_chose_it(losses: dict[str, list[float]], named: int) -> None:
    record = repeated(**losses)
    assert export.choose(record, None).number == named
    facts = gather(record)
    assert facts.best is not None and facts.best.best.number == 0
    told = card.verdict(facts, record.trials[named])
    assert f"Verdict: winner: trial {named}, better than the other one" in told
    assert re.search(rf"^- trial {1 - named}: 3 repeats, mean 1.51\d\d, \+7.\d\d % \(.* to .* %\), out$", told, re.M)
    assert ("repeats decided for trial 1" in told) == (named == 1)
    assert "named by hand" not in told
    if named == 1:
        assert "the lowest of 2 trials that completed on the same rows (1.4100)" in told


def read(*losses: tuple[int, float, tuple[float, float, float] | None], rows: str = "test") -> dict[str, Any]:
    each = tuple(TestLoss(trial=n, epoch=2, loss=v, low=v - 0.05, high=v + 0.05, above=a) for n, v, a in losses)
    found = TestLosses(rows=rows, images=120, scenes=True, fingerprint="f", losses=each)
    return {ATTRIBUTE: json.loads(json.dumps(found.to_dict()))}


WON = {"a": [1.40, 1.45, 1.38], "b": [1.50, 1.55, 1.481]}


@pytest.mark.parametrize("rows", ["test", "unused"])
def test_the_test_loss_of_the_candidates_stands_beside_the_verdict(rows: str) -> None:
    record = repeated(**WON)
    behind = read((0, 1.4321, None), (1, 1.5432, (0.0776, 0.05, 0.1)), rows=rows)
    facts = gather(replace(record, attrs={**record.attrs, **behind}))
    english, chinese = markdown(facts, "en", {}), markdown(facts, "zh", {})
    for log in (english, chinese):
        assert "1.4321" in log and "1.5432" in log and "+7.76" in log and "120" in log
    kinds = {"test": ("of the test split", "测试集的"), "unused": ("that the search did not use", "搜索未使用的")}
    assert all(words in log for words, log in zip(kinds[rows], (english, chinese), strict=True))
    assert "By more than chance" not in english
    assert "test loss, read once on 120 images" in card.verdict(facts, facts.record.trials[0])


def test_a_test_loss_that_speaks_against_the_verdict_is_said() -> None:
    record = repeated(**WON)
    lower = read((0, 1.4321, None), (1, 1.40, (-0.022, -0.03, -0.01)))
    log = markdown(gather(replace(record, attrs={**record.attrs, **lower})), "en", {})
    assert "By more than chance, the test loss of trial [1]" in log and "is below that of [trial 0]" in log


def test_the_test_loss_of_an_earlier_verdict_is_not_shown() -> None:
    record = repeated(**WON)
    earlier = read((1, 1.4321, None), (0, 1.5432, (0.0776, 0.05, 0.1)))
    assert gather(replace(record, attrs={**record.attrs, **earlier})).tested is None
    assert gather(record).tested is None
