"""One trial's life, without a worker, a model or a process: the trainer's events are made up, the pipe is real."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError

from search import pruning, records
from search.errors import DatabaseAway
from search.places import Places
from search.planning.budget import Budget
from search.records import Outcome
from search.sampling import params
from search.space import Float
from search.storage import studies as store
from search.storage.database import close_storage, open_storage
from search.study import Study
from search.tracking.client import open_tracking
from search.tracking.gpu_metrics import GpuWatch
from search.tracking.runs import StudyRuns
from search.workers.protocol import HandOver, Job, Link, Message, Order, Progress, TrialEnded, TrialStarted
from search.workers.trial import TrialRun
from search.workers.trial_tracking import TrialContext
from tests.support.made_up_events import epoch, started, step
from trainer.events import RunStarted, StepEnded


class Ground:
    """A study with a trial that runs in this process, and the supervisor's end of its pipe."""

    def __init__(self, folder: Path, examined: Any) -> None:
        definition = Study(
            name="made_up",
            description="no training",
            base={"data": "mini", "num_epochs": 2, "warmup_steps": 0},
            space={"learning_rate": Float(1e-4, 1e-2, log=True)},
            n_trials=3,
        )
        urls = [f"sqlite:///{folder / name}" for name in ("optuna.db", "mlflow.db")]
        self.storage = open_storage(urls[0])
        self.study = store.open_study(self.storage, definition, pruner=pruning.pruner_for("none", definition))
        job = Job(
            study=definition,
            study_name=self.study.study_name,
            places=Places.of(folder, urls[0], urls[1]),
            budget=Budget(3),
            strategy="joint",
            pruner="none",
            examined=examined,
            threads=1,
        )
        self.tracking = open_tracking(urls[1], folder / "artifacts")
        runs = StudyRuns(job.places, job.study_name)
        runs.start_study({})
        self.supervisor, theirs = Pipe()
        self.link = Link(theirs)
        self.context = TrialContext(study=self.study, job=job, runs=runs, link=self.link, slots=2)

    def trial(self) -> TrialRun:
        """A trial that has begun."""
        asked = self.study.ask()
        params.suggest(asked, self.context.job.study)
        run = TrialRun(asked, self.context)
        assert run.begin() is None
        return run

    def heard(self) -> list[Message]:
        """What the supervisor has received."""
        messages = []
        while self.supervisor.poll():
            messages.append(self.supervisor.recv())
        return messages

    def optuna(self, number: int = 0) -> optuna.trial.FrozenTrial:
        """The trial as Optuna's database has it."""
        return self.study.get_trials(deepcopy=False)[number]

    def mlflow(self, run: TrialRun) -> tuple[str, dict[str, str]]:
        """(status, tags) of the trial's MLflow run."""
        found = self.tracking._client.get_run(run.trial.user_attrs[records.RUN_ID])
        return found.info.status, found.data.tags


@pytest.fixture
def ground(tmp_path: Path, mini_examined: Any) -> Iterator[Ground]:
    made = Ground(tmp_path, mini_examined)
    yield made
    close_storage(made.storage)


@pytest.fixture(scope="module")
def mini_examined() -> Any:
    from trainer.data import dataset

    return dataset.examine("mini")


def test_a_trial_needs_no_worker(ground: Ground) -> None:
    run = ground.trial()
    assert run.take(started()) is None and run.take(epoch(1)) is None
    outcome = run.take(epoch(2, val_loss=0.3))
    assert outcome == Outcome(state="COMPLETE", reason=records.FINISHED, detail="2 epochs done")
    assert not run.over
    run.end(outcome)
    assert run.over
    stored = ground.optuna()
    assert (stored.state.name, stored.value, stored.user_attrs[records.SLOTS]) == ("COMPLETE", 0.3, 2)
    status, tags = ground.mlflow(run)
    assert (status, tags["state"], tags["best_epoch"]) == ("FINISHED", "COMPLETE", "2")
    heard = ground.heard()
    assert isinstance(heard[0], TrialStarted) and isinstance(heard[-1], TrialEnded)
    assert heard[-1].value == 0.3


def test_progress_carries_the_trainers_own_events_and_few_steps(ground: Ground) -> None:
    run = ground.trial()
    events = [started(modules=5000), *(step(number) for number in range(1, 200)), epoch(1)]
    for event in events:
        run.take(event)
    sent = [message for message in ground.heard() if isinstance(message, Progress)]
    assert sent[-1] == Progress(number=0, event=events[-1])  # type: ignore[arg-type]
    assert sum(isinstance(message.event, StepEnded) for message in sent) <= 3
    assert sent[0].event == RunStarted(**{**vars(events[0]), "adapted_modules": (), "skipped_rows": ()})
    assert max(len(pickle.dumps(message)) for message in sent) < 2000


def test_the_gpus_of_its_worker_are_recorded_with_a_trial(ground: Ground) -> None:
    watch, key = GpuWatch(lambda: [], every_s=0.0), "system/gpu_3_power_usage_watts"
    ground.context = replace(ground.context, gpus=watch)
    run = ground.trial()
    run.take(started())
    watch.sums = {key: (2, 700.0)}
    for event in (step(1), step(2), epoch(1)):  # no look between the two steps
        run.take(event)
    run.end(run.interrupted())
    found = ground.tracking._client.get_metric_history(run.trial.user_attrs[records.RUN_ID], key)
    assert [(each.step, each.value) for each in found] == [(1, 350.0)]


def test_an_order_to_end_makes_a_trial_wait(ground: Ground) -> None:
    run = ground.trial()
    ground.supervisor.send(HandOver())
    assert run.take(epoch(1)) is None and ground.link.share
    ground.supervisor.send(Order.END_NOW)
    outcome = run.take(step(5))
    assert outcome is not None and (outcome.state, outcome.detail) == ("WAITING", "after epoch 1")
    run.end(outcome)
    assert ground.optuna().state.name == "WAITING"
    assert ground.mlflow(run)[0] == "KILLED"
    assert run.interrupted("handed over ").detail == "handed over after epoch 1"


def test_a_fault_is_recorded_in_optuna_and_mlflow(ground: Ground) -> None:
    run = ground.trial()
    run.take(epoch(1))
    run.end(Outcome(state="FAIL", reason=records.ERROR, detail="the image is truncated"))
    assert run.over
    stored = ground.optuna()
    assert (stored.state.name, stored.user_attrs[records.DETAIL]) == ("FAIL", "the image is truncated")
    status, tags = ground.mlflow(run)
    assert (status, tags["reason"], tags["detail"]) == ("FAILED", records.ERROR, "the image is truncated")
    ends = [message for message in ground.heard() if isinstance(message, TrialEnded)]
    assert [(end.number, end.state, end.reason) for end in ends] == [(0, "FAIL", records.ERROR)]


@pytest.mark.parametrize(("reason", "over"), [(records.INTERRUPTED, False), (records.LOST, True)])
def test_an_abandoned_trial_ends_in_mlflow_alone(ground: Ground, reason: str, over: bool) -> None:
    run = ground.trial()
    run.take(epoch(1))
    run.abandon(reason)
    assert run.over is over
    assert ground.optuna().state.name == "RUNNING" and records.REASON not in ground.optuna().user_attrs
    status, tags = ground.mlflow(run)
    assert (status, tags["reason"]) == ("KILLED", reason)
    ends = [message for message in ground.heard() if isinstance(message, TrialEnded)]
    assert [(end.state, end.reason) for end in ends] == ([("FAIL", records.LOST)] if over else [])


@pytest.mark.parametrize(("fault", "status"), [(DatabaseAway("gone"), "KILLED"), (OSError(28, "full"), "FAILED")])
def test_a_trial_whose_end_cannot_be_recorded_is_not_over(
    ground: Ground, monkeypatch: pytest.MonkeyPatch, fault: Exception, status: str
) -> None:
    run = ground.trial()
    run.take(epoch(1))
    outcome = run.take(epoch(2))
    assert outcome is not None
    monkeypatch.setattr(ground.study, "tell", _raises(fault))
    with pytest.raises(type(fault)):
        run.end(outcome)
    assert not run.over and ground.mlflow(run)[0] == status


def test_an_epoch_that_is_trained_again_is_not_judged(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last checkpoint is damaged. A plan looks at the latest report, which the trial would never come to again."""
    first = ground.trial()
    first.last_epoch = 4
    first.take(epoch(1))
    first.take(epoch(2))
    first.end(first.interrupted())
    monkeypatch.setattr("search.workers.trial.history_of", lambda *_: [epoch(1)])
    paused = Outcome(state="WAITING", reason=records.PAUSED, detail="others are worth more")
    monkeypatch.setattr(pruning, "verdict", lambda *_: paused)
    again = TrialRun(ground.study.ask(), ground.context)
    again.last_epoch = 4
    assert again.trial.number == first.trial.number
    assert again.begin() is None and again.take(epoch(2)) == paused


@pytest.mark.parametrize("samples", [160, None])
def test_a_trial_is_judged_among_those_on_its_samples(ground: Ground, samples: int | None) -> None:
    """Three better trials before it; the study's own have all samples."""
    ground.study.pruner = pruning.pruner_for("median", ground.context.job.study)
    run = ground.trial()
    run.last_epoch = 4
    config = {**run.config.model_dump(mode="json"), "max_samples": samples}
    for _ in range(3):
        better = optuna.trial.create_trial(
            value=0.1, intermediate_values=dict.fromkeys(range(1, 5), 0.1), user_attrs={records.CONFIG: config}
        )
        ground.study.add_trial(better)
    outcome = run.take(epoch(1)) or run.take(epoch(2))
    assert (outcome is None) == (samples is not None)


def test_mlflow_has_the_end_before_optuna(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a process that is killed between the two leaves a complete trial whose run lacks its last epochs for ever."""
    run = ground.trial()
    run.take(epoch(1))
    outcome = run.take(epoch(2, val_loss=0.3))
    assert outcome is not None
    then = []
    tell = ground.study.tell

    def killed_here(*args: Any, **named: Any) -> None:
        client = ground.tracking._client
        run_id = run.trial.user_attrs[records.RUN_ID]
        epochs = client.get_metric_history(run_id, "val_loss")
        then.append((ground.mlflow(run)[0], [point.step for point in epochs], ground.optuna().state.name))
        tell(*args, **named)

    monkeypatch.setattr(ground.study, "tell", killed_here)
    run.end(outcome)
    assert then == [("FINISHED", [1, 2], "RUNNING")]


def test_a_trial_that_was_taken_over_in_the_last_moment_ends_as_lost_in_mlflow(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ground.trial()
    run.take(epoch(1))
    outcome = run.take(epoch(2))
    assert outcome is not None
    monkeypatch.setattr(ground.study, "tell", _raises(UpdateFinishedTrialError("it is FAIL")))
    with pytest.raises(UpdateFinishedTrialError):
        run.end(outcome)
    run.abandon(records.LOST)
    status, tags = ground.mlflow(run)
    assert (status, tags["state"], tags["reason"]) == ("KILLED", "FAIL", records.LOST)


def _raises(fault: Exception) -> Callable[..., None]:
    def tell(*_: Any, **__: Any) -> None:
        raise fault

    return tell
