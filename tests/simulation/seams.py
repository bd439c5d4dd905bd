"""Where the simulated world takes the place of what the product asks outside: clocks, commits, processes, disks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from search import processes, pruning
from search.planning.rungs import RungPlan
from search.storage import database, lifecycle, retry
from search.storage.retry import RetryingStorage
from search.study import Study
from search.workers import repeats, trial, worker
from tests.simulation import tracking
from tests.simulation.workers import EPOCHS, Pack
from tests.simulation.world import Process, load
from tests.support.made_up_events import epoch

if TYPE_CHECKING:
    from tests.simulation.schedule import Simulation


@contextmanager
def seams(simulation: Simulation) -> Iterator[None]:
    """Put the world in place of what the product asks outside.

    Args:
        simulation: Whose world it is.
    """
    world, commit = simulation.world, Session.commit

    def mine() -> Process:
        assert world.current is not None
        return world.current

    def silences(_study: optuna.Study, trials: Sequence[FrozenTrial]) -> dict[int, float]:
        return {
            t.number: world.now - world.beats.setdefault(t._trial_id, world.now)  # the first look is its start
            for t in trials
            if t.state == TrialState.RUNNING
        }

    def history(_config: Any, folder: Path, _owner: Any) -> list[Any]:
        kept = load(world, folder)
        return [epoch(n, val_loss=loss) for n, loss in enumerate(kept.losses if kept else (), start=1)]

    def pausing(_study: Study, _prior: Any, _proposes: bool) -> RungPlan:
        return RungPlan(EPOCHS, first=1, one_of=2)

    def boot() -> str:
        return f"{mine().host.name}-{mine().host.namespace}-{mine().host.boot}"

    requeue_lost = lifecycle.requeue_lost

    def requeued(*arguments: Any, **named: Any) -> tuple[lifecycle.Lost, ...]:
        gone = requeue_lost(*arguments, **named)
        simulation.note_losses(gone)
        return gone

    kind = pruning.Kind("simulated", rising=False, plan=pausing if simulation.pauses else None)
    clock = SimpleNamespace(monotonic=lambda: world.now, sleep=world.sleep)
    patches: list[tuple[Any, str, Any]] = [
        (Session, "commit", lambda session: world.commit(session, commit)),
        (database, "locked", world.lock),
        (retry, "time", clock),
        (retry, "random", world.chance),
        (lifecycle, "_silences", silences),
        (lifecycle, "requeue_lost", requeued),
        *tracking.patches(world, simulation.network, simulation.record),
        (RetryingStorage, "record_heartbeat", lambda _, number: world.beats.update({number: world.now})),
        (processes, "_namespace", lambda: mine().host.namespace),
        (processes, "_boot", boot),
        (processes, "_since_boot", lambda pid: f"{boot()}:{pid}"),
        (processes, "is_running", lambda pid: world.lives(mine().host, pid)),
        (processes.socket, "gethostname", lambda: mine().host.name),
        (worker, "this_process", lambda: simulation.record(mine())),
        (worker, "Pack", Pack),
        (worker, "Workbench", lambda *_: mine().bench),  # type: ignore[attr-defined]
        (worker, "Captioning", lambda *_: None),
        (repeats.Repeats, "_splits_anew", lambda *_: True),
        (worker, "resolve_targets", lambda *_: None),
        (worker, "beating", _no_thread),
        (trial, "history_of", history),
        (trial.notes, "annotate_trial", lambda *_, **__: None),
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(mock.patch.dict(pruning.PRUNERS, {"simulated": kind}))
        yield


@contextmanager
def _no_thread(*_: Any) -> Iterator[None]:
    """Heartbeats are the world's."""
    yield
