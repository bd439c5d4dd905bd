"""Trials that other programs put into a study: each ill one fails alone, with a word, and the others train."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import optuna
import pytest

from search import leaderboard, records
from search.processes import this_process
from search.reading import read_study
from search.report.write import refresh
from search.storage import lifecycle
from search.storage.optuna_private import backend
from search.workers.protocol import Notice
from tests.search.workers.conftest import Search

RATE = optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)
QUEUED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a value that the configuration does not take": ({"lora_r": -4}, {}, "lora_r=-4, outside of the search space"),
    "a value outside of its range": ({"learning_rate": 0.5}, {}, "learning_rate=0.5, outside of the search space"),
    "a text for a number": ({"lora_r": "eight"}, {}, "lora_r='eight', outside of the search space"),
    "half a rank": ({"lora_r": 4.5}, {}, "lora_r=4.5, outside of the search space"),
    "not a number": ({"learning_rate": math.nan}, {}, "learning_rate=nan, outside of the search space"),
    "a list": ({"lora_r": [4]}, {}, "lora_r=[4], outside of the search space"),
    "a misspelt parameter": ({"lora_R": 4}, {}, "'lora_R', which is no parameter of the study; did you mean 'lora_r'"),
    "overrides that the configuration does not take": ({}, {"overrides": {"batch_size": 0}}, "batch_size"),
    "another trial's files": ({}, {"folder": "trials/0999"}, "the attributes of another trial"),
    "a path": ({}, {"folder": "../../elsewhere"}, "the attributes of another trial"),
    "another trial's MLflow run": ({}, {"run_id": "0" * 32}, "the attributes of another trial"),
}
"""What another program queues: (params, user attributes, what is said of it)."""
SOUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "params of the space": ({"learning_rate": 1e-3, "lora_r": 4}, {}),
    "some of them": ({"lora_r": 4}, {}),
    "attributes of our names in other forms": (
        {},
        {
            **{"overrides": "none", "label": 7, "resumes": "the last", "attempt": "many", "stage": [1], "folder": 3},
            **{
                "worker": "me",
                "train_losses": "low",
                "run_id": 5,
                "findings": 3,
                "config": [],
                "note": {},
                "slots": "2",
            },
        },
    ),
    "the work of a trial to come": ({}, {"resumes": 10_000}),
    "attributes of its own": ({}, {"ticket": 7, "who": {"name": "somebody"}}),
}


def poison(study: optuna.Study) -> None:
    """Queue what other programs may, and add trials that have ended, some with nothing of ours."""
    for params, attrs, _ in QUEUED.values():
        study.enqueue_trial(params, user_attrs=attrs)
    for params, attrs in SOUND.values():
        study.enqueue_trial(params, user_attrs=attrs)
    ill = SOUND["attributes of our names in other forms"][1]
    for attrs in ({}, ill, {"resumes": 3, "reason": "lost", "best_epoch": 0}):
        study.add_trial(optuna.create_trial(value=0.001, params={}, distributions={}, user_attrs=attrs))
    words: Any = optuna.distributions.CategoricalDistribution(("slow", "fast"))
    ranks: Any = optuna.distributions.CategoricalDistribution((4, 8))
    elsewhere = {"learning_rate": words, "lora_r": ranks}
    study.add_trial(
        optuna.create_trial(value=0.002, params={"learning_rate": "slow", "lora_r": 4}, distributions=elsewhere)
    )
    waits = optuna.trial.TrialState.WAITING
    study.add_trial(optuna.create_trial(state=waits, params={"lora_r": 4}, distributions={"lora_r": ranks}))
    # Left RUNNING with a value of no use by a version that took it: Optuna itself refuses to copy it.
    storage: Any = backend(study)
    left = storage.create_new_trial(storage.get_study_id_from_name("work"))
    storage.set_trial_user_attr(left, records.WORKER, {**this_process(), "pid": 2**22 + 1})
    storage.set_trial_param(left, "learning_rate", 0.5, RATE)


@pytest.mark.long
@pytest.mark.parametrize("how", [{}, {"strategy": "freeze-thaw", "pruner": "freeze-thaw"}], ids=["joint", "planned"])
def test_what_other_programs_queue_costs_no_other_trial(search: Search, how: dict[str, str]) -> None:
    trials, heard = search(trials=len(QUEUED) + len(SOUND) + 8, slots=2, num_epochs=1, prepare=poison, **how)
    said = [m.text for m in heard if isinstance(m, Notice)]
    for number, (what, (_, _, why)) in enumerate(QUEUED.items()):
        assert (trials[number].state, trials[number].reason) == ("FAIL", records.ERROR), what
        assert why in (trials[number].detail or ""), what
        assert any(text.startswith(f"trial {number} failed: ") and why in text for text in said), what
    for number, what in enumerate(SOUND, len(QUEUED)):
        assert trials[number].state == "COMPLETE", what
    added = len(QUEUED) + len(SOUND)
    assert [t.state for t in trials[added:]][:6] == ["COMPLETE"] * 4 + ["FAIL", "RUNNING"]
    assert {t.state for t in trials[added + 6 :]} == {"COMPLETE"}
    assert "lora_r of another search space" in (trials[added + 4].detail or "")
    # What no trial of ours measured is not the best, and everything that reads trials can.
    best = leaderboard.best(trials)
    assert best is not None and best.value is not None and best.value > 0.001
    assert leaderboard.as_text(trials) and leaderboard.summary(trials)


def test_the_next_search_goes_on_after_them(search: Search, tmp_path: Path) -> None:
    def later(study: optuna.Study) -> None:
        poison(study)
        (lost,) = lifecycle.requeue_lost(study)
        assert lost.successor is None and lifecycle.requeue_lost(study) == ()
        record = read_study(study)
        assert refresh(record, tmp_path / "log")

    trials, _ = search(trials=2, slots=1, num_epochs=1, prepare=later)
    assert {t.state for t in trials} == {"COMPLETE", "FAIL"}
