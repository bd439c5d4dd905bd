"""A search from Python: the example of docs/python.md, as it stands; stopped, continued, and refused."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import optuna
import pytest
from optuna.trial import TrialState

from search import SearchOptions, Session, records
from search.errors import StorageError, StudyError
from search.leaderboard import adapter
from search.places import Places
from search.result import Result
from search.session import closing
from search.session.left import has_work
from search.space import Choice, Float
from search.storage import lifecycle
from search.study import Fixed, Study
from search.tracking.outbox import Model
from search.verdict.race import Verdict
from search.verdict.tested import ATTRIBUTE, NOTHING
from search.workers.protocol import Notice, TrialEnded
from tests.support import candidate_trials as leaders
from tests.support import template
from tests.support.search_process import ROOT, environment

QUICK = ("max_samples=24", "num_epochs=2", "warmup_steps=0")


@pytest.mark.long
def test_the_documents_example(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "example.py").write_text(code, encoding="utf-8")
    done = template.run([sys.executable, "example.py"], timeout=240, cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert "0 3 trials in runs/from_python" in done.stdout
    adapter = Path(done.stdout.split("-> ")[-1].strip())
    assert (tmp_path / adapter / "adapter_model.safetensors").is_file()
    assert done.stderr == ""


@pytest.mark.slow  # its parts: test_multiprocessing_private.py and test_supervisor.py
def test_a_program_that_starts_a_search_as_it_is_imported(tmp_path: Path) -> None:
    """Each of its workers would start one: one message, no trial, and no second try."""
    code = """
from search import SearchOptions, Session
session = Session("rsicap_mini", SearchOptions(trials=1, slots=1, confirm=False, settings=("max_samples=24",)))
session.start()
for message in session.watch():
    print(message)
result = session.result()
print(result.code, len(result.trials), "trials")
"""
    (tmp_path / "unguarded.py").write_text(code, encoding="utf-8")
    done = template.run([sys.executable, "unguarded.py"], timeout=240, cwd=tmp_path, env=environment())
    assert done.stdout.count('if __name__ == "__main__":') == 1, done.stdout + done.stderr
    assert done.stdout.endswith("2 0 trials\n") and done.stderr == "", done.stdout + done.stderr


@pytest.mark.slow  # test_run.py has searches that are stopped and go on, the next test a session from start to end
def test_stopped_and_continued(tmp_path: Path) -> None:
    code = "import sys; from tests.search import test_session; test_session.stop_and_continue(sys.argv[1])"
    done = template.run([sys.executable, "-c", code, str(tmp_path)], timeout=240, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_rungs_on_a_ladder(tmp_path: Path) -> None:
    code = "import sys; from tests.search import test_session; test_session.rungs_on_a_ladder(sys.argv[1])"
    done = template.run([sys.executable, "-c", code, str(tmp_path)], timeout=240, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr


def rungs_on_a_ladder(runs: str) -> None:
    """A budget of epochs: more begin than it could train in full, half of it is kept for the leaders, and all end."""
    settings = ("max_samples=24", "num_epochs=4", "warmup_steps=0", "batch_size=4")
    places = Places.of(Path(runs))
    options = SearchOptions(strategy="rungs", epochs=12, slots=1, confirm=False, settings=settings, places=places)
    session = Session("rsicap_mini", options)
    session.start()
    list(session.watch())
    result = session.result()
    epochs = [len(trial.attrs[records.TRAIN_LOSSES]) for trial in result.trials]
    assert result.code == 0 and 12 <= sum(epochs) <= 14, epochs
    assert len(epochs) > 3 and min(epochs) == 1 and max(epochs) == 4, epochs
    assert all(trial.state in ("COMPLETE", "PRUNED") for trial in result.trials), epochs
    assert result.adapter is not None and result.adapter.is_dir()


def stop_and_continue(runs: str) -> None:
    """A program's two sessions, in a process that has made their workers' imports."""
    options = SearchOptions(trials=2, slots=1, confirm=False, settings=QUICK, places=Places.of(Path(runs)))
    first = Session("rsicap_mini", options)
    first.start()
    for message in first.watch():
        if isinstance(message, TrialEnded):
            first.stop()
    stopped = first.result()
    # Pytest does not rewrite these: they are in another process.
    assert stopped.code == 130, stopped
    assert any(trial.state == "WAITING" for trial in stopped.trials), stopped

    second = Session("rsicap_mini", options)
    second.start()
    messages = list(second.watch())
    result = second.result()
    assert result.code == 0 and [trial.state for trial in result.trials] == ["COMPLETE"] * 2, (result, messages)
    # A trial may have been done by then, or paused; what is left is said in either case.
    assert any(isinstance(message, Notice) and " waiting" in message.text for message in messages), messages
    assert result.adapter is not None and result.adapter.is_dir()
    assert list(second.watch()) == [], "a search that has ended has nothing more to say"


def test_what_is_wrong_is_said_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="did you mean 'rsicap_mini'"):
        Session("rsicap_mimi")
    with pytest.raises(StudyError, match="hang_timeout_s must be at least"):
        SearchOptions(hang_timeout_s=1)
    with pytest.raises(StudyError, match="epochs must be at least 1, but got 0"):
        SearchOptions(epochs=0)  # not as many as the trials take
    assert not list(tmp_path.iterdir())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"pruner": "risin"}, "there is no pruner"),
        ({"settings": ("data=/nowhere",)}, "/nowhere"),
    ]
    for fields, words in wrong:
        session = Session("rsicap_mini", SearchOptions(places=Places.of(tmp_path / "runs"), **fields))
        session.start()
        assert list(session.watch()) == []
        with pytest.raises(StudyError, match=words):
            session.result()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("trial", "code", "status"),
    [
        (leaders.trial(0, 0.4, attrs={"folder": "trials/0000"}), 0, "FINISHED"),
        (replace(leaders.trial(0, 0.4), state="PRUNED", reason="non_finite", violated=("non_finite",)), 1, "FAILED"),
        (replace(leaders.trial(0, 0.4), best_epoch=None, reason=None), 1, "FAILED"),
        (replace(leaders.trial(0, 0.4), state="WAITING", best_epoch=None, value=None), 0, "FINISHED"),
    ],
    ids=["complete", "not finite", "told by hand", "not yet trained"],
)
def test_the_code_is_0_and_the_studys_run_finished_only_with_a_result(
    trial: Any, code: int, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub: Any = MagicMock()
    stub.is_alive.return_value = False
    study: Any = SimpleNamespace(study_name="rsicap_mini", user_attrs={})
    monkeypatch.setattr(lifecycle, "read_trials", lambda _: (trial,))
    watch: Any = MagicMock(problem=lambda: None)
    result = closing.close(0, study, tmp_path, watch, runs=stub, courier=stub, keeper=stub)
    assert (result.code, stub.end_study.call_args.args[0]) == (code, status)


def test_the_model_that_mlflow_calls_best_is_the_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of each search, and of search.confirm, which is one: the alias is the winner's, not the lowest's."""
    places = Places.of(tmp_path / "runs")
    trials = [
        replace(leaders.trial(n, value, attrs={"folder": f"trials/{n:04d}"}), run_id=f"run-{n}")
        for n, value in enumerate((0.4, 0.401))
    ]
    for trial in trials:
        adapter(places.study("rsicap_mini"), trial).mkdir(parents=True)
    known = [*trials]
    kept: list[tuple[str, Model]] = []
    stub: Any = MagicMock()
    stub.is_alive.return_value = False
    stub.keep_model.side_effect = lambda run_id, model: kept.append((run_id, model))
    study: Any = SimpleNamespace(study_name="rsicap_mini", user_attrs={records.CONFIRM: {"top": 2, "seeds": 3}})
    monkeypatch.setattr(lifecycle, "read_trials", lambda _: tuple(known))
    folder, watch = places.study("rsicap_mini"), MagicMock(problem=lambda: None)

    def close() -> Result:
        return closing.close(0, study, folder, watch, runs=stub, courier=stub, keeper=stub)

    assert close().winner == trials[0]
    for n, loss in ((0, 0.42), (1, 0.40)):
        known += [leaders.repeat(2 + 3 * n + block, n, block, loss + block / 1000) for block in (1, 2, 3)]
    result = close()
    assert (result.winner, result.best) == (trials[1], trials[0])
    assert [(run_id, model.alias, model.metrics) for run_id, model in kept] == [
        ("run-0", "best", {"val_loss": 0.4}),
        ("run-1", "best", {"val_loss": 0.401}),
    ]
    # What MLflow has against a model is said, and costs no result.
    stub.keep_model.side_effect = StorageError("Invalid model name")
    refused = close()
    assert (refused.code, refused.winner, refused.refused) == (0, trials[1], "Invalid model name")
    assert result.refused is None and stub.end_study.call_args.args[0] == "FINISHED"


@pytest.mark.parametrize(
    ("fields", "strategy", "trials", "note"),
    [
        ({}, None, 6, "the space has 6 trials"),
        ({"enqueue": (Fixed(label="long", config={"num_epochs": 9}),)}, "joint", 7, "the space has 7 trials"),
        ({"sampler": "grid"}, None, 6, "the grid has 6 trials"),
        (
            {"space": {}, "enqueue": (Fixed(label="a", config={"lora_r": 4}),)},
            None,
            2,
            "the space has 2 trials",
        ),
        ({"space": {"learning_rate": Float(1e-5, 1e-3, log=True)}}, None, 20, None),
    ],
)
def test_a_finite_space_is_asked_for_no_more_than_it_has(
    fields: dict[str, Any], strategy: str | None, trials: int, note: str | None, tmp_path: Path
) -> None:
    space = {"learning_rate": Choice((1e-4, 1e-3)), "lora_r": Choice((4, 8, 16))}
    study = Study(
        **{"name": "small", "description": "six points", "base": {}, "space": space, "n_trials": 20, **fields}
    )
    session = Session(study, SearchOptions(strategy=strategy, places=Places.of(tmp_path / "runs")))
    try:
        opened = session._open()
        assert opened.budget.trials == trials
        said = [f"{note}, and 20 trials were asked for: it ends once it is done"] if note else []
        assert [n for n in opened.notes if "asked for" in n] == said
    finally:
        session._close_storage()


def test_a_search_goes_on_as_the_study_was_begun(tmp_path: Path) -> None:
    """Its pruner and its study file are held, for the commands of the log and for `search.confirm`; so is what is said
    of more trials given by hand than were asked for."""
    fields: dict[str, Any] = {"name": "held", "description": "", "base": {}, "n_trials": 9}
    by_hand = tuple(Fixed(label=f"{n}", config={"lora_r": 4 + n}) for n in range(3))
    study = Study(**fields, space={"learning_rate": Float(1e-5, 1e-3, log=True)}, enqueue=by_hand)
    places = Places.of(tmp_path / "runs")
    for options, pruner, held in (
        (SearchOptions(pruner="none", trials=2, places=places), "none", "none"),
        (SearchOptions(places=places), "none", "none"),
        (SearchOptions(fresh=True, places=places), "rungs", None),
    ):
        session = Session(study, options)
        session._file = "mine/held.py"
        try:
            opened = session._open()
            assert (opened.pruner, opened.study.user_attrs.get(records.PRUNER)) == (pruner, held)
            assert opened.study.user_attrs[records.GIVEN_STUDY] == "mine/held.py"
            said = "3 trials are given by hand and all of them run, more than the 2 trials asked for"
            assert (said in opened.notes) == (options.trials == 2)
        finally:
            session._close_storage()


def test_repeats_make_no_room_in_a_finite_space(tmp_path: Path) -> None:
    """A study that is done, its leaders repeated: the same command once more must not train its points again."""
    made = {
        "name": "small",
        "description": "two points",
        "base": {},
        "space": {"lora_r": Choice((4, 8))},
        "n_trials": 9,
    }
    session = Session(Study(**made), SearchOptions(places=Places.of(tmp_path / "runs")))
    try:
        study = session._open().study
        study.ask()
        for block in (1, 2):
            attrs = {records.OVERRIDES: {"seed": block}, records.REPEAT_OF: 0}
            attrs |= {records.BLOCK: block, records.TRAINS_TO: 2}
            study.add_trial(optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs=attrs))
        assert session._open().budget.trials == 2
    finally:
        session._close_storage()


READ = {
    "rows": "test",
    "images": 3,
    "scenes": True,
    "fingerprint": "f",
    "losses": [{"trial": 0, "epoch": 1, "loss": 0.4, "low": 0.3, "high": 0.5, "above": None}],
}


@pytest.mark.parametrize(
    ("stored", "kind", "choice", "options", "due"),
    [
        (None, "winner", 0, {}, True),
        (READ, "winner", 0, {}, False),
        (READ, "winner", 1, {}, True),
        (NOTHING, "winner", 0, {}, False),
        (None, "none", None, {}, False),
        (None, "winner", 0, {"test_images": 0}, False),
        (None, "winner", 0, {"confirm": False}, False),
    ],
)
def test_a_search_that_was_interrupted_before_the_test_loss_reads_it_the_next_time(
    stored: Any,
    kind: Any,
    choice: int | None,
    options: Any,
    due: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And one that is done starts no workers."""
    monkeypatch.setattr("search.session.left.verdict_of", lambda *_: Verdict(kind=kind, choice=choice))
    session = Session("rsicap_mini", SearchOptions(trials=1, places=Places.of(tmp_path / "runs"), **options))
    try:
        opened = session._open()
        images = session.options.test_images
        assert has_work(opened, lifecycle.Unfinished(0, 0), images), "its trial is still to be trained"
        opened.study.ask()
        if stored is not None:
            opened.study.set_user_attr(ATTRIBUTE, stored)
        assert has_work(opened, lifecycle.Unfinished(0, 0), images) is due
    finally:
        session._close_storage()
