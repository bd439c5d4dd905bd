"""Which waiting trial is taken next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from search import processes, records
from search.planning.budget import Budget
from search.sampling.make import make_sampler
from search.sampling.params import suggest
from search.space import Choice, Float, Int, Multiple, param_name
from search.storage import lifecycle, optuna_private
from search.storage.database import close_storage, open_storage
from search.storage.queue import LongestFirst
from search.storage.studies import open_study
from search.study import Fixed, Study

GONE = {**processes.this_process(), "pid": 2**22 + 1}
BATCHES = {"short": 16, "long": 2, "middle": 8, "as long": 2}
DEFINITION = Study(
    name="queue",
    description="trials of many lengths",
    base={"max_samples": 40, "num_epochs": 6, "data": "mini", "model": "mini"},
    space={"learning_rate": Float(1e-5, 1e-3, log=True), "batch_size": Int(2, 16)},
    n_trials=8,
    enqueue=(
        *(Fixed(label=label, config={"batch_size": batch}) for label, batch in BATCHES.items()),
        Fixed(label="many epochs", config={"batch_size": 4, "num_epochs": 60}),
        Fixed(label="accumulates", config={"batch_size": 2, "gradient_accumulation_steps": 5}),
    ),
)


@pytest.fixture
def waiting(tmp_path: Path) -> Iterator[LongestFirst]:
    """The study of `DEFINITION` as a worker has it, its data folder with 30 rows."""
    storage = open_storage(f"sqlite:///{tmp_path / 'optuna.db'}")
    name = open_study(storage, DEFINITION).study_name
    sampler = make_sampler(DEFINITION)
    yield LongestFirst(name, storage, sampler, optuna.pruners.NopPruner(), DEFINITION, 30)
    close_storage(storage)


def taken(study: LongestFirst) -> list[str]:
    """Labels of all trials that wait, in the order in which they are taken."""
    labels = []
    while any(trial.state == TrialState.WAITING for trial in study.get_trials(deepcopy=False)):
        labels.append(study.ask().user_attrs["label"])
    return labels


def test_steps_left_are_those_of_the_loop(waiting: LongestFirst) -> None:
    left = {t.user_attrs["label"]: waiting.steps_left(t) for t in waiting.get_trials(deepcopy=False)}
    # 30 rows, since the folder has no 40: ceil(30 / 16) steps an epoch, and so on.
    assert left == {
        "short": 6 * 2,
        "long": 6 * 15,
        "middle": 6 * 4,
        "as long": 6 * 15,
        "many epochs": 60 * 8,
        "accumulates": 6 * 3,
    }


def test_the_longest_is_taken_first_where_trials_train_side_by_side(waiting: LongestFirst) -> None:
    waiting.longest_first = True
    assert taken(waiting) == ["many epochs", "long", "as long", "middle", "accumulates", "short"]


def test_one_after_the_other_they_keep_their_order(waiting: LongestFirst) -> None:
    assert taken(waiting) == [fixed.label for fixed in DEFINITION.enqueue]


def test_epochs_that_a_trial_has_had_count_no_more(waiting: LongestFirst) -> None:
    waiting.longest_first = True
    trial = waiting.ask()
    assert trial.user_attrs["label"] == "many epochs"
    suggest(trial, DEFINITION)
    for epoch in range(1, 60):
        trial.report(1.0, epoch)
    lifecycle.park(waiting, trial)
    assert waiting.steps_left(waiting.get_trials(deepcopy=False)[trial.number]) == 8
    assert taken(waiting)[-1] == "many epochs"


def test_params_and_numbers_are_those_of_any_other_order(waiting: LongestFirst, tmp_path: Path) -> None:
    """What is left to the sampler is seeded by the trial's number."""
    other = open_storage(f"sqlite:///{tmp_path / 'other.db'}")
    plain = LongestFirst(
        open_study(other, DEFINITION).study_name,
        other,
        make_sampler(DEFINITION),
        optuna.pruners.NopPruner(),
        DEFINITION,
        30,
    )
    waiting.longest_first = True
    params = []
    for study in (waiting, plain):
        for _ in DEFINITION.enqueue:
            suggest(study.ask(), DEFINITION)
        params.append({t.user_attrs["label"]: (t.number, t.params) for t in study.get_trials(deepcopy=False)})
    close_storage(other)
    assert params[0] == params[1] and len(params[0]) == len(DEFINITION.enqueue)


def test_a_new_trial_once_none_waits(waiting: LongestFirst) -> None:
    waiting.longest_first = True
    taken(waiting)
    assert waiting.ask().number == len(DEFINITION.enqueue)


def test_what_a_definition_leaves_out_is_all_rows(waiting: LongestFirst) -> None:
    waiting._definition = replace(DEFINITION, base={**DEFINITION.base, "max_samples": None})
    assert waiting.steps_left(waiting.get_trials(deepcopy=False)[0]) == 6 * 2


def test_multiples_and_texts_are_resolved(waiting: LongestFirst) -> None:
    space = {"batch_size": Choice(("4", "8")), "gradient_accumulation_steps": Multiple("lora_r", (1, 2))}
    waiting._definition = replace(DEFINITION, space=space, enqueue=())
    waiting.enqueue_trial({"batch_size": "8", "gradient_accumulation_steps/lora_r": 2})
    queued = waiting.get_trials(deepcopy=False)[-1]
    name = param_name("gradient_accumulation_steps", space["gradient_accumulation_steps"])
    queued.system_attrs["fixed_params"] = {"batch_size": "8", name: 2}
    assert waiting.steps_left(queued) == 6 * 1  # 30 rows, 8 times 16 a step


def test_what_cannot_be_run_is_no_obstacle(waiting: LongestFirst) -> None:
    waiting.longest_first = True
    waiting.enqueue_trial({"batch_size": 0}, user_attrs={"label": "wrong"})
    assert taken(waiting)[-1] == "wrong"


@pytest.mark.parametrize("step", ["create", "set_trial_state_values", "set_trial_user_attr"])
def test_a_trial_has_its_worker_from_its_first_moment(
    waiting: LongestFirst, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """Or one whose process is killed within `ask` belongs to nobody, and is waited for until the hosts' limit."""

    class Killed(BaseException):
        pass

    storage = optuna_private.backend(waiting)
    waiting.first_attrs = {records.WORKER: GONE}
    if step == "create":
        taken(waiting)
        lifecycle.requeue_lost(waiting)
        taken(waiting)
    name = "_create_new_trial" if step == "create" else step
    inner = getattr(storage, name)

    def die(*args: Any, **kwargs: Any) -> None:
        inner(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(storage, name, die)
        with pytest.raises(Killed):
            waiting.ask()
    running = waiting.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    assert [t.user_attrs[records.WORKER] for t in running] == [GONE] * len(running)
    lifecycle.requeue_lost(waiting)
    assert lifecycle.unfinished(waiting).running == 0
    assert waiting.ask().user_attrs[records.WORKER] == GONE


def test_repeats_that_an_earlier_search_queued_wait_where_none_are_wanted(waiting: LongestFirst) -> None:
    """A search with `--no-confirm` after one that was stopped at its repeats."""
    taken(waiting)
    for trial in waiting.get_trials(deepcopy=False):
        waiting.tell(trial.number, 1.0)
    repeat = {records.REPEAT_OF: 0, records.BLOCK: 1, records.TRAINS_TO: 2}
    waiting.enqueue_trial({"learning_rate": 1e-4, "batch_size": 4}, user_attrs=repeat)
    done = Budget(len(waiting.trials) - 1)
    waiting.repeats = False
    assert not waiting.has_next(done) and waiting.has_next(replace(done, trials=done.trials + 1))
    assert lifecycle.unfinished(waiting, repeats=False).waiting == 0 and lifecycle.unfinished(waiting).waiting == 1
    assert records.REPEAT_OF not in waiting.ask().user_attrs  # a new one
    waiting.repeats = True
    assert waiting.has_next(done) and waiting.ask().user_attrs[records.REPEAT_OF] == 0
