"""`python -m search.replay --study NAME --trial N`: train a trial again from its record, and compare every loss."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search.errors import StudyError
from search.opening import RunsOption, StorageOption, StudyOption, TrackingOption, opened
from trainer import cli

if TYPE_CHECKING:
    from search.records import TrialRecord
    from search.run_writer import Point, Status
    from search.tracking import Tracking
    from trainer.config import TrainConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

COMPARED = ("train_loss", "val_loss", "grad_norm_mean", "grad_norm_max", "step/loss", "step/grad_norm")
"""Metrics that must be the same to the last bit. Timings are facts of the day, not of the trial."""
FACTS = ("device", "num_threads", "cpu", "gpu", "platform", "python", "data_fingerprint", "model_fingerprint")
"""Tags that can explain a difference, beside the packages' versions."""

Losses = Mapping[tuple[str, int], float]
"""Values by (metric, step or epoch)."""


@dataclass(frozen=True)
class Comparison:
    """What a replay showed."""

    compared: int
    """Values that both have."""
    first: tuple[str, int, float, float] | None
    """(metric, step, recorded, replayed) where they first depart; None if they never do."""
    changed: tuple[str, ...]
    """Facts of the environment that differ."""

    @property
    def identical(self) -> bool:
        """Whether every recorded value came again, to the last bit."""
        return self.first is None and self.compared > 0


class _Memory:
    """A store that keeps the points written to it (search.run_writer.RunStore)."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int], float] = {}
        self.tags: dict[str, str] = {}

    def write(self, run_id: str, points: Iterable[Point], tags: Mapping[str, str]) -> None:
        self.points.update({(p.key, p.step): p.value for p in points})
        self.tags.update(tags)

    def log_text(self, run_id: str, text: str, file: str) -> None:
        """Texts are not compared."""

    def end_run(self, run_id: str, status: Status, tags: Mapping[str, str], description: str) -> None:
        self.tags.update(tags)


@app.command()
def main(
    study: StudyOption,
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial.")],
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = Path("runs"),
    data: Annotated[str | None, typer.Option(help="The data folder, if it lies elsewhere now.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, if it lies elsewhere now.")] = None,
) -> None:
    """Train a trial again and compare every recorded loss; exit code 0 if all are bit-identical, 1 if not."""
    from search import lifecycle
    from trainer.config import TrainConfig

    with opened(study, storage, tracking_uri, runs_dir) as (opened_study, tracking):
        record = _find(lifecycle.read_trials(opened_study), trial, study)
        moved = {key: value for key, value in (("data", data), ("model", model)) if value}
        config = TrainConfig.parse({**record.config, **moved})
        result = replay(record, config, tracking)
    print(describe(trial, result))
    raise typer.Exit(0 if result.identical else 1)


def replay(record: TrialRecord, config: TrainConfig, tracking: Tracking) -> Comparison:
    """Train the configuration as far as the record goes, and compare."""
    import torch

    from search.environment import environment
    from search.recorder import RunRecorder
    from trainer.bench import Workbench
    from trainer.events import EpochEnded
    from trainer.loop import train

    assert record.run_id is not None
    recorded = recorded_losses(tracking, record.run_id)
    tags = tracking.tags(record.run_id)
    torch.set_num_threads(int(tags.get("num_threads", "1")))  # sums are rounded by how they are split
    last_epoch = max((step for key, step in recorded if key == "val_loss"), default=config.num_epochs)
    memory = _Memory()
    recorder = RunRecorder(memory, "replay")
    with tempfile.TemporaryDirectory() as folder:
        for event in train(config, Workbench(), Path(folder)):
            recorder(event)
            if isinstance(event, EpochEnded) and event.epoch >= last_epoch and record.reason != "non_finite":
                break
    recorder.finish("FINISHED", state="COMPLETE")
    now = {**environment(), **memory.tags}
    return compare(recorded, memory.points, changed_facts(tags, now))


def recorded_losses(tracking: Tracking, run_id: str) -> dict[tuple[str, int], float]:
    """The recorded values that a replay must give again."""
    found: dict[tuple[str, int], float] = {}
    for epoch in tracking.epochs(run_id):
        for key in ("train_loss", "val_loss", "grad_norm_mean", "grad_norm_max"):
            value = getattr(epoch, key)
            if value is not None:
                found[(key, epoch.epoch)] = value
    for step in tracking.steps(run_id):
        for key, value in (("step/loss", step.loss), ("step/grad_norm", step.grad_norm)):
            if value is not None:
                found[(key, step.step)] = value
    return found


def compare(recorded: Losses, replayed: Losses, changed: tuple[str, ...]) -> Comparison:
    """Where two records of a run first depart, steps before the epochs they belong to."""
    shared = [key for key in recorded if key in replayed]
    departs = [key for key in recorded if key not in replayed or replayed[key] != recorded[key]]
    if not departs:
        return Comparison(len(shared), None, changed)
    key = min(departs, key=lambda k: (not k[0].startswith("step/"), k[1], COMPARED.index(k[0])))
    return Comparison(len(shared), (*key, recorded[key], replayed.get(key, float("nan"))), changed)


def changed_facts(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Facts that differ, each as `name: then -> now`."""
    names = [*FACTS, *sorted(k for k in {*then, *now} if k.startswith("version."))]
    return tuple(
        f"{name}: {then.get(name, 'not recorded')} -> {now.get(name, 'none')}"
        for name in names
        if then.get(name) != now.get(name)
    )


def describe(number: int, result: Comparison) -> str:
    """The result in words."""
    if result.identical:
        lines = [f"trial {number}: bit-identical, all {result.compared} recorded values"]
    elif result.first is None:
        lines = [f"trial {number}: nothing to compare, its run has no recorded losses"]
    else:
        key, step, then, now = result.first
        what = "step" if key.startswith("step/") else "epoch"
        name = key.removeprefix("step/")
        lines = [f"trial {number}: departs at {what} {step}: {name} was {then!r}, is {now!r}"]
    if result.changed:
        lines += ["what differs in the environment:", *(f"  - {change}" for change in result.changed)]
    elif not result.identical:
        lines.append("nothing recorded of the environment differs")
    return "\n".join(lines)


def _find(trials: Iterable[TrialRecord], number: int, study: str) -> TrialRecord:
    known = {t.number: t for t in trials}
    if number not in known:
        raise StudyError(f"the study {study!r} has no trial {number}; it has 0 to {max(known, default=-1)}")
    record = known[number]
    if record.state not in ("COMPLETE", "PRUNED") or record.run_id is None:
        raise StudyError(f"trial {number} is {record.state}: only a finished trial can be replayed")
    return record


if __name__ == "__main__":
    cli.run(app)
