"""The whole way through processes: a study from the command line to its records, and every way it can be stopped."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from search import records, replay
from search.storage.database import close_storage, open_storage
from search.storage.studies import find_study
from search.tracking.client import open_tracking
from tests.bad_input import harness
from tests.support import called
from tests.support.search_process import (
    QUICK,
    ROOT,
    Search,
    command,
    environment,
    importer_of,
    run,
    trials_of,
    workers_of,
)
from tests.support.small_study import Small
from tests.support.template import Forked

LONG = ("max_samples=24", "num_epochs=5", "warmup_steps=0", "batch_size=2")


def curves_of(runs: Path, name: str = "rsicap_mini") -> dict[int, dict[int, float]]:
    """Reported validation losses by trial and epoch, to the last bit."""
    storage = open_storage(f"sqlite:///{runs / 'optuna.db'}")
    try:
        study = find_study(storage, name)
        return {t.number: dict(t.intermediate_values) for t in study.get_trials(deepcopy=False)}
    finally:
        close_storage(storage)


def runs_of(runs: Path, name: str = "rsicap_mini") -> dict[str, tuple[str, dict[str, str]]]:
    """(status, tags) of every MLflow run by its name; the study's own run under `study`."""
    tracking = open_tracking(f"sqlite:///{runs / 'mlflow.db'}", runs / "artifacts")
    experiment = tracking.find_experiment(name)
    assert experiment is not None
    return {
        "study" if r.tags.get("kind") == "study" else r.tags["mlflow.runName"].partition(" lr=")[0]: (r.status, r.tags)
        for r in tracking.runs(experiment).values()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """(runs folder, output) of an undisturbed study of three trials."""
    runs = tmp_path_factory.mktemp("finished")
    done = run(command(runs, "--trials", "3"), fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "", "a worker's end is silent too"
    yield runs, done.stdout


@pytest.fixture
def search() -> Iterator[Any]:
    started: list[Search] = []

    def start(arguments: list[str], **options: bool) -> Search:
        started.append(Search(arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.kill()


def test_a_study_ends_with_its_leaderboard(finished: tuple[Path, str]) -> None:
    runs, output = finished
    trials = trials_of(runs)
    assert [t.number for t in trials] == [0, 1, 2]
    assert all(t.state in ("COMPLETE", "PRUNED") for t in trials)
    best = min((t for t in trials if t.state == "COMPLETE"), key=lambda t: t.value or 9e9)
    assert f"Best: trial {best.number}, validation loss {best.value:.4f} at epoch {best.best_epoch}" in output
    assert "TRAINING_CONFIG = {" in output and "optuna-dashboard --artifact-dir" in output
    adapter = re.search(r"^adapter +(\S+)$", output, re.MULTILINE)
    assert adapter and (Path(adapter[1]) / "adapter_model.safetensors").is_file()


def test_everything_is_recorded(finished: tuple[Path, str]) -> None:
    runs, _ = finished
    by_name = runs_of(runs)
    assert by_name["study"][0] == "FINISHED"
    assert len(by_name) == 4 and all(status != "RUNNING" for status, _ in by_name.values())
    tracking = open_tracking(f"sqlite:///{runs / 'mlflow.db'}", runs / "artifacts")
    for trial in trials_of(runs):
        status, tags = by_name[f"trial {trial.number:03d}"]
        assert status == "FINISHED" and tags["state"] == trial.state and tags["reason"] == trial.reason
        assert {"data_fingerprint", "model_fingerprint", "host"} <= set(tags)
        assert any(key.startswith("version") for key in tags)
        assert trial.run_id is not None
        run_ = tracking._client.get_run(trial.run_id)
        assert set(trial.config) <= set(run_.data.params)
        epochs = tracking.epochs(trial.run_id)
        assert [e.val_loss for e in epochs] == list(curves_of(runs)[trial.number].values())
        steps = tracking.steps(trial.run_id)
        assert steps[0].loss is not None and steps[0].grad_norm is not None


@pytest.mark.slow
def test_the_same_seed_gives_the_same_study(finished: tuple[Path, str], tmp_path: Path) -> None:
    runs, _ = finished
    again = run(command(tmp_path, "--trials", "3"))
    assert again.returncode == 0
    assert curves_of(tmp_path) == curves_of(runs)
    assert [t.params for t in trials_of(tmp_path)] == [t.params for t in trials_of(runs)]
    other = run([*command(tmp_path / "other", "--trials", "1"), "--seed", "1"])
    assert other.returncode == 0
    assert trials_of(tmp_path / "other")[0].params != trials_of(runs)[0].params


def test_trials_that_trained_together_come_again_alone(finished: tuple[Path, str]) -> None:
    runs, output = finished
    assert re.search(r"up to \d+ trials train at once on one base, until a pass has \d+ samples", output)
    assert all(int(t.attrs[records.SLOTS]) > 1 for t in trials_of(runs))
    threads = torch.get_num_threads()
    done = called.call(replay.app, ["--study", "rsicap_mini", "--trial", "1", "--runs-dir", str(runs)])
    torch.set_num_threads(threads)  # a replay takes as many as the trial had
    assert done.code == 0, done.out + done.err
    assert re.match(r"trial 1: (bit-identical, all|the same, all \d+ recorded values to a relative)", done.out)


def test_slots_are_as_many_as_asked_for(small_study: Small) -> None:
    """It was searched with `--slots 1`."""
    assert "one trial at a time" in small_study.output
    started = [line.split(":")[0] for line in small_study.output.splitlines() if line.startswith("trial ")]
    assert started.index("trial 1") > max(i for i, name in enumerate(started) if name == "trial 0")


def test_trials_is_the_total(finished: tuple[Path, str], tmp_path: Path) -> None:
    runs = tmp_path / "copy"
    shutil.copytree(finished[0], runs)
    before = curves_of(runs)
    more = run(command(runs, "--trials", "4"))
    assert more.returncode == 0 and "trial 0:" not in more.stdout and "Best: trial" in more.stdout
    after = curves_of(runs)
    assert len(after) == 4 and {n: after[n] for n in before} == before


def test_a_changed_definition_is_refused(finished: tuple[Path, str], tmp_path: Path) -> None:
    runs = tmp_path / "copy"
    shutil.copytree(finished[0], runs)
    with harness.no_workers():
        changed = harness.search(command(runs, settings=(*QUICK[:1], "num_epochs=5", QUICK[2]))[3:])
    changed.check_refused("base.num_epochs: 2 -> 5", "--fresh")


@pytest.mark.slow  # test_studies.py has the generations of a study
def test_a_changed_definition_starts_afresh(finished: tuple[Path, str], tmp_path: Path) -> None:
    runs = tmp_path / "copy"
    shutil.copytree(finished[0], runs)
    fresh = run(command(runs, "--fresh", "--trials", "1", settings=(*QUICK[:1], "num_epochs=1", QUICK[2])))
    assert fresh.returncode == 0 and "study rsicap_mini-2" in fresh.stdout
    assert len(trials_of(runs, "rsicap_mini-2")) == 1


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[int, float]]:
    """The curves of a longer trial that nothing stopped."""
    runs = tmp_path_factory.mktemp("undisturbed")
    done = run(command(runs, "--trials", "1", settings=LONG))
    assert done.returncode == 0, done.stdout + done.stderr
    return curves_of(runs)


def stop_the_group(running: Search, number: int, runs: Path) -> None:
    """Schedulers and terminals signal every process, that from which workers are forked too."""
    worker = workers_of(running.process.pid)
    os.killpg(running.process.pid, number)
    assert running.end() == 128 + number, running.output()
    assert not any(process.is_running() for process in worker)
    assert trials_of(runs)[0].state == "WAITING"
    assert {status for status, _ in runs_of(runs).values()} == {"KILLED"}
    assert "Traceback" not in running.output() and "Lost track" not in running.output()


def test_interrupted_runs_resume_bit_for_bit(
    tmp_path: Path, search: Any, undisturbed: dict[int, dict[int, float]]
) -> None:
    """Ctrl-C once, Ctrl-C twice; then on to the end: the same trial, as if it had never stopped."""
    runs = tmp_path / "runs"
    arguments = command(runs, "--trials", "1", settings=LONG)

    first = search(arguments)
    first.wait_for("epoch 1:")
    stop_the_group(first, signal.SIGINT, runs)
    assert "Interrupted; the same command continues the study." in first.output()
    reported = len(curves_of(runs)[0])
    assert 1 <= reported < 5

    second = search(arguments)
    second.wait_for("trial 0:")
    os.killpg(second.process.pid, signal.SIGINT)
    os.killpg(second.process.pid, signal.SIGINT)
    assert second.end() == 130, second.output()
    assert trials_of(runs)[0].state == "WAITING"

    assert all(status != "RUNNING" for status, _ in runs_of(runs).values())

    done = run(arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [t.state for t in trials_of(runs)] == ["COMPLETE"]
    assert curves_of(runs) == undisturbed
    by_name = runs_of(runs)
    assert len(by_name) == 2 and {status for status, _ in by_name.values()} == {"FINISHED"}


@pytest.mark.long
def test_a_killed_worker_is_replaced(tmp_path: Path, search: Any, undisturbed: dict[int, dict[int, float]]) -> None:
    runs = tmp_path / "runs"
    running = search(command(runs, "--trials", "1", settings=LONG))
    running.wait_for("epoch 1:")
    workers = workers_of(running.process.pid)
    assert len(workers) == 1
    workers[0].kill()
    assert running.end() == 0, running.output()
    lost, resumed = trials_of(runs)
    assert (lost.state, lost.reason) == ("FAIL", records.LOST)
    assert resumed.state == "COMPLETE" and resumed.attrs[records.RESUMES] == 0
    assert curves_of(runs)[1] == undisturbed[0]
    by_name = runs_of(runs)
    assert by_name["trial 000"][0] == "KILLED" and by_name["trial 001"][0] == "FINISHED"


@pytest.mark.long
def test_the_runs_folder_is_deleted_under_a_running_search(tmp_path: Path, search: Any) -> None:
    """One message, no new study in its place, and the study's own run ends as FAILED where MLflow still is."""
    runs, mlflow = tmp_path / "runs", tmp_path / "elsewhere"
    mlflow.mkdir()
    settings = (*LONG[:1], "num_epochs=60", *LONG[2:])
    arguments = command(
        runs, "--trials", "1", "--tracking-uri", f"sqlite:///{mlflow / 'mlflow.db'}", settings=settings
    )
    running = search(arguments)
    running.wait_for("epoch 1:")
    runs.rename(tmp_path / "gone")  # at once; what is written meanwhile would keep a folder from being removed
    shutil.rmtree(tmp_path / "gone", ignore_errors=True)
    assert running.end() == 2, running.output()
    output = running.output()
    assert output.count("was deleted or replaced while the search ran") == 1, output
    assert "Traceback" not in output and not (runs / "optuna.db").exists(), output
    assert runs_of(mlflow)["study"][0] == "FAILED"


@pytest.mark.long
def test_a_study_whose_trials_all_diverge_has_no_result(tmp_path: Path) -> None:
    settings = (*QUICK, "learning_rate=10", "lora_alpha=1000000")
    done = run(command(tmp_path / "runs", "--trials", "2", "--slots", "1", settings=settings))
    trials = trials_of(tmp_path / "runs")
    assert {(t.state, t.reason) for t in trials} == {("PRUNED", records.NON_FINITE)}, done.stdout
    assert done.returncode == 1 and "\nno trial has a result (2 non_finite), the last with: " in done.stdout
    assert runs_of(tmp_path / "runs")["study"][0] == "FAILED"


def test_a_killed_supervisor_leaves_a_study_that_resumes(
    tmp_path: Path, search: Any, undisturbed: dict[int, dict[int, float]]
) -> None:
    runs = tmp_path / "runs"
    arguments = command(runs, "--trials", "1", settings=LONG)
    running = search(arguments)
    running.wait_for("epoch 1:")
    below = psutil.Process(running.process.pid).children(recursive=True)
    assert workers_of(running.process.pid)
    running.process.kill()
    gone, alive = psutil.wait_procs(below, timeout=60)
    assert gone and not alive, "a worker outlived its supervisor"
    assert run(arguments).returncode == 0
    assert trials_of(runs)[-1].state == "COMPLETE"
    assert list(curves_of(runs).values())[-1] == undisturbed[0]


@pytest.mark.slow  # a replaced worker, and workers that only look dead (test_supervisor.py), are tested without it
def test_the_process_that_workers_are_forked_from_is_killed(
    tmp_path: Path, search: Any, undisturbed: dict[int, dict[int, float]]
) -> None:
    """Its workers look dead to the supervisor, which starts another; the trial is given back and goes on there."""
    runs = tmp_path / "runs"
    running = search(command(runs, "--trials", "1", settings=LONG), fresh=True)
    running.wait_for("epoch 1:")
    (worker,) = workers_of(running.process.pid)
    importer_of(running.process.pid).kill()
    assert running.end() == 0, running.output()
    assert not worker.is_running()
    assert [t.state for t in trials_of(runs)] == ["COMPLETE"]
    assert curves_of(runs) == undisturbed
    assert trials_of(runs)[0].attrs[records.WORKER]["pid"] != worker.pid
    running.wait_for("Lost track of worker 0; starting a replacement")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)])
def test_a_signal_to_the_whole_group_is_an_orderly_end(tmp_path: Path, search: Any, number: int) -> None:
    """Schedulers and terminals signal every process, that from which workers are forked too. As Ctrl-C above."""
    # So long that no machine is too slow to stop it.
    running = search(command(tmp_path / "runs", "--trials", "1", settings=(LONG[0], "num_epochs=100", *LONG[2:])))
    running.wait_for("epoch 1:")
    stop_the_group(running, number, tmp_path / "runs")


@pytest.mark.parametrize(
    "gone", ["pipe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("terminal", "closed"))]
)
def test_output_that_goes_away_costs_no_trial(tmp_path: Path, gone: str) -> None:
    """`| head -1`; ssh gone under nohup, which has SIGHUP ignored; `>&- 2>&-`."""
    runs = tmp_path / "runs"
    ours, theirs = os.openpty() if gone == "terminal" else os.pipe()
    process = Forked(
        command(runs, "--trials", "1", "--slots", "1"),
        stdout=theirs,
        stderr=theirs,
        env=environment(),
        cwd=ROOT,
        start_new_session=True,
        ignored=[signal.SIGHUP],
        closed=[1, 2] if gone == "closed" else (),
    )
    os.close(theirs)
    if gone != "closed":
        os.read(ours, 1)
    os.close(ours)
    assert process.wait(240) == 0
    (trial,) = trials_of(runs)
    assert trial.state == "COMPLETE"
    assert {status for status, _ in runs_of(runs).values()} == {"FINISHED"}
    kept = (runs / "rsicap_mini" / "search.log").read_text()
    assert "trial 0: COMPLETE" in kept and "Traceback" not in kept
    assert ("the output goes nowhere from now on" in kept) == (gone != "closed")


@pytest.mark.long
def test_ctrl_c_while_imports_are_made(tmp_path: Path, search: Any) -> None:
    running = search(command(tmp_path / "runs", "--trials", "1", settings=LONG), fresh=True)
    running.wait_for("study rsicap_mini")  # the supervisor is ready long before the imports
    os.killpg(running.process.pid, signal.SIGINT)
    assert running.end() == 130, running.output()
    assert "Traceback" not in running.output() and "KeyboardInterrupt" not in running.output()


@pytest.mark.slow  # test_executor.py has how such workers are started
def test_where_nothing_can_be_forked_from_workers_import_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket's address has some hundred characters at most, and lies below TMPDIR."""
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("TMPDIR", str(deep))
    done = run(command(tmp_path / "runs", "--trials", "1"), fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == "" and trials_of(tmp_path / "runs")[0].state == "COMPLETE"


def test_a_search_that_cannot_start_leaves_no_process(tmp_path: Path) -> None:
    """What would be forked from is importing by then, and is not waited for."""
    failing = Search(command(tmp_path / "runs", "--set", f"data={tmp_path / 'nowhere'}"), fresh=True)
    assert failing.end() == 2, failing.output()
    session = failing.process.pid
    left = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
    failing.kill()
    _, alive = psutil.wait_procs(left, timeout=1)
    assert not [process for process in alive if not ended(process)]


def ended(process: psutil.Process) -> bool:
    """Whether it has ended, and at most waits for whoever reaps it."""
    with suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


@pytest.mark.long
def test_two_workers_share_a_study(tmp_path: Path) -> None:
    done = run(command(tmp_path, "--trials", "4", "--workers", "2"))
    assert done.returncode == 0, done.stdout + done.stderr
    trials = trials_of(tmp_path)
    assert len(trials) == 4 and all(t.state in ("COMPLETE", "PRUNED") for t in trials)
    assert len({t.attrs[records.WORKER]["pid"] for t in trials}) == 2


def test_the_time_can_be_limited(tmp_path: Path) -> None:
    done = run(command(tmp_path, "--timeout", "1s", settings=LONG))
    assert done.returncode == 0
    assert "Time is up" in done.stdout
    assert not {t.state for t in trials_of(tmp_path)} & {"RUNNING", "COMPLETE"}, (
        "0 does not say that the study is done"
    )
