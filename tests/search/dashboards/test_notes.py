"""Notes and plots on optuna-dashboard: what they hold, that data stays text, and what writing them costs."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import optuna
import pytest
from optuna.artifacts import FileSystemArtifactStore, download_artifact, get_all_artifact_meta
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from optuna_dashboard import get_note, save_note
from optuna_dashboard._note import get_note_from_system_attrs
from optuna_dashboard._serializer import serialize_frozen_trial

from search import records
from search.dashboards import notes
from search.diagnosis import Curve, Finding, curve_from_events, diagnose
from search.records import EpochRecord, Outcome, TrialRecord
from search.sampling import params
from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.tracking.pages import pages_of, run_page
from tests.search.tracking.recorded import BAD, epoch, started, step
from tests.support import report_data, template
from trainer.config import TrainConfig
from trainer.events import Diverged, Event

CONFIG = TrainConfig().model_dump(mode="json")
EVIL = "<script>alert(1)</script> | `code` [link](javascript:x) *bold* ![x](http://evil.example/x.png)\n# heading"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[RDBStorage]:
    opened = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    yield opened
    close_storage(opened)


@pytest.fixture
def study(storage: RDBStorage) -> optuna.Study:
    return optuna.create_study(study_name="demo", storage=storage)


def curve(losses: report_data.Losses) -> Curve:
    epochs = tuple(
        EpochRecord(epoch=i, train_loss=train, val_loss=val, learning_rate=2e-4)
        for i, (train, val) in enumerate(losses, start=1)
    )
    return Curve(config=CONFIG, epochs=epochs, steps=(), reason=records.FINISHED, total_steps=100)


def annotate(
    trial: optuna.Trial,
    folder: Path,
    curve: Curve,
    *,
    findings: tuple[Finding, ...] | None = None,
    outcome: Outcome | None = None,
) -> str:
    """Write the trial's note and read it back."""
    notes.annotate_trial(
        trial,
        folder=folder / "dashboard",
        outcome=outcome or Outcome(state="COMPLETE", reason=records.FINISHED, detail="4 epochs done"),
        findings=diagnose(curve) if findings is None else findings,
        epochs=curve.epochs,
        config=CONFIG,
        run=run_page("http://127.0.0.1:5000", "1", "abc123"),
    )
    return get_note(trial)


def note_of(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> str:
    """As optuna-dashboard reads it."""
    attrs = study._storage.get_study_system_attrs(study._study_id)
    return get_note_from_system_attrs(attrs, trial._trial_id)["body"]


def test_a_note_has_findings_plot_link_and_configuration(study: optuna.Study, tmp_path: Path) -> None:
    note = annotate(study.ask(), tmp_path, curve(report_data.EXPERIMENT_3))
    assert note.startswith("**COMPLETE** (finished): 4 epochs done")
    assert re.search(r"^- \*\*diverged\*\* \(`diverged`\): ", note, re.MULTILINE)
    assert re.search(r"^  - advice: ", note, re.MULTILINE)
    assert "![Losses of 4 epochs, lowest validation loss 1.5700](/artifacts/" in note
    assert "[Curves in MLflow](http://127.0.0.1:5000/#/experiments/1/runs/abc123?" in note
    assert '```python\nTRAINING_CONFIG = {\n    "num_epochs": 10,' in note


def test_note_and_plot_outlive_the_end_of_the_trial(study: optuna.Study, tmp_path: Path) -> None:
    trial = study.ask()
    note = annotate(trial, tmp_path, curve(report_data.EXPERIMENT_3))
    study.tell(trial, state=TrialState.PRUNED)
    frozen = study.trials[0]
    assert note_of(study, frozen) == note
    kept = get_all_artifact_meta(frozen, storage=study._storage)
    assert [meta.filename for meta in kept] == ["trial-000-losses.svg"]
    assert f"/artifacts/{study._study_id}/{frozen._trial_id}/{kept[0].artifact_id})" in note
    copy = tmp_path / "copy.svg"
    download_artifact(
        artifact_store=FileSystemArtifactStore(tmp_path / "dashboard"),
        artifact_id=kept[0].artifact_id,
        file_path=str(copy),
    )
    assert kept[0].mimetype == "image/svg+xml"
    assert ElementTree.fromstring(copy.read_bytes()).tag == "{http://www.w3.org/2000/svg}svg"


@pytest.mark.parametrize("losses", [(math.inf, math.nan), (1.5, math.inf), (math.nan, 1.7)])
def test_a_trial_whose_losses_overflow_has_its_note(
    study: optuna.Study, tmp_path: Path, losses: tuple[float, float]
) -> None:
    """Matplotlib leaves out what has no place; so does the template."""
    trial = study.ask()
    note = annotate(trial, tmp_path, curve([*report_data.EXPERIMENT_3, losses]))
    assert "non_finite" in note and "lowest validation loss 1.5700](/artifacts/" in note
    (kept,) = get_all_artifact_meta(trial, storage=study._storage)
    drawn = (tmp_path / "dashboard" / kept.artifact_id).read_text(encoding="utf-8")
    assert "nan" not in drawn and "inf" not in drawn


def test_a_trial_without_a_finite_loss_has_a_note_without_plot(study: optuna.Study, tmp_path: Path) -> None:
    note = annotate(study.ask(), tmp_path, curve([(math.nan, math.inf)] * 3))
    assert "**COMPLETE**" in note and "![" not in note


def test_what_comes_from_data_stays_text(study: optuna.Study, tmp_path: Path) -> None:
    outcome = Outcome(state="PRUNED", reason=records.NON_FINITE, detail=EVIL)
    note = annotate(study.ask(), tmp_path, curve(report_data.EXPERIMENT_3), outcome=outcome)
    head = note.split("\n\n")[0]
    assert "<" not in head and r"\[link\]" in head and r"\`code\`" in head and r"\|" in head and r"!\[x\]" in head
    assert not re.search(r"^# ", note, re.MULTILINE)


@pytest.mark.parametrize("word", ["# x", "- x", "1. x", "> x", "+ x"])
def test_a_broken_line_begins_no_heading_list_or_quote(word: str) -> None:
    text = notes._text("y" * (notes.WIDTH - 1) + " " + word, "- ", "  ")
    first, second = text.split("  \n")
    assert first == "- " + "y" * (notes.WIDTH - 1)
    assert second.startswith("  ") and "\\" in second[: 2 + len(word)]
    assert second.replace("\\", "").strip() == word


def test_no_text_is_lost_between_lines_and_none_is_wider_than_a_window() -> None:
    words = " ".join(f"word{i}" for i in range(100))
    lines = notes._text(words, "**COMPLETE** (finished): ").split("  \n")
    assert " ".join(lines) == f"**COMPLETE** (finished): {words}"
    assert max(map(len, lines)) <= notes.WIDTH
    assert notes._text("", "Decision tree: ") == "Decision tree: "


def test_a_fence_in_the_configuration_ends_no_code_block(study: optuna.Study, tmp_path: Path) -> None:
    trial = study.ask()
    notes.annotate_trial(
        trial,
        folder=tmp_path,
        outcome=Outcome(state="COMPLETE", reason=records.FINISHED, detail=""),
        findings=diagnose(curve(report_data.EXPERIMENT_3)),
        epochs=(),
        config={**CONFIG, "target_modules": ["```\n# heading"]},
        run=run_page("http://127.0.0.1:5000", "1", "abc123"),
    )
    note = get_note(trial)
    assert note.count("````") == 2 and note.endswith("````")


def test_a_trial_that_broke_before_its_first_epoch_has_a_note_without_plot(
    study: optuna.Study, tmp_path: Path
) -> None:
    events: list[Event] = [started(20), step(1), replace(step(2, loss=math.nan), nonfinite=BAD)]
    events.append(Diverged(step=2, epoch=1, first_bad_step=2, cause=BAD))
    config = TrainConfig(torch_dtype="float16")
    broken = curve_from_events(config, events, reason=records.NON_FINITE)
    outcome = Outcome(state="PRUNED", reason=records.NON_FINITE, detail="step 2", violated=records.NON_FINITE)
    note = annotate(study.ask(), tmp_path, broken, outcome=outcome)
    assert note.startswith("**PRUNED** (non_finite): step 2") and "(`non_finite`)" in note
    assert "![" not in note and not (tmp_path / "dashboard").exists()


def test_optuna_dashboard_sees_which_trials_violated_a_constraint(study: optuna.Study, tmp_path: Path) -> None:
    for violated in (records.NON_FINITE, None):
        trial = study.ask()
        params.mark_constraints(trial, violated)
        outcome = Outcome(state="PRUNED", reason=records.NON_FINITE, detail="", violated=violated)
        annotate(trial, tmp_path, curve([(2.0, 1.8), (1.9, 1.7)]), outcome=outcome)
        study.tell(trial, state=TrialState.PRUNED)
    shown = [serialize_frozen_trial(study._study_id, trial, {}) for trial in study.trials]
    assert [trial["constraints"] for trial in shown] == [[1.0], [0.0]]
    assert [trial.violated for trial in lifecycle.read_trials(study)] == [(records.NON_FINITE,), ()]


def test_epochs_without_finite_losses_are_drawn_as_far_as_they_are_known(study: optuna.Study, tmp_path: Path) -> None:
    note = annotate(study.ask(), tmp_path, curve([(2.0, None), (None, None)]))
    assert "![Losses of 2 epochs](/artifacts/" in note
    assert "![" not in annotate(study.ask(), tmp_path, curve([(None, None)]))


def test_a_resumed_trial_s_events_give_a_whole_note(study: optuna.Study, tmp_path: Path) -> None:
    """Its epochs before the checkpoint come from history, without steps."""
    events: list[Event] = [epoch(1, 10), started(40), *(step(s, 2) for s in range(11, 21)), epoch(2, 20)]
    note = annotate(study.ask(), tmp_path, curve_from_events(TrainConfig(), events))
    assert "![Losses of 2 epochs" in note


def study_note(study: optuna.Study, trials: tuple[TrialRecord, ...]) -> str:
    page = "http://127.0.0.1:5000/#/experiments/1/runs?a=b"
    notes.annotate_study(study, trials, None, runs_page=page, log=Path("runs/demo/log.md"))
    return get_note(study)


def test_the_study_s_note_sums_up(study: optuna.Study) -> None:
    trials = report_data.hand_run().trials
    labelled = replace(trials[2], attrs={**trials[2].attrs, records.LABEL: EVIL})
    note = study_note(study, (*trials[:2], labelled, *trials[3:]))
    assert note.startswith("6 trials (")
    assert "**Best: trial " in note and "TRAINING_CONFIG = {" in note
    assert "[All curves in MLflow](http://127.0.0.1:5000/#/experiments/1/runs?a=b)" in note
    assert "Tuning log: `runs/demo/log.md`" in note
    table = [line for line in note.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 6
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1, "a pipe in a label splits no cell"
    assert "<script" not in note


def test_a_study_without_trials_has_a_note(study: optuna.Study) -> None:
    assert study_note(study, ()).startswith("0 trials")


def test_what_someone_wrote_into_the_study_s_note_is_kept(study: optuna.Study) -> None:
    save_note(study, "Looks **good** to me.")
    trials = report_data.hand_run().trials
    for count in (2, 4, 6):
        note = study_note(study, trials[:count])
        assert note.startswith(f"{count} trials (")
        assert note.count(notes.OWN) == 1 and note.endswith("\n\nLooks **good** to me.")
    save_note(study, note + "\n\nAnd this.")
    assert study_note(study, trials).endswith("Looks **good** to me.\n\nAnd this.")


def test_links_lead_to_the_server_or_to_the_local_pages() -> None:
    assert pages_of("sqlite:///runs/mlflow.db") == "http://127.0.0.1:5000"
    assert pages_of("postgresql://u:p@host/db") == "http://127.0.0.1:5000"
    assert "secret" not in pages_of("https://me:secret@mlflow.example.com/x")


def test_a_note_costs_little(study: optuna.Study, tmp_path: Path) -> None:
    seen = curve(report_data.falling(2.0, 1.5, 15))
    annotate(study.ask(), tmp_path, seen)  # imports matplotlib, once a worker
    began = time.process_time()
    for _ in range(3):
        annotate(study.ask(), tmp_path, seen)
    each_ms = 1000 * (time.process_time() - began) / 3
    assert each_ms < 400, f"{each_ms:.0f} ms of CPU a trial; it was 130 when this was written, 110 of them the plot"


def test_workers_do_without_scikit_learn() -> None:
    """And a process that wants it later can have it: hiding it leaves nothing behind."""
    code = (
        "import sys, search.workers.trial, search.dashboards.notes; "
        "assert not {'sklearn', 'scipy.stats'} & set(sys.modules); "
        "import sklearn.ensemble; assert 'search.dashboards.notes' in sys.modules"
    )
    done = template.run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
