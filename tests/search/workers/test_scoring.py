"""A study that ranks its trials by CIDEr-D: what is told, what is shown, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import pytest

from search import leaderboard, pruning, reading, records, session
from search.errors import StudyError
from search.evaluation.metrics import score
from search.options import SearchOptions
from search.places import Places
from search.report import card, render
from search.report.facts import gather
from search.space import Float
from search.storage.database import close_storage, open_storage
from search.study import Study
from search.terminal import listing, summary
from search.tracking import study_run, views
from search.tracking.client import open_tracking
from search.verdict.leaders import winner
from search.workers import trial as trial_module
from search.workers.scoring import cider_of
from trainer.captions.generate import Decoding, in_batches
from trainer.captions.hooked import hooked_captioner
from trainer.data.images import open_image
from trainer.loop import train

FIELDS: dict[str, Any] = {
    "name": "by_cider",
    "description": "",
    "n_trials": 2,
    "base": {"model": "mini", "data": "mini"},
    "space": {"learning_rate": Float(1e-4, 1e-2, log=True)},
}


def test_figures_are_those_of_captions_made_one_by_one(tmp_path: Path, bench: Any, small: Callable[..., Any]) -> None:
    config = small(num_epochs=1, max_target_length=12, eval_batch_size=2)
    list(train(config, bench, tmp_path))
    adapter = tmp_path / "checkpoints" / "epoch-0001" / "adapter"
    rows = bench.datasets(config)[1].rows
    assert len(rows) % 2, "the last batch is to be a smaller one"
    with hooked_captioner(bench.base(config), config, adapter, Decoding(max_new_tokens=12)) as captioner:
        items = [(partial(open_image, row.image), row.prompt) for row in rows]
        single = dict(in_batches(captioner, items, 1))
    expected = score([str(single[n]) for n in range(len(rows))], [row.captions for row in rows]).values()["cider_d"]
    asked: list[bool] = []
    found = cider_of(config, adapter, bench, lambda: asked.append(True) or True)  # type: ignore[func-returns-value]
    assert found is not None and found[0] == pytest.approx(expected) and found[1] == len(rows)
    assert len(asked) == len(rows)
    assert cider_of(config, adapter, bench, lambda: False) is None


@pytest.fixture
def ranked(search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(trials, their messages): of three, the one with the lowest loss has the lowest CIDEr-D."""
    monkeypatch.setattr(trial_module, "cider_of", lambda config, *_: (1000 * (0.02 - config.learning_rate), 4))
    return search(trials=3, slots=3, objective="cider", learning_rate=1e-3)


def test_trials_are_told_and_ranked_by_cider(ranked: Any, tmp_path: Path) -> None:
    trials, _ = ranked
    by_rate = sorted(trials, key=lambda trial: trial.config["learning_rate"])
    lowest = min(trials, key=lambda trial: trial.value)
    first = by_rate[0]
    assert first is not lowest, "loss and CIDEr-D must disagree for this test to say anything"
    # What is told: Optuna's best is ours, and the losses are still the trials' own.
    storage = open_storage(f"sqlite:///{tmp_path / 'runs' / 'optuna.db'}")
    study = optuna.load_study(study_name="work", storage=storage)
    assert study.best_trial.number == first.number
    for trial, frozen in zip(trials, study.trials, strict=True):
        assert frozen.value == -trial.attrs[records.CIDER]
        assert trial.value == min(frozen.intermediate_values.values()) == pruning.best_value(frozen)
        assert "CIDEr-D" in trial.detail and "of 4 validation images" in trial.detail
    assert study.metric_names == ["minus CIDEr-D of the validation captions"]
    # What is ranked.
    assert leaderboard.ranked(trials) == by_rate
    assert [leaderboard.best(trials), winner(trials, None)] == [first, first]
    heads, table = leaderboard.rows(trials)
    assert heads[2] == "cider_d" and [row[2] for row in table] == [f"{t.attrs[records.CIDER]:.4f}" for t in by_rate]
    tags = summary.study_tags(trials)
    assert tags["best_trial"] == str(first.number) and "best_cider_d" in tags and "best_val_loss" not in tags
    assert "best CIDEr-D" in listing.as_line(listing.state_of_study(study))
    keys = {point.key: point.value for point in study_run.points(trials)}
    assert keys[study_run.BEST_CIDER] == first.attrs[records.CIDER]
    assert keys[study_run.BEST] == lowest.value
    # What is written.
    tracking = open_tracking(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}", tmp_path / "runs" / "artifacts")
    record = reading.read_study(study, tracking)
    close_storage(storage)
    facts = gather(record)
    for lang in ("en", "zh"):
        text = render.markdown(facts, lang, {})
        verdict = text.partition("⚖️")[2].partition("\n\n")[0]
        assert "CIDEr-D" in verdict and f"{first.attrs[records.CIDER]:.4f}" in verdict
        assert f"{lowest.value:.4f}" not in verdict
        board = next(line for line in text.splitlines() if line.startswith("| 1 |"))
        assert f"{first.attrs[records.CIDER]:.4f}" in board
    assert "the highest of the study" in card.verdict(facts, first)


def test_views_of_mlflow_sort_by_what_the_study_ranks_by() -> None:
    (shown, *_) = (views.read(value) for value in views.tags(cider=True).values())
    assert shown["orderByKey"] == shown["selectedColumns"][0] == "metrics.`val_cider_d`" and not shown["orderByAsc"]
    (shown, *_) = (views.read(value) for value in views.tags().values())
    assert shown["orderByKey"] == "metrics.`best_val_loss`" and shown["orderByAsc"]


def test_given_up_on_the_way_a_trial_waits_and_is_scored_when_it_goes_on(
    search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [None, (0.5, 4)]
    monkeypatch.setattr(trial_module, "cider_of", lambda *_: answers.pop(0))
    trials, _ = search(trials=1, slots=1, objective="cider")
    assert not answers, "it went on from its last epoch, and was captioned again"
    assert [(t.state, t.attrs.get(records.CIDER)) for t in trials] == [("COMPLETE", 0.5)]


@pytest.mark.parametrize(
    "options", [{"strategy": "freeze-thaw"}, {"strategy": "rungs"}, {"pruner": "rungs"}, {"top": 3}], ids=str
)
def test_what_compares_losses_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    study = Study(**FIELDS, objective="cider")
    with pytest.raises(StudyError, match="ranks trials by CIDEr-D"):
        session.Session(study, SearchOptions(**options, places=Places.of(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_an_objective_is_part_of_a_definition_and_the_loss_is_not() -> None:
    study = Study(**FIELDS)
    assert "objective" not in study.definition(), "studies of earlier versions go on"
    assert study.with_settings(["objective=cider"]).definition()["objective"] == "cider"
    refused = {"did you mean": {"objective": "cidre"}, "screen": {"objective": "cider", "screen": "TF32"}}
    for said, wrong in refused.items():
        with pytest.raises(StudyError, match=said):
            Study(**{**FIELDS, **wrong})
