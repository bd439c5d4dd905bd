"""The leaderboard: order, columns, and a configuration that can be pasted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from search import leaderboard, records
from search.records import TrialRecord
from trainer.config import TrainConfig


def trial(number: int, state: str, value: float | None, **changes: Any) -> TrialRecord:
    config = TrainConfig(lora_r=changes.pop("lora_r", 8)).model_dump(mode="json")
    values: dict[str, Any] = {
        "params": {},
        "config": config,
        "reason": "finished",
        "detail": "",
        "best_epoch": 2,
        "stopped_early": False,
        "attrs": {},
        "violated": (),
        "start_s": 0.0,
        "end_s": 1.0,
        "run_id": None,
    }
    return TrialRecord(number=number, state=state, value=value, **{**values, **changes})


TRIALS = (
    trial(0, "COMPLETE", 1.6),
    trial(1, "PRUNED", 1.4, reason="rising"),
    trial(2, "COMPLETE", 1.5, lora_r=16, attrs={records.LABEL: "recommended"}, stopped_early=True),
    trial(3, "PRUNED", 1.3, reason="non_finite", violated=("non_finite",)),
    trial(4, "FAIL", None, reason="lost", best_epoch=None),
)


def test_complete_trials_come_first_and_violations_last() -> None:
    assert [t.number for t in leaderboard.ranked(TRIALS)] == [2, 0, 1, 3, 4]
    best = leaderboard.best(TRIALS)
    assert best is not None and best.number == 2
    assert leaderboard.best(TRIALS[3:]) is None


def test_only_what_differs_has_a_column() -> None:
    heads, rows = leaderboard.rows(TRIALS)
    assert heads == ["rank", "trial", "val_loss", "epoch", "lora_r", "state", "findings"]
    assert rows[0] == ["1", "2 (recommended)", "1.5000", "2", "16", "COMPLETE (stopped early)", ""]
    assert rows[2][0] == "-" and rows[2][5] == "PRUNED (rising)"
    assert leaderboard.as_text(TRIALS).splitlines()[1].startswith("1     2 (recommended)  1.5000")


def test_the_best_configuration_can_be_pasted() -> None:
    config = TrainConfig(learning_rate=0.00012345678901, lora_alpha=24, max_samples=None)
    scope: dict[str, Any] = {}
    exec(leaderboard.training_config(config.model_dump(mode="json")), scope)
    pasted = scope["TRAINING_CONFIG"]
    assert TrainConfig.parse(pasted) == config
    assert list(pasted)[:3] == ["num_epochs", "batch_size", "learning_rate"]


def test_rates_are_written_as_in_the_log() -> None:
    assert leaderboard.show_value("learning_rate", 2e-4) == "2e-4"
    assert leaderboard.show_value("learning_rate", 5.25e-6) in ("5.2e-6", "5.3e-6")
    assert leaderboard.show_value("lora_alpha", 16.0) == "16"
    assert leaderboard.show_value("lora_dropout", 0.05) == "0.05"


def test_the_summary_counts_states() -> None:
    assert leaderboard.summary(TRIALS).startswith("5 trials (1 COMPLETE, 1 COMPLETE (stopped early), 1 FAIL (lost)")


def test_the_summary_says_how_many_epochs_were_saved() -> None:
    def losses(n: int) -> dict[str, Any]:
        return {"attrs": {records.TRAIN_LOSSES: [1.0] * n}}

    planned = TrainConfig().num_epochs
    whole = (trial(0, "COMPLETE", 1.0, **losses(planned)),)
    assert leaderboard.summary(whole) == f"1 trials (1 COMPLETE), {planned} epochs"
    stopped = (*whole, trial(1, "PRUNED", 1.0, reason="rising", **losses(1)))
    text = f"{planned + 1} epochs of {2 * planned} ({planned - 1} saved by stopping early)"
    assert leaderboard.summary(stopped).endswith(text)
    # What a trial that was lost had trained is in the one that goes on from its checkpoint.
    lost = trial(2, "FAIL", None, reason="lost", **losses(1))
    heir = trial(3, "COMPLETE", 1.0, attrs={records.RESUMES: 2, records.TRAIN_LOSSES: [1.0] * planned})
    assert leaderboard.summary((lost, heir)).endswith(f"{planned} epochs")
    # What broke has saved nothing.
    broken = replace(trial(4, "PRUNED", 1.0, reason="non_finite", **losses(1)), violated=("non_finite",))
    assert leaderboard.summary((*whole, broken)).endswith(f", {planned + 1} epochs")
    settled = trial(5, "COMPLETE", 1.0, reason="settled", **losses(2))
    assert leaderboard.summary((settled,)).endswith(f"({planned - 2} saved by stopping early)")


FAILED = trial(0, "FAIL", None, reason=records.ERROR, best_epoch=None, detail="fault 0")
NAN = trial(1, "PRUNED", None, reason="non_finite", violated=("non_finite",), best_epoch=None, detail="step 3: nan")
LATE_NAN = trial(2, "PRUNED", 1.0, reason="non_finite", violated=("non_finite",), detail="step 9: nan")
BIG = trial(3, "PRUNED", None, reason="out_of_memory", violated=("out_of_memory",), best_epoch=None, detail="step 1")
BY_HAND = trial(4, "COMPLETE", 0.001, reason=None, best_epoch=None, config={})
LOST = trial(5, "FAIL", 1.0, reason=records.LOST, best_epoch=None, detail="its process is gone")
HEIR = trial(6, "WAITING", None, reason=None, best_epoch=None, attrs={records.RESUMES: 5})
REPEAT = trial(7, "PRUNED", 1.0, reason="repeat", attrs={records.REPEAT_OF: 0})


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([], None),
        ([trial(0, "WAITING", None), trial(1, "RUNNING", None)], None),
        ([FAILED, trial(9, "COMPLETE", 1.0)], None),
        ([FAILED, trial(9, "PRUNED", 1.0, reason="rising")], None),
        ([FAILED], "every trial failed (1), the last with: fault 0"),
        ([FAILED, replace(FAILED, number=1, detail="fault 1")], "every trial failed (2), the last with: fault 1"),
        ([NAN, LATE_NAN], "no trial has a result (2 non_finite), the last with: step 9: nan"),
        ([BIG], "no trial has a result (1 out_of_memory), the last with: step 1"),
        (
            [FAILED, NAN, LATE_NAN, BIG],
            "no trial has a result (2 non_finite, 1 error, 1 out_of_memory), the last with",
        ),
        ([NAN, BY_HAND], "no trial has a result (1 non_finite, 1 told by hand), the last with: no reason given"),
        ([trial(0, "COMPLETE", float("inf"))], "no trial has a result (1 finished), the last with: finished"),
        ([FAILED, REPEAT], "every trial failed (1), the last with: fault 0"),
        ([LOST], "every trial failed (1), the last with: its process is gone"),
        ([LOST, HEIR], None),
    ],
)
def test_a_study_whose_trials_all_failed_has_not_what_was_asked_for(
    trials: list[TrialRecord], said: str | None
) -> None:
    found = leaderboard.all_failed(trials)
    assert found is None if said is None else str(found).startswith(said), found


def test_a_value_that_no_epoch_measured_is_not_the_best() -> None:
    by_hand = replace(trial(0, "COMPLETE", 0.001), best_epoch=None, config={})
    ours = replace(trial(1, "COMPLETE", 1.0), best_epoch=2)
    assert leaderboard.best([by_hand, ours]) == ours
    assert leaderboard.best([by_hand]) is None
    assert leaderboard.as_text([by_hand, ours]) and leaderboard.summary([by_hand, ours])
