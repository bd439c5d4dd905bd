"""The recorded real runs; from events and records to findings, and from findings to texts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from search import records
from search.diagnosis import (
    IDS,
    TREE,
    Curve,
    Finding,
    curve_from_events,
    curve_from_record,
    diagnose,
    leaf,
    messages,
    texts,
    tree_texts,
)
from search.diagnosis.noise import VAL_NOISE, log_gain, series
from search.diagnosis.recorded import curves, read_runs
from search.diagnosis.tree import LEAVES
from search.records import TrialRecord
from tests.search.diagnosis.curves import (
    FACTS,
    curve,
    ended,
    ids,
    only,
    started,
    step,
)
from trainer.config import TrainConfig
from trainer.events import (
    NonFinite,
    OutOfMemory,
)

RECORDED = Path(__file__).parents[2] / "data" / "recorded-runs.json"


# --- the recorded real runs ---------------------------------------------------------------------------------------


RECORDED_FINDINGS = {
    "grid_v1_large_batch_high_lr_SKIPPED": ["oscillating"],
    "grid_v2_medium_batch_high_rank": ["healthy"],
    "grid_v3_ultra_batch_conservative_SKIPPED": ["too_slow"],
    "grid_v6_exp1_r16_a64_d05_cosine_augmented": ["too_slow"],
    "grid_v6_exp2_r16_a32_d10_linear": ["healthy"],
    "grid_v6_exp2_r16_a48_d10_linear_augmented": ["too_slow"],
    "grid_v6_exp4_r24_a48_d05_cosine_augmented": ["too_slow"],
    "lora_r8_alpha16": ["too_slow", "slow_epoch"],
    "quick_test_epoch0": ["inconclusive"],
    "ultra_conservative_lora_instructblip": ["too_slow"],
}


def test_the_recorded_runs() -> None:
    assert {name: ids(found) for name, found in curves(read_runs(RECORDED))} == RECORDED_FINDINGS


def test_the_noise_is_what_was_measured() -> None:
    """Second differences of validation loss over all recorded runs, as docs/diagnosis.md says."""
    left = []
    for _, found in curves(read_runs(RECORDED)):
        v = [r.val_loss for r in found.epochs if r.val_loss is not None]
        bends = [(v[i - 1] - 2 * v[i] + v[i + 1]) / v[i] for i in range(1, len(v) - 1)]
        left += bends[1:] if len(v) < 8 else bends[2:]
    measured = math.sqrt(sum(d * d for d in left) / len(left) / 6)
    assert len(left) == 61
    assert measured == pytest.approx(VAL_NOISE, rel=0.1)


def test_the_log_law_foretells_the_recorded_gains() -> None:
    """From a prefix, the gain of half as many epochs again; a straight line would promise nearly twice as much."""
    foretold, came = [], []
    for _, found in curves(read_runs(RECORDED)):
        points = series((r.epoch, r.val_loss) for r in found.epochs)
        for n in range(4, len(points)):
            until = round(1.5 * n)
            if until > len(points):
                break
            foretold.append(log_gain(points[:n]) * math.log(until / n))
            came.append(1 - points[until - 1][1] / points[n - 1][1])
    assert len(came) == 36
    assert sum(foretold) / len(came) == pytest.approx(sum(came) / len(came), rel=0.15)


# --- values, adapters, texts --------------------------------------------------------------------------------------


def test_a_curve_from_events() -> None:
    config = TrainConfig(num_epochs=3, warmup_steps=200)
    events = [started(), step(1, 2.0), *(ended(n, 2.0 - 0.2 * n, 1.9 - 0.2 * n) for n in (1, 2, 3))]
    found = curve_from_events(config, events)
    assert (found.num_samples, found.total_steps, len(found.epochs), len(found.steps)) == (100, 30, 3, 1)
    assert found.epochs[0].data_wait_fraction == 0.5
    by_id = {f.id: f for f in diagnose(found)}
    assert by_id["warmup_exceeds_training"].kind == "run"
    assert by_id["slow_epoch"].evidence["wait_share"] == pytest.approx(0.5 * 0.85)


def test_one_bad_step_that_was_skipped_is_a_warning() -> None:
    bad = NonFinite(tensor="grad: a", value="inf", after_update=False, detail="the loss 1.95 was finite")
    events = [step(1, 2.0), step(2, 1.95, nonfinite=bad), step(3, 1.9)]
    finding = diagnose(curve_from_events(TrainConfig(), events))[0]
    assert (finding.id, finding.severity, finding.evidence["ended"]) == ("non_finite", "warning", False)
    assert (finding.evidence["last_finite_step"], finding.evidence["last_finite_loss"]) == (1, 2.0)


def test_out_of_memory_is_the_reason() -> None:
    found = curve_from_events(TrainConfig(), [OutOfMemory(step=1, detail="2 GiB asked for")])
    assert found.reason == records.OUT_OF_MEMORY


def trial(attrs: dict[str, Any], **more: Any) -> TrialRecord:
    values: dict[str, Any] = {"state": "PRUNED", "value": None, "params": {}, "reason": None, "detail": None}
    values |= {"best_epoch": None, "stopped_early": False, "violated": (), "start_s": None, "end_s": None}
    values |= {"run_id": None, "config": TrainConfig(torch_dtype="float16").model_dump(mode="json")} | more
    return TrialRecord(number=0, attrs=attrs, **values)


def test_a_record_says_the_same_as_the_events_did() -> None:
    config = TrainConfig(torch_dtype="float16").model_dump(mode="json")
    before = diagnose(Curve(config=config, nonfinite=FACTS, reason=records.NON_FINITE))
    stored = json.loads(json.dumps([finding.to_dict() for finding in before]))
    record = trial({records.FINDINGS: stored}, reason=records.NON_FINITE)
    assert diagnose(curve_from_record(record)) == before
    assert before[0].cause == "zero_over_zero"


@pytest.mark.parametrize("findings", [None, "x", [], [1], [{"id": "non_finite"}], [{"id": "healthy", "evidence": {}}]])
def test_a_record_without_facts_still_has_its_reason(findings: Any) -> None:
    record = trial({records.FINDINGS: findings}, reason=records.NON_FINITE, detail="3 steps in a row")
    finding = only(curve_from_record(record))
    assert (finding.id, finding.kind, finding.evidence["measured"]) == ("non_finite", "unknown", "3 steps in a row")


def test_unknown_ids_and_severities_are_refused() -> None:
    with pytest.raises(ValueError, match="'fine'"):
        Finding(id="fine", kind="x", severity="info")
    with pytest.raises(ValueError, match="'bad'"):
        Finding(id="healthy", kind="x", severity="bad")  # type: ignore[arg-type]


def test_every_text_exists_in_both_languages() -> None:
    assert set(texts.TITLES) == {*IDS, messages.STILL_FALLING}
    assert {key.split(".")[0] for key in texts.SENTENCES} == set(IDS)
    assert set(tree_texts.QUESTIONS) == {node.name for node in TREE}
    assert set(tree_texts.LEAVES) == set(LEAVES)
    words = (texts.TITLES, texts.SENTENCES, texts.CAUSES, texts.ACTIONS, tree_texts.QUESTIONS, tree_texts.LEAVES)
    for table in words:
        for english, chinese in table.values():
            assert english.isascii() and english
            assert not chinese.isascii()


def test_the_tree_is_closed() -> None:
    names = {node.name for node in TREE}
    ends = {end for node in TREE for end in (node.yes, node.no)} - names
    assert ends == set(LEAVES)
    assert leaf([]).name == "undecided"


@pytest.mark.parametrize(
    ("value", "text"), [(2e-4, "2e-4"), (5e-6, "5e-6"), (1e-3, "1e-3"), (5.57e-5, "5.57e-5"), (0.01, "0.01"), (0, "0")]
)
def test_rates_read_as_in_the_log(value: float, text: str) -> None:
    assert messages.rate(value) == text


def test_chinese_reads_the_same_facts() -> None:
    found = curve([1.89, 1.71, 1.69, 1.87], [1.63, 1.57, 1.60], rate=1e-3)
    text = messages.sentence(diagnose(found)[0], "zh")
    assert "；验证 loss 在 epoch 2 达到最佳 1.57，从 epoch 3 起上升" in text
    assert messages.advice(diagnose(found)[0].advice[0], "zh") == "降低 learning_rate：1e-3 → 2e-4"
