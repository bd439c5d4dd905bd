"""What is read back about a study: plain values, put together from Optuna's storage and MLflow.

Leaderboard, tuning log and plots are functions of these and of nothing else.
Optuna's storage is the truth about trials (state, value, params, reason); MLflow has the curves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from trainer.events import EpochEnded

# User attributes of an Optuna trial.
CONFIG = "config"
"""The resolved TrainConfig as plain data."""
RUN_ID = "run_id"
"""The trial's MLflow run."""
REASON = "reason"
"""Why it ended, one of `Reason`'s values below."""
DETAIL = "detail"
"""The reason in words with the values that show it."""
BEST_EPOCH = "best_epoch"
TRAIN_LOSSES = "train_losses"
"""Training loss by epoch, a list: divergence is judged on both curves."""
STOPPED_EARLY = "stopped_early"
FINDINGS = "findings"
"""The diagnosis' findings as plain data."""
LABEL = "label"
"""Name of a trial given by hand."""
NOTE = "note"
"""What the study file says of a trial given by hand."""
OVERRIDES = "overrides"
"""Fields of a trial given by hand that lie outside the search space."""
STAGE = "stage"
"""Stage that the trial belongs to, in a study that an older version ran with `--strategy staged`."""
RETIRED_STRATEGIES = ("staged",)
"""Values of `--strategy` that older versions had: such a study is reported, and not gone on with."""
SLOTS = "slots"
"""User attribute and MLflow tag: how many trials its worker trains at once on one base."""
RESUMES = "resumes"
"""Number of the trial whose checkpoint this one continues."""
ATTEMPT = "attempt"
"""How often a worker has died, without a new epoch since, by what this work may be to blame for; 0 for a first run."""
MAX_RETRIES = 2
"""Largest attempt: work that its worker died of once more without a new epoch is given up."""
BLAMED = "blamed"
"""Whether a lost trial may itself be why its worker died; False where more than the worker died, or none saw it."""
WORKER = "worker"
"""Host, process id and start time of the process that runs the trial."""

FOLDER = "folder"
"""The trial's folder below the study's; one that resumes another's work shares it, and no other trial has it."""

PAUSED_AT = "paused_at"
"""Epoch after which the plan last paused the trial."""
GIVEN_UP = "given_up"
"""Why a paused trial does not go on any more: set just before it ends."""

REPEAT_OF = "repeat_of"
"""User attribute and MLflow tag: number of the trial that this one repeats with another seed and split. Repeats are no
configurations of the search: its samplers, pruners and totals do not see them."""
BLOCK = "block"
"""Of a repeat, from 1: repeats of the same block have the same seed and split. Also an MLflow tag."""
TRAINS_TO = "trains_to"
"""Of a repeat: the best epoch of the trial that it repeats, after which it ends. Its loss there is its value."""
CONFIRM = "confirm"
"""Study attribute: how its leaders are repeated, as `search.verdict.leaders.Rules` has it; none if they are not."""

CIDER = "cider_d"
"""User attribute of a COMPLETE trial of a study whose objective is "cider": CIDEr-D of its best checkpoint's captions
of all validation images. Optuna is told its negative; all other values of the trial are of its losses."""
VAL_CIDER = "val_cider_d"
"""The same as metric of the trial's MLflow run."""

EPOCHS = "epochs"
"""Study attribute: the budget of `--epochs`, of the latest start; None or missing where trials are counted."""
SETTINGS = "settings"
"""Study attribute: the `--set` settings as given."""
PRUNER = "pruner"
"""Study attribute: the pruner that its trials are stopped by, where it is not the one that goes with the strategy."""
GIVEN_STUDY = "study_file"
"""Study attribute: what `--study` was given, where that is not the study's own name: commands that go on with it need
the same."""
STOP_RULE = "stop_rule"
"""User attribute of study and trial: `Study.stop_rule()`, which ends trials early; MLflow has it as tags. In
records of older versions it is part of the configuration."""

STUDY_ID = "study_id"
"""The study's own id: its user attribute, tag of its MLflow experiment and parent run, entry of `STUDY_FILE`."""
STUDY_FILE = "study.json"
"""In the study's folder: whose files are there."""

# Reasons for a trial's end.
FINISHED = "finished"
RISING = "rising"
DIVERGED = "diverged"
NON_FINITE = "non_finite"
OUT_OF_MEMORY = "out_of_memory"
SUPERSEDED = "pruner"
"""Stopped by a pruner that compares with other trials (successive halving and the like)."""
SETTLED = "settled"
"""The best of its study, ended by a plan since more epochs were not expected to lower it."""
PROBE = "probe"
"""A short probe of stability, which older versions stopped because it showed what it was for."""
REPEAT = "repeat"
"""A repeat that came to its loss. It ends as PRUNED, so that Optuna's best trial is one of the search."""
INTERRUPTED = "interrupted"
PAUSED = "paused"
"""Waits with its checkpoint because other trials are worth more; it goes on if they turn out not to be."""
LOST = "lost"
ERROR = "error"
SAVING = (RISING, DIVERGED, SUPERSEDED, SETTLED)
"""Ends on purpose, before the last epoch, of which the epochs left were saved."""
COMPARED = (SUPERSEDED, SETTLED, PAUSED, PROBE, REPEAT)
"""Ends that a comparison or a purpose decided: to let such a trial run on is no advice."""
SAMPLE_FIELDS = ("max_samples", "val_fraction", "split_seed", "split", "max_target_length", "skip_bad_rows")
"""Trials that differ in one of these are validated on different samples: their losses cannot be compared. So are those
on other data, see `leaderboard.sample_key`."""


_NUMBERS = (int, float)
_FORMS: dict[str, Callable[[Any, int], bool]] = {
    CONFIG: lambda value, number: isinstance(value, dict),
    RUN_ID: lambda value, number: isinstance(value, str),
    REASON: lambda value, number: isinstance(value, str),
    DETAIL: lambda value, number: isinstance(value, str),
    BEST_EPOCH: lambda value, number: type(value) is int and value > 0,
    TRAIN_LOSSES: lambda value, number: (
        isinstance(value, list) and all(loss is None or type(loss) in _NUMBERS for loss in value)
    ),
    FINDINGS: lambda value, number: (
        isinstance(value, list) and all(isinstance(f, dict) and isinstance(f.get("id"), str) for f in value)
    ),
    LABEL: lambda value, number: isinstance(value, str),
    NOTE: lambda value, number: isinstance(value, str),
    OVERRIDES: lambda value, number: isinstance(value, dict),
    STAGE: lambda value, number: isinstance(value, str),
    SLOTS: lambda value, number: type(value) is int,
    # Only an earlier trial can be resumed: a chain of them comes to its end.
    RESUMES: lambda value, number: type(value) is int and 0 <= value < number,
    ATTEMPT: lambda value, number: type(value) is int,
    WORKER: lambda value, number: isinstance(value, dict) and {"host", "pid"} <= value.keys(),
    FOLDER: lambda value, number: isinstance(value, str),
    STOP_RULE: lambda value, number: isinstance(value, dict),
    PAUSED_AT: lambda value, number: type(value) is int,
    GIVEN_UP: lambda value, number: isinstance(value, str),
    REPEAT_OF: lambda value, number: type(value) is int and 0 <= value < number,
    BLOCK: lambda value, number: type(value) is int and value > 0,
    TRAINS_TO: lambda value, number: type(value) is int and value > 0,
    CIDER: lambda value, number: type(value) in _NUMBERS and math.isfinite(value),
}
"""Of each user attribute of a trial, whether a value has the form in which this program writes it, by trial number."""
_OF_A_REPEAT = (REPEAT_OF, BLOCK, TRAINS_TO)
"""A repeat has all of these, and no other trial has one of them."""


def foreign(attrs: Mapping[str, Any], number: int) -> list[str]:
    """Attributes of a trial that have our names, but were written by another program in another form."""
    found = [key for key, fits in _FORMS.items() if attrs.get(key) is not None and not fits(attrs[key], number)]
    if any(attrs.get(key) is None or key in found for key in _OF_A_REPEAT):
        found += [key for key in _OF_A_REPEAT if key in attrs and key not in found]
    return found


def _column(en: str, zh: str, spec: str) -> dict[str, Any]:
    """Metadata of a metric that is a column of the tuning log's table of epochs.

    Args:
        en: The column's heading in English.
        zh: The same in Chinese.
        spec: How its values are formatted, such as `.4f`.
    """
    return {"heading": {"en": en, "zh": zh}, "format": spec}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. `state` is Optuna's, or WAITING for a trial that is resumed later."""

    state: str
    reason: str
    detail: str
    violated: str | None = None
    """The constraint it violated: TPE sees it, and keeps away (a FAIL would be invisible to it)."""
    stopped_early: bool = False


def folder_of(first: int, place: int = 1) -> str:
    """`FOLDER` of a trial, by the number of the first trial whose work it continues.

    Args:
        first: The number.
        place: Among the trials that have had it, from 1: a number is given again once its trial's row was deleted.
    """
    return f"trials/{first:04d}" + (f"-{place}" if place > 1 else "")


def place_of(attrs: Mapping[str, Any], first: int) -> int | None:
    """The `place` of a trial's folder; None if it has none, or it is not one of that number."""
    name = attrs.get(FOLDER)
    if name is None or name == folder_of(first):
        return None if name is None else 1
    place = str(name).removeprefix(f"{folder_of(first)}-")
    return int(place) if place.isdecimal() and name == folder_of(first, int(place)) else None


def finite(value: float | None) -> TypeGuard[float]:
    """Whether there is a number: neither missing nor NaN nor infinite."""
    return value is not None and math.isfinite(value)


def score_of(attrs: Mapping[str, Any]) -> float | None:
    """CIDEr-D of a trial, by its user attributes; None where its study does not rank by it."""
    found = attrs.get(CIDER)
    return None if found is None else float(found)


def lowest(losses: Mapping[int, float | None]) -> tuple[float, int] | None:
    """(loss, epoch) of the lowest finite loss by epoch, the first of equals; None if none is finite."""
    return min(((loss, epoch) for epoch, loss in losses.items() if finite(loss)), default=None)


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """One epoch's metrics: a field is MLflow's metric of this name.

    None where nothing is recorded. Of a run in progress (`epoch_record`) a value may be NaN or infinite; MLflow gets
    finite ones only, so that a record that is read back has None there.

    A metric is added by a field here, its value in `epoch_record`, and what measures it in `trainer.events` and
    `trainer.member`. Fields with metadata (see `_column`) are columns of the tuning log's table of epochs.
    """

    epoch: int
    train_loss: float | None = field(default=None, metadata=_column("training loss", "训练 loss", ".4f"))
    val_loss: float | None = field(default=None, metadata=_column("validation loss", "验证 loss", ".4f"))
    learning_rate: float | None = None
    grad_norm_mean: float | None = None
    grad_norm_max: float | None = None
    epoch_seconds: float | None = None
    eval_seconds: float | None = None
    samples_per_second: float | None = None
    data_wait_fraction: float | None = None
    """Share of the training time spent waiting for data."""
    peak_memory_gib: float | None = None


def epoch_record(event: EpochEnded) -> EpochRecord:
    """The metrics of an epoch that has just ended; some may not be finite."""
    timing = event.timing
    return EpochRecord(
        epoch=event.epoch,
        train_loss=event.train_loss,
        val_loss=event.val_loss,
        learning_rate=event.learning_rate,
        grad_norm_mean=event.grad_norm_mean,
        grad_norm_max=event.grad_norm_max,
        epoch_seconds=timing.epoch_s,
        eval_seconds=timing.eval_s,
        samples_per_second=timing.samples_per_s,
        data_wait_fraction=timing.data_wait_s / timing.train_s if timing.train_s > 0 else 0.0,
        peak_memory_gib=timing.peak_memory_gib,
    )


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step's metrics as MLflow has them; in long runs, of the window of steps that ends here."""

    step: int
    loss: float | None = None
    """Mean over the window."""
    grad_norm: float | None = None
    """Mean over the window."""
    grad_norm_max: float | None = None
    """Highest in the window; only in runs longer than MLflow's charts draw whole."""
    learning_rate: float | None = None
    """At the end of the window."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """One trial, read back."""

    number: int
    state: str
    """Optuna's: RUNNING, COMPLETE, PRUNED, FAIL, WAITING."""
    value: float | None
    """Lowest validation loss, for COMPLETE and PRUNED trials that had one."""
    params: dict[str, Any]
    config: dict[str, Any]
    reason: str | None
    detail: str | None
    best_epoch: int | None
    stopped_early: bool
    attrs: dict[str, Any]
    """All user attributes."""
    violated: tuple[str, ...]
    """Names of violated constraints."""
    start_s: float | None
    """Seconds since the epoch (UTC); None if it never started."""
    end_s: float | None
    run_id: str | None
    epochs: tuple[EpochRecord, ...] = ()
    steps: tuple[StepRecord, ...] = ()
    tags: dict[str, str] = field(default_factory=dict)
    """MLflow's tags of the run."""


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """One study, read back."""

    name: str
    definition: dict[str, Any]
    attrs: dict[str, Any]
    trials: tuple[TrialRecord, ...]
    experiment_id: str | None
    parent_run_id: str | None
    tracking_url: str | None = None
    """Address of the MLflow server whose pages show the runs, without credentials; None for a database."""
    away: bool = False
    """MLflow did not answer: there is only what Optuna has and what was not yet delivered to MLflow."""
