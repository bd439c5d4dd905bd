"""`python -m search.replay`: a finished trial comes again to the last bit; a difference is named where it begins."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from search import records, replay
from search.errors import StorageError, StudyError
from search.records import TrialRecord
from search.replay import Comparison, compare, departs, describe, is_past
from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.storage.studies import find_study
from search.tracking.client import open_tracking
from search.tracking.tags import HIDDEN
from tests.search.tracking.recorded import epoch, step
from tests.support import once, search_process
from tests.support.small_study import FLOAT16, GOOD, NAME, STALLS, WORSE, Small
from trainer.config import TrainConfig

PAUSES = """
from search.space import Float
from search.study import Fixed, Study

STUDY = Study(
    name="paused",
    description="trials that wait at rungs, and go on as leaders",
    base={
        "model": MODEL, "data": "mini", "max_samples": 16, "num_epochs": 4, "batch_size": 4, "warmup_steps": 5,
        "lora_dropout": 0.1, "lr_scheduler_type": "cosine", "device": "cpu",
    },
    space={"learning_rate": Float(1e-5, 1e-2, log=True)},
    n_trials=3,
    enqueue=tuple(Fixed(label=str(rate), config={"learning_rate": rate}) for rate in (1e-3, 3e-3, 1e-4)),
)
"""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """A replay takes as many threads as the trial had; the tests after it have theirs."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def copy(small_study: Small, tmp_path: Path) -> Path:
    """The study's databases, to tamper with."""
    for name in ("optuna.db", "mlflow.db"):
        shutil.copy(small_study.runs / name, tmp_path)
    return tmp_path


def command(runs: Path, trial: int, *options: str, study: str = NAME) -> Result:
    arguments = ["--study", study, "--trial", str(trial), "--runs-dir", str(runs), *options]
    return CliRunner().invoke(replay.app, arguments)


def read(runs: Path, number: int) -> TrialRecord:
    storage = open_storage(f"sqlite:///{runs}/optuna.db")
    record = lifecycle.read_trials(find_study(storage, NAME))[number]
    close_storage(storage)
    return record


def files(folder: Path) -> set[str]:
    """All there is, without the files that SQLite makes and removes beside a database that is read."""
    return {str(p) for p in folder.rglob("*") if not p.name.endswith(("-wal", "-shm", ".lock"))}


def own(runs: Path, record: TrialRecord) -> set[str]:
    """All there is, of MLflow's artifacts those of the trial: a copy of the study in another test writes its own where
    the experiment has them, beside these."""
    assert record.run_id is not None
    artifacts = str(runs / "artifacts")
    return {path for path in files(runs) if not path.startswith(artifacts) or record.run_id in path}


@pytest.mark.parametrize(
    ("trial", "reason", "epochs"), [(GOOD, "finished", 4), (STALLS, "rising", None), (WORSE, "rising", None)]
)
def test_a_finished_trial_is_bit_identical(small_study: Small, trial: int, reason: str, epochs: int | None) -> None:
    record = read(small_study.runs, trial)
    assert record.reason == reason and record.state == ("PRUNED" if trial == WORSE else "COMPLETE")
    before = own(small_study.runs, record)
    result = command(small_study.runs, trial)
    assert result.exit_code == 0, result.output
    trained = len(record.attrs["train_losses"])
    assert trained == (epochs or trained)
    # Four metrics an epoch, two a step of which there are five an epoch: none is left out.
    assert (
        result.output.splitlines()[0] == f"trial {trial}: bit-identical, all {trained * (4 + 2 * 5)} recorded values"
    )
    assert own(small_study.runs, record) == before


@pytest.mark.long
def test_a_trial_that_paused_and_went_on_is_bit_identical(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path
) -> None:
    """Others trained between. Dropout and the order of the samples are drawn as in a training without a break, and the
    learning rate is as high."""

    def search(folder: Path) -> None:
        (folder / "paused.py").write_text(f"MODEL = {str(tiny_checkpoint)!r}\n{PAUSES}", encoding="utf-8")
        arguments = ("--strategy", "rungs", "--slots", "1")
        study = str(folder / "paused.py")
        done = search_process.run(search_process.command(folder / "runs", *arguments, study=study, settings=()))
        assert done.returncode == 0, done.stdout + done.stderr

    runs = once.make(tmp_path_factory, "paused", search) / "runs"
    storage = open_storage(f"sqlite:///{runs}/optuna.db")
    trials = lifecycle.read_trials(find_study(storage, "paused"))
    close_storage(storage)
    for number in (0, 1):
        assert trials[number].state == "COMPLETE" and records.PAUSED_AT in trials[number].attrs
        result = command(runs, number, study="paused")
        assert result.exit_code == 0, result.output
        # Four epochs of four steps: what was recorded before the pause and after it.
        assert result.output == f"trial {number}: bit-identical, all {4 * (4 + 2 * 4)} recorded values\n"


def test_a_trial_that_broke_in_float16_breaks_again_at_the_same_step(small_study: Small) -> None:
    result = command(small_study.runs, FLOAT16)
    assert result.exit_code == 0, result.output
    assert "bit-identical" in result.output
    assert "it ended as it did: nonfinite.step=2, nonfinite.tensor=param: " in result.output
    assert "diverged.step=3" in result.output


def test_a_changed_record_departs_where_it_was_changed(copy: Path) -> None:
    run_id = read(copy, GOOD).run_id
    with sqlite3.connect(copy / "mlflow.db") as database:
        where = "run_uuid = ? and key = 'step/loss' and step = 7"
        (loss,) = database.execute(f"select value from metrics where {where}", [run_id]).fetchone()
        database.execute(f"update metrics set value = ? where {where}", [loss + 1e-12, run_id])
    result = command(copy, GOOD)
    assert result.exit_code == 1
    assert result.output == (
        f"trial 0: departs at step 7: loss was {loss + 1e-12!r}, is {loss!r}\n"
        "nothing recorded of the environment differs\n"
    )


def test_a_changed_epoch_departs_at_that_epoch(copy: Path) -> None:
    run_id = read(copy, GOOD).run_id
    with sqlite3.connect(copy / "mlflow.db") as database:
        where = "run_uuid = ? and key = 'val_loss' and step = 3"
        database.execute(f"update metrics set value = 1.25 where {where}", [run_id])
        for value, key in (("0.0.1", "version.torch"), ("other", "data_fingerprint")):
            changed = database.execute(
                "update tags set value = ? where run_uuid = ? and key = ?", [value, run_id, HIDDEN + key]
            )
            assert changed.rowcount == 1
    result = command(copy, GOOD)
    assert result.exit_code == 1
    lines = result.output.splitlines()
    assert lines[0].startswith("trial 0: departs at epoch 3: val_loss was 1.25, is 6.")
    assert lines[1] == "the data is not the one that the trial was trained with: its fingerprint differs"
    assert lines[2] == "what differs in the environment:"
    assert lines[3].startswith("  - data_fingerprint: other -> ")
    assert lines[4].startswith("  - version.torch: 0.0.1 -> ") and len(lines) == 5


def test_a_record_says_which_rule_its_trial_was_judged_by(copy: Path) -> None:
    record = read(copy, GOOD)
    assert record.attrs[records.STOP_RULE] == {"patience": 2, "min_delta": 0.05}
    tags = open_tracking(f"sqlite:///{copy}/mlflow.db", copy / "artifacts").tags(record.run_id or "")
    assert (tags["patience"], tags["min_delta"]) == ("2", "0.05")


def test_a_record_of_an_older_version_comes_again(copy: Path) -> None:
    """Its configuration has the rule for stopping early, which a training run does not have any more."""
    with sqlite3.connect(copy / "optuna.db") as database:
        where = "key = 'lora_search:config' and trial_id = (select trial_id from trials where number = ?)"
        query = f"select trial_id, value_json from trial_system_attributes where {where}"
        trial_id, text = database.execute(query, [GOOD]).fetchone()
        older = json.dumps({**json.loads(text), "patience": 2, "min_delta": 0.05})
        database.execute(f"delete from trial_system_attributes where {where}", [GOOD])
        insert = "insert into trial_user_attributes (trial_id, key, value_json) values (?, 'config', ?)"
        database.execute(insert, [trial_id, older])
    result = command(copy, GOOD)
    assert (result.exit_code, "bit-identical" in result.output) == (0, True), result.output


def test_a_changed_configuration_departs_at_the_first_loss_it_can_change(small_study: Small, copy: Path) -> None:
    record = read(copy, GOOD)
    tracking = open_tracking(f"sqlite:///{copy}/mlflow.db", copy / "artifacts")
    config = TrainConfig.parse({**record.config, "learning_rate": record.config["learning_rate"] * 1.001})
    result = replay.replay(record, config, tracking)
    assert not result.identical and result.first is not None
    # Before the first update the models are the same.
    assert result.first[:2] == ("step/loss", 2)


def test_a_trial_that_does_not_break_again_is_not_identical(copy: Path) -> None:
    record = read(copy, FLOAT16)
    tracking = open_tracking(f"sqlite:///{copy}/mlflow.db", copy / "artifacts")
    # An eps that float16 can hold: the loss of step 1 is the same, and no NaN follows.
    config = TrainConfig.parse({**record.config, "adam_epsilon": 1e-4})
    result = replay.replay(record, config, tracking)
    assert not result.identical and result.first is None and result.compared == 2
    text = describe(FLOAT16, result)
    assert "ended otherwise, after 2 values" in text and "  - diverged.step: 3 -> none" in text


def refused(copy: Path, trial: int, *options: str, study: str = NAME) -> str:
    result = command(copy, trial, *options, study=study)
    assert isinstance(result.exception, StudyError | StorageError), result.output
    return str(result.exception)


def test_what_cannot_be_replayed_is_told_in_one_message(copy: Path, tmp_path: Path) -> None:
    assert refused(copy, 5) == "the study 'small_real' has no trial 5; it has 0 to 4"
    assert "no study 'small_reel'; did you mean 'small_real'?" in refused(copy, 0, study="small_reel")
    with sqlite3.connect(copy / "optuna.db") as database:
        database.execute("update trials set state = 'RUNNING' where number = 1")
        database.execute("update trials set state = 'FAIL' where number = 2")
    assert refused(copy, 1) == "trial 1 is RUNNING: only a finished trial can be replayed"
    assert refused(copy, 2) == "trial 2 is FAIL: only a finished trial can be replayed"


def test_missing_databases_are_told_and_not_created(copy: Path, tmp_path: Path) -> None:
    (copy / "mlflow.db").unlink()
    before = files(copy)
    assert refused(copy, 0).startswith(f"there is no database '{copy}/mlflow.db': run a study first")
    assert "or name its records with --runs-dir or --tracking-uri" in refused(copy, 0)
    other = f"sqlite:///{copy}/elsewhere.db"
    assert f"there is no database '{copy}/elsewhere.db'" in refused(copy, 0, "--storage", other)
    assert f"there is no database '{copy}/elsewhere.db'" in refused(copy, 0, "--tracking-uri", other)
    assert f"there is no database '{copy}/nowhere/optuna.db'" in refused(copy / "nowhere", 0)
    assert files(copy) == before


def test_the_program_ends_with_2_and_one_line(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["replay", "--study", NAME, "--trial", "99", "--runs-dir", str(copy)]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as end:
        replay.cli.run(replay.app)
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: the study 'small_real' has no trial 99; it has 0 to 4\n"


# ---------------------------------------------------------------------------- the parts


def test_a_moved_data_folder_and_model_may_be_named(small_study: Small, copy: Path, tiny_checkpoint: Path) -> None:
    with sqlite3.connect(copy / "optuna.db") as database:
        table, where = "trial_system_attributes", "key = 'lora_search:config'"
        query = f"select trial_system_attribute_id, value_json from {table} where {where}"
        for number, config in database.execute(query).fetchall():
            moved = json.dumps({**json.loads(config), "model": "/gone"})
            change = f"update {table} set value_json = ? where trial_system_attribute_id = ?"
            database.execute(change, [moved, number])
    result = command(copy, GOOD, "--model", str(tiny_checkpoint), study="small-real")
    assert result.exit_code == 0, result.output


def test_the_first_difference_is_a_step_before_the_epoch_it_belongs_to() -> None:
    then = {("val_loss", 1): 1.0, ("step/loss", 9): 2.0, ("step/grad_norm", 8): 3.0, ("step/loss", 8): 4.0}
    assert compare(then, dict.fromkeys(then, 0.0), ()).first == ("step/loss", 8, 4.0, 0.0)
    assert compare(then, {**then, ("val_loss", 1): 1.5}, ()).first == ("val_loss", 1, 1.0, 1.5)
    same = compare(then, {**then, ("val_loss", 2): 0.5}, ())
    assert same.identical and same.compared == 4


def test_a_value_that_does_not_come_again_departs() -> None:
    result = compare({("step/loss", 1): 1.0, ("step/loss", 2): 2.0}, {("step/loss", 1): 1.0}, ())
    assert result.first is not None and result.first[:3] == ("step/loss", 2, 2.0)
    assert "departs at step 2: loss was 2.0, is nan" in describe(0, result)


def test_nothing_recorded_is_nothing_proven() -> None:
    empty = compare({}, {("step/loss", 1): 1.0}, ())
    assert not empty.identical and "nothing to compare" in describe(0, empty)
    broke_at_once = compare({}, {}, (), {"diverged.step": ("3", "3")})
    assert broke_at_once.identical and "diverged.step=3" in describe(0, broke_at_once)


def test_changed_facts_are_named_and_equal_ones_are_not() -> None:
    then = {"device": "cuda", "version.torch": "2.6", "version.peft": "0.18", "host": "a", "gpu": "H100"}
    now = {"device": "cpu", "version.torch": "2.13", "version.peft": "0.18", "host": "b", "version.numpy": "2"}
    assert replay.changed_facts(then, now) == (
        "device: cuda -> cpu",
        "gpu: H100 -> none",
        "version.numpy: not recorded -> 2",
        "version.torch: 2.6 -> 2.13",
    )
    text = describe(0, Comparison(1, None, ("device: cuda -> cpu",)))
    assert text.startswith("trial 0: bit-identical") and text.endswith("  - device: cuda -> cpu")


def test_another_model_or_other_data_are_said_in_so_many_words() -> None:
    changed = replay.changed_facts(
        {"model_fingerprint": "a", "data_fingerprint": "c"}, {"model_fingerprint": "b", "data_fingerprint": "c"}
    )
    text = describe(0, Comparison(1, ("val_loss", 1, 1.0, 2.0), changed))
    assert "the model is not the one that the trial was trained with" in text and "the data is not" not in text
    assert "model_fingerprint: a -> b" in text


def test_it_stops_where_the_losses_depart() -> None:
    recorded = {("step/loss", 1): 1.0, ("step/grad_norm", 1): 0.5, ("val_loss", 1): 1.5}
    assert not departs(step(1), recorded, exact=True)
    assert departs(step(1, loss=1.1), recorded, exact=True) and departs(step(1, norm=0.6), recorded, exact=True)
    assert not departs(step(1, loss=1.1), recorded, exact=False), "a window of steps is not one step"
    assert not departs(step(2), recorded, exact=True), "not recorded"
    assert departs(epoch(1, 10, val_loss=1.6), recorded, exact=False)
    assert not departs(replace(epoch(1, 10), train_loss=9.0), recorded, exact=False)


def test_it_goes_as_far_as_the_record() -> None:
    recorded = {("step/loss", 20): 1.0, ("val_loss", 2): 1.5}
    assert not is_past(epoch(1, 10), recorded, {}) and is_past(epoch(2, 20), recorded, {})
    broke = {"diverged.step": "23", "nonfinite.step": "21"}  # in its third epoch
    assert not is_past(epoch(2, 20), recorded, broke) and not is_past(step(23, 3), recorded, broke)
    assert is_past(step(24, 3), recorded, broke)
    assert not is_past(step(21, 2), {("val_loss", 2): 1.5}, {}), "a run whose steps were lost has its epochs"


def test_a_trial_that_trained_beside_others_may_differ_in_rounding() -> None:
    then = {("step/loss", 1): 2.0, ("step/loss", 2): 1.5, ("val_loss", 1): 1.0}
    now = {**then, ("step/loss", 2): 1.5000003}
    alone = compare(then, now, ())
    assert not alone.identical and alone.first == ("step/loss", 2, 1.5, 1.5000003)
    packed = compare(then, now, (), tolerance=1e-3)
    assert packed.identical
    (line,) = describe(4, packed).splitlines()
    assert line.startswith(
        "trial 4: the same, all 3 recorded values to a relative difference of 2.0e-07 (loss at step 2)"
    )
    assert not compare(then, {**then, ("val_loss", 1): 1.01}, (), tolerance=1e-3).identical
    assert "bit-identical" in describe(4, compare(then, then, (), tolerance=1e-3))
