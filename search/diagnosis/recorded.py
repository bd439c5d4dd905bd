"""Recorded runs: a JSON file of losses by epoch, checked, and the curves that the diagnosis reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from search.diagnosis.curve import Curve
from search.records import EpochRecord
from trainer.common.errors import UserError, shown

FEWEST_PEERS = 3
"""Fewest other runs of the same model for one to be called slow against them: a median of fewer is an extreme."""
MOST_PROBLEMS = 20
"""Most problems of a file that are listed; a wrong kind of file has thousands."""
MOST = 10**18
"""Largest whole number in a configuration; one beyond the range of floats cannot be calculated with."""


class RecordedEpoch(BaseModel):
    """One epoch. Other keys are allowed and ignored: people record more than is needed here."""

    model_config = ConfigDict(strict=True, extra="ignore")

    epoch: Annotated[int, Field(ge=1)]
    train_loss: float | None = None
    """null if it was not recorded; NaN and Infinity mean just that."""
    val_loss: float | None = None
    learning_rate: float | None = None
    elapsed_s: Annotated[float, Field(ge=0)] | None = None
    grad_norm_mean: float | None = None
    grad_norm_max: float | None = None


class RecordedRun(BaseModel):
    """One run: its name, its configuration as far as known (TrainConfig's names), its epochs in order."""

    model_config = ConfigDict(strict=True, extra="ignore")

    name: Annotated[str, Field(min_length=1)]
    config: dict[str, Any] = {}
    epochs: list[RecordedEpoch]

    @field_validator("config")
    @classmethod
    def _calculable(cls, config: dict[str, Any]) -> dict[str, Any]:
        for name, value in config.items():
            if isinstance(value, int) and abs(value) > MOST:
                raise ValueError(f"{shown(name)} is {shown(value)}; give a number up to {MOST:.0e}")
        return config

    @model_validator(mode="after")
    def _in_order(self) -> RecordedRun:
        numbers = [record.epoch for record in self.epochs]
        if any(later <= earlier for earlier, later in pairwise(numbers)):
            raise ValueError(f"the epochs must be in rising order, each once, but are {shown(numbers)}")
        return self


class RecordedRuns(BaseModel):
    """The file."""

    model_config = ConfigDict(strict=True, extra="ignore")

    runs: list[RecordedRun]


def read_runs(path: Path) -> RecordedRuns:
    """The recorded runs of a file.

    Raises:
        UserError: the file cannot be read, is not JSON or has another form; one message lists everything that is
        wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{shown(str(path))}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    try:
        return RecordedRuns.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors()
        lines = [_problem(problem, text) for problem in problems[:MOST_PROBLEMS]]
        if len(problems) > MOST_PROBLEMS:
            lines.append(f"and {len(problems) - MOST_PROBLEMS} more")
        count = "one error" if len(problems) == 1 else f"{len(problems)} errors"
        raise UserError("\n".join([f"{path}: has {count}:", *(f"  - {line}" for line in lines)])) from None


def _problem(problem: Any, text: str) -> str:
    """One line about a problem: the run by name and number, the field, the rule and the value."""
    where = [str(part) for part in problem["loc"]]
    if len(where) > 1 and where[0] == "runs":
        place = f"run {int(where[1]) + 1}{_name(text, int(where[1]))}"
        where = where[2:]
    else:
        place = "the file"
    if len(where) > 1 and where[0] == "epochs":
        place += f", entry {int(where[1]) + 1} of epochs"
        where = where[2:]
    field = f", {'.'.join(where)}" if where else ""
    message = problem["msg"].removeprefix("Value error, ")
    given = problem["input"]
    but = "" if problem["type"] in ("missing", "value_error", "json_invalid") else f", but got {shown(given)}"
    return f"{place}{field}: {message[0].lower()}{message[1:]}{but}"


def _name(text: str, index: int) -> str:
    """` 'name'` of the run, read leniently: the run is not valid."""
    run = json.loads(text)["runs"][index]
    name = run.get("name") if isinstance(run, dict) else None
    return f" ({shown(name)})" if isinstance(name, str) else ""


def curves(recorded: RecordedRuns) -> list[tuple[str, Curve]]:
    """(name, curve) of every run; runs of the same model are compared with each other for speed."""
    found = []
    for index, run in enumerate(recorded.runs):
        model = run.config.get("model_name")
        others = [
            _seconds_per_sample(r)
            for i, r in enumerate(recorded.runs)
            if i != index and r.config.get("model_name") == model
        ]
        known = [value for value in others if value is not None]
        peers = median(known) if model is not None and len(known) >= FEWEST_PEERS else None
        found.append((run.name, Curve(config=run.config, epochs=_records(run.epochs), peer_seconds_per_sample=peers)))
    return found


def _records(epochs: Sequence[RecordedEpoch]) -> tuple[EpochRecord, ...]:
    return tuple(
        EpochRecord(
            epoch=e.epoch,
            train_loss=e.train_loss,
            val_loss=e.val_loss,
            learning_rate=e.learning_rate,
            grad_norm_mean=e.grad_norm_mean,
            grad_norm_max=e.grad_norm_max,
            epoch_seconds=e.elapsed_s,
        )
        for e in epochs
    )


def _seconds_per_sample(run: RecordedRun) -> float | None:
    """Median seconds of an epoch for each training or validation sample."""
    samples = run.config.get("max_samples")
    seconds = [e.elapsed_s for e in run.epochs if e.elapsed_s is not None]
    if isinstance(samples, bool) or not isinstance(samples, int | float) or samples <= 0 or not seconds:
        return None
    return median(seconds) / samples
