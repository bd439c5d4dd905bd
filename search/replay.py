"""`python -m search.replay --study NAME --trial N`: train a trial again from its record, and compare every loss."""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from search import records
from search.errors import StudyError
from search.options import RunsOption, StorageOption, StudyOption, TrackingOption, opened
from search.places import RUNS, Places
from trainer.common import cli

if TYPE_CHECKING:
    from search.records import TrialRecord
    from search.tracking.client import Tracking
    from search.tracking.outbox import DataUsed, Model, Point, Status
    from trainer.config import TrainConfig
    from trainer.events import Event

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

COMPARED = ("train_loss", "val_loss", "grad_norm_mean", "grad_norm_max", "step/loss", "step/grad_norm")
"""Metrics that must be the same to the last bit. Timings are facts of the day, not of the trial."""
ENDS = ("nonfinite.step", "nonfinite.tensor", "nonfinite.value", "diverged.step", "out_of_memory.step")
"""Tags that say how a run ended that did not go on to its last epoch: its losses alone may be one or none."""
FACTS = (
    "device",
    "num_threads",
    "micro_batch_size",
    "cpu",
    "gpu",
    "platform",
    "python",
    "git_commit",
    "data_fingerprint",
    "model_fingerprint",
)
"""Tags that can explain a difference, beside the packages' versions."""

PACKED_TOLERANCE = 1e-3
"""Relative difference up to which a trial that trained beside others counts as come again. It is trained again alone,
and a matrix product of another height may be summed in another order: 4e-7 at the end of an epoch of the embedded
model (tests/trainer/test_pack.py shows that nothing else differs), which training can amplify."""

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
    ends: tuple[str, ...] = ()
    """Tags of `ENDS` that came again, as `name=value`."""
    other_ends: tuple[str, ...] = ()
    """Tags of `ENDS` that did not, as `name: then -> now`."""
    largest: tuple[float, str, int] | None = None
    """(relative difference, metric, step) of the value that is furthest off, if a difference is allowed and there."""

    @property
    def identical(self) -> bool:
        """Whether every recorded value came again, as exactly as asked, and the run ended in the same way."""
        return self.first is None and not self.other_ends and (self.compared > 0 or bool(self.ends))


class _Memory:
    """A store that keeps the points written to it (search.tracking.writer.RunStore)."""

    def __init__(self) -> None:
        self.points: dict[tuple[str, int], float] = {}
        self.tags: dict[str, str] = {}

    def write(self, run_id: str, points: Iterable[Point], tags: Mapping[str, str]) -> None:
        self.points.update({(p.key, p.step): p.value for p in points})
        self.tags.update(tags)

    def log_text(self, run_id: str, text: str, file: str) -> None:
        """Texts are not compared."""

    def log_artifact(self, run_id: str, path: Path, folder: str | None = None) -> None:
        """Nor are files."""

    def log_data(self, run_id: str, data: DataUsed) -> None:
        """Nor is the data, but for its fingerprint."""

    def keep_model(self, run_id: str, model: Model) -> None:
        """Nor are models."""

    def end_run(
        self, run_id: str, status: Status, tags: Mapping[str, str], description: str, end_ms: int | None = None
    ) -> None:
        self.tags.update(tags)


@app.command()
def main(
    study: StudyOption,
    trial: Annotated[int, typer.Option(min=0, help="Number of the trial.")],
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = RUNS,
    data: Annotated[str | None, typer.Option(help="The data folder, if it lies elsewhere now.")] = None,
    model: Annotated[str | None, typer.Option(help="The model, if it lies elsewhere now.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Train a trial again and compare every recorded loss; exit code 0 if all came again, 1 if not."""
    from search.storage import lifecycle
    from search.storage.identity import check_folder
    from trainer.config import TrainConfig

    places = Places.of(runs_dir, storage, tracking_uri)
    with opened(study, places) as (opened_study, tracking):
        check_folder(places.study(opened_study.study_name), opened_study)
        record = _find(lifecycle.read_trials(opened_study), trial, study)
        if record.run_id is not None:
            record = replace(record, run_id=tracking.resolve(opened_study.study_name, record.run_id))
        moved = {key: value for key, value in (("data", data), ("model", model)) if value}
        config = TrainConfig.parse({**record.config, **moved})
        result = replay(record, config, tracking)
    if as_json:
        print(json.dumps({"trial": trial, "identical": result.identical, **asdict(result)}, indent=1))
    else:
        print(describe(trial, result))
    raise typer.Exit(0 if result.identical else 1)


def replay(record: TrialRecord, config: TrainConfig, tracking: Tracking) -> Comparison:
    """Train the configuration as far as the record goes, or to where the losses depart, and compare."""
    import torch

    from search.tracking.environment import environment
    from search.tracking.recorder import RunRecorder
    from trainer.loop import train
    from trainer.workbench import Workbench

    assert record.run_id is not None
    recorded = recorded_losses(tracking, record.run_id)
    tags = tracking.tags(record.run_id)
    torch.set_num_threads(int(tags.get("num_threads", "1")))  # sums are rounded by how they are split
    memory = _Memory()
    recorder = RunRecorder(memory, "replay")
    exact = tags.get("step_window", "1") == "1"
    tolerance = PACKED_TOLERANCE if int(tags.get(records.SLOTS, "1")) > 1 else 0.0
    departed = False
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as closing:
        events = train(config, Workbench(), Path(folder))
        closing.callback(events.close)  # type: ignore[attr-defined]  # a generator
        for event in events:
            recorder(event)
            departed = departs(event, recorded, exact=exact, tolerance=tolerance)
            if departed or is_past(event, recorded, tags):
                break
    recorder.finish("FINISHED", state="COMPLETE")
    if departed:  # what comes after it was not trained again
        recorded = {key: value for key, value in recorded.items() if key in memory.points}
    # The run of a trial that went on from another's checkpoint does not have the other's bad steps.
    names = () if departed else ENDS if records.RESUMES not in record.attrs else ENDS[3:]
    now = {**environment(), **memory.tags}
    return compare(recorded, memory.points, changed_facts(tags, now), _pairs(names, tags, now), tolerance)


def difference(one: float, other: float) -> float:
    """Relative difference of two values; 0 for two that are the same to the last bit, inf for what has none."""
    if one == other:
        return 0.0
    size = max(abs(one), abs(other))
    return abs(one - other) / size if math.isfinite(size) else math.inf


def departs(event: Event, recorded: Losses, *, exact: bool, tolerance: float = 0.0) -> bool:
    """Whether an event's values differ from those recorded; `exact` if each step is recorded by itself."""
    from trainer.events import EpochEnded, StepEnded

    values: dict[tuple[str, int], float] = {}
    if isinstance(event, EpochEnded):
        values = {(key, event.epoch): getattr(event, key) for key in COMPARED if not key.startswith("step/")}
    elif isinstance(event, StepEnded) and exact:
        values = {("step/loss", event.step): event.loss, ("step/grad_norm", event.step): event.grad_norm}
    return any(key in recorded and difference(recorded[key], value) > tolerance for key, value in values.items())


def is_past(event: Event, recorded: Losses, tags: Mapping[str, str]) -> bool:
    """Whether the record has nothing after this event."""
    from trainer.events import EpochEnded, StepEnded

    ends = [int(tags[name]) for name in ENDS if name.endswith(".step") and name in tags]
    last_step = max([step for key, step in recorded if key.startswith("step/")] + ends, default=0)
    last_epoch = max((epoch for key, epoch in recorded if not key.startswith("step/")), default=0)
    if isinstance(event, EpochEnded):
        return event.epoch >= last_epoch and event.step >= last_step
    # A run that ended within an epoch ends again by itself; if it does not, it has come too far.
    return isinstance(event, StepEnded) and event.epoch > last_epoch and event.step > last_step


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


def compare(
    recorded: Losses,
    replayed: Losses,
    changed: tuple[str, ...],
    ends: Mapping[str, tuple[str | None, str | None]] | None = None,
    tolerance: float = 0.0,
) -> Comparison:
    """Where two records of a run first depart, steps before the epochs they belong to.

    Args:
        ends: (then, now) of the tags that say how the run ended, None for a tag it does not have.
        tolerance: relative difference up to which two values count as the same.
    """
    shared = [key for key in recorded if key in replayed]
    off = {key: difference(recorded[key], replayed[key]) for key in shared}
    differing = [key for key in recorded if key not in replayed or off[key] > tolerance]
    furthest = max(off, key=lambda key: off[key], default=None)
    first = None
    if differing:
        key = min(differing, key=lambda k: (not k[0].startswith("step/"), k[1], COMPARED.index(k[0])))
        first = (*key, recorded[key], replayed.get(key, float("nan")))
    known = {name: pair for name, pair in (ends or {}).items() if pair != (None, None)}
    return Comparison(
        compared=len(shared),
        first=first,
        changed=changed,
        ends=tuple(f"{name}={then}" for name, (then, now) in known.items() if then == now),
        other_ends=tuple(
            f"{name}: {then or 'none'} -> {now or 'none'}" for name, (then, now) in known.items() if then != now
        ),
        largest=(off[furthest], *furthest) if furthest is not None and 0 < off[furthest] <= tolerance else None,
    )


def changed_facts(then: Mapping[str, str], now: Mapping[str, str]) -> tuple[str, ...]:
    """Facts that differ, each as `name: then -> now`."""
    names = [*FACTS, *sorted(k for k in {*then, *now} if k.startswith("version."))]
    return tuple(
        f"{name}: {before or 'not recorded'} -> {after or 'none'}"
        for name, (before, after) in _pairs(names, then, now).items()
        if before != after
    )


def _pairs(
    names: Iterable[str], then: Mapping[str, str], now: Mapping[str, str]
) -> dict[str, tuple[str | None, str | None]]:
    """(then, now) of each of these tags."""
    return {name: (then.get(name), now.get(name)) for name in names}


def describe(number: int, result: Comparison) -> str:
    """The result in words."""
    if result.identical and result.largest is not None:
        size, key, step = result.largest
        where = f"{key.removeprefix('step/')} at {'step' if key.startswith('step/') else 'epoch'} {step}"
        lines = [
            f"trial {number}: the same, all {result.compared} recorded values to a relative difference of {size:.1e} "
            f"({where}); it trained beside others, and alone its sums have another order"
        ]
        lines += [f"it ended as it did: {', '.join(result.ends)}"] if result.ends else []
    elif result.identical:
        lines = [f"trial {number}: bit-identical, all {result.compared} recorded values"]
        lines += [f"it ended as it did: {', '.join(result.ends)}"] if result.ends else []
    elif result.first is not None:
        key, step, then, now = result.first
        what = "step" if key.startswith("step/") else "epoch"
        name = key.removeprefix("step/")
        lines = [f"trial {number}: departs at {what} {step}: {name} was {then!r}, is {now!r}"]
    elif result.other_ends:
        lines = [f"trial {number}: ended otherwise, after {result.compared} values that are bit-identical"]
    else:
        lines = [f"trial {number}: nothing to compare, its run has no recorded losses"]
    lines += [f"  - {other}" for other in result.other_ends]
    for what in ("model", "data"):
        if any(change.startswith(f"{what}_fingerprint: ") for change in result.changed):
            lines.append(f"the {what} is not the one that the trial was trained with: its fingerprint differs")
    if result.changed:
        lines += ["what differs in the environment:", *(f"  - {change}" for change in result.changed)]
    elif not result.identical:
        lines.append("nothing recorded of the environment differs")
    return "\n".join(lines)


def _find(trials: Iterable[TrialRecord], number: int, study: str) -> TrialRecord:
    known = {t.number: t for t in trials}
    if number not in known:
        has = f"it has {min(known)} to {max(known)}" if known else "it has none yet"
        raise StudyError(f"the study {study!r} has no trial {number}; {has}")
    record = known[number]
    if record.state not in ("COMPLETE", "PRUNED") or record.run_id is None:
        raise StudyError(f"trial {number} is {record.state}: only a finished trial can be replayed")
    return record


if __name__ == "__main__":
    cli.run(app)
