"""The first steps of runs in one pack, as `tests.support.library_run` gives those of the libraries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.support.library_run import Ran
from trainer.common.errors import UserError
from trainer.config import TrainConfig
from trainer.events import StepEnded
from trainer.loop import ForwardPass, Pack
from trainer.member import Member
from trainer.model.base import forward
from trainer.workbench import Workbench


def first_steps(
    bench: Workbench, configs: Sequence[TrainConfig], steps: int, out: Path, *, forward: ForwardPass = forward
) -> list[Ran]:
    """The first steps of each run, all in one pass."""
    with Pack(bench, forward=forward) as pack:
        pack.window = 1  # weights are looked at right after the last step
        members = [pack.add(config, out / str(i)) for i, config in enumerate(configs)]
        found: dict[Member, list[StepEnded]] = {member: [] for member in members}
        while any(len(found[member]) < steps for member in members):
            for member, event in pack.round():
                if isinstance(event, UserError | OSError):
                    raise event
                if isinstance(event, StepEnded):
                    found[member].append(event)
        return [
            Ran(
                [event.loss for event in found[member]],
                [event.grad_norm for event in found[member]],
                {name: each.weight.clone() for name, each in member.adapter.named().items()},
            )
            for member in members
        ]


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest relative difference."""
    return max(abs(a - b) / max(abs(b), 1e-30) for a, b in zip(one, other, strict=True))


def distance(one: Ran, other: Ran) -> float:
    """Of the adapters: the norm of their difference over the norm of the other."""
    difference = sum(float((one.weights[k] - w).double().square().sum()) for k, w in other.weights.items())
    return float((difference / sum(float(w.double().square().sum()) for w in other.weights.values())) ** 0.5)
