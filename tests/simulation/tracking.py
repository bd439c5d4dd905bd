"""What a simulated search does for MLflow, by the product's own code, and what MLflow must have at the end.

A supervisor begins, looks and closes as `search.session` does: `Search` calls its parts. In place of the client is
`run_store.Client`, in place of threads are tasks; the outbox is in real files, whose writes are cut off by kills.
"""

from __future__ import annotations

import os
import random
from contextlib import suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from optuna.trial import FrozenTrial, TrialState

from search import processes, records
from search.errors import Unavailable
from search.session import closing
from search.session.left import Left, nobody_writes
from search.storage import lifecycle
from search.storage.identity import Watch
from search.tracking import client, delivery, outbox, recorder, runs, writer
from search.tracking.client import as_text
from search.tracking.delivery import Delivery, DeliveryThread
from search.tracking.mlflow_private import PARENT_RUN
from search.tracking.recorder import run_status
from search.tracking.runs import StudyRuns
from search.tracking.writer import Writer
from tests.simulation.run_store import URI, Client, Network
from tests.simulation.threads import in_place_of_threads, threading_of
from tests.simulation.world import Killed, Process, load, whole
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Iterable

    from search.planning.budget import Budget
    from search.storage.lifecycle import Unfinished
    from tests.simulation.schedule import Simulation


class Search:
    """A supervisor's part in MLflow. Begun, asked and closed by what acts as its process.

    Args:
        simulation: Whose study it is.
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.study, self.folder = simulation.study, simulation.folder
        self.runs = StudyRuns(simulation.places, simulation.name, simulation.study_id)
        self.delivery = Delivery(self.runs.outbox, simulation.name, self.runs.connect)

    def begin(self, budget: Budget) -> None:
        """As a session opens, with the budget of the search. It can be killed in it, its lock held: it is known by
        then, so that it can `forget`."""
        simulation, places = self._simulation, self._simulation.places
        with suppress(Unavailable):
            self.delivery.once()
        away = self.runs.start_study({"what": "simulated"}, {"strategy": "joint"})
        opened = SimpleNamespace(study=self.study, rules=simulation.rules, budget=budget)
        pool, display = SimpleNamespace(alive=simulation.is_alive), SimpleNamespace(say=lambda _: None)
        self._left = Left(opened, self.runs, pool, display)  # type: ignore[arg-type]
        self._courier = DeliveryThread(self.delivery, URI, display.say)
        self.watch = Watch(self.study, places)
        self.runs.close_dangling(nobody_writes(lambda: lifecycle.read_trials(self.study)))
        self._courier.start(away)

    def look(self, blamed: Iterable[int]) -> Unfinished:
        """Take up what dead workers left."""
        return self._left(frozenset(blamed))

    def close(self) -> None:
        """As a search that has done all ends."""
        keeper: Any = SimpleNamespace(is_alive=lambda: False, trials=())
        closing.close(0, self.study, self.folder, self.watch, self.runs, self._courier, keeper)

    def forget(self) -> None:
        """Its process is dead: the kernel gives up its locks."""
        self.delivery.close()


def patches(world: Any, network: Network, record: Any) -> list[tuple[Any, str, Any]]:
    """What is put in place of the client, of threads, clocks and writes to the disk.

    Args:
        world: The world.
        network: Between clients and the server.
        record: A process as `processes.record` has it.
    """

    def mine() -> Process:
        assert world.current is not None
        return world.current

    def tags() -> dict[str, str]:
        told = record(mine())
        of = {processes.STARTED_TAG: told["since_boot"], processes.NAMESPACE_TAG: told["pid_namespace"]}
        return {"host": told["host"], "pid": str(told["pid"])} | {k: f"{told['pid']}@{v}" for k, v in of.items()}

    clock = SimpleNamespace(
        monotonic=lambda: world.now,
        time=world.today,
        time_ns=lambda: round(1e9 * world.today()),
        thread_time=lambda: 0.0,
        sleep=world.sleep,
    )
    facts = {"python": "3", "platform": "simulated"}
    return [
        (client, "MlflowClient", lambda **_: Client(network)),
        *((module, "time", clock) for module in (client, delivery, outbox, recorder, runs, writer)),
        *((module, "threading", threading_of(world)) for module in (delivery, writer)),
        *in_place_of_threads(world, Writer, DeliveryThread),
        (outbox, "secrets", SimpleNamespace(token_hex=lambda n: f"{network.chance.getrandbits(8 * n):0{2 * n}x}")),
        (outbox, "os", Disk(world, network)),
        (processes, "tags", tags),
        *((module, "run_tags", lambda: {**tags(), **facts}) for module in (client, runs)),
    ]


class Disk:
    """In place of `os` for the outbox: a process that is killed as it writes leaves half a line."""

    def __init__(self, world: Any, network: Network) -> None:
        self._world, self._network = world, network

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, *arguments: Any) -> int:
        """Not by a process that is dead."""
        self._check()
        return os.open(*arguments)

    def write(self, file: int, data: memoryview) -> int:
        """All of it, or half."""
        self._check()
        if self._network.dies():
            os.write(file, data[: len(data) // 2])
            raise Killed
        return os.write(file, data)

    def fsync(self, file: int) -> None:
        """Files are as old as the world's clock says: by that the outbox orders them."""
        self._check()
        os.utime(file, ns=(0, round(1e9 * self._world.today())))

    def _check(self) -> None:
        if self._world.current is not None:
            self._world.current.check()


def problems(simulation: Simulation, trials: list[FrozenTrial]) -> list[str]:
    """What is wrong with what MLflow has, once all is delivered."""
    found: list[str] = []
    server, spool = simulation.network.server, simulation.places.outbox(simulation.name)
    left = sorted(path.name for path in spool.glob("*") if path.name != ".lock")
    if left:
        found.append(f"the outbox still has {left}")
    active = [run for run in server.all.values() if run.info.lifecycle_stage == "active"]
    parents = [run for run in active if run.data.tags["kind"] == "study"]
    if len(parents) != 1 or parents[0].info.status != "FINISHED":
        found.append(f"the study's runs are {[run.info.status for run in parents]}")
    if len(server.experiments) != 1:
        found.append(f"{len(server.experiments)} experiments")
    of: dict[int, list[Any]] = {}
    for run in active:
        if run.data.tags["kind"] == "trial":
            of.setdefault(int(run.data.tags["trial"]), []).append(run)
    found += [f"MLflow has a trial {number}" for number in of.keys() - {t.number for t in trials}]
    for trial in trials:
        its = of.get(trial.number, [])
        begun = trial.state != TrialState.FAIL or records.RUN_ID in trial.user_attrs
        if len(its) > 1 or (begun and not its):  # one that was lost as it began may have none
            found.append(f"trial {trial.number} has {len(its)} MLflow runs")
        elif its:
            found += [f"trial {trial.number}: {what}" for what in _run(simulation, its[0], trial, parents)]
    return found


def _run(simulation: Simulation, run: Any, trial: FrozenTrial, parents: list[Any]) -> list[str]:
    """What is wrong with a trial's run."""
    found = []
    state, reason = trial.state.name, trial.user_attrs.get(records.REASON)
    tags, status = run.data.tags, run.info.status
    if status != run_status(state, reason) or tags.get("state") != state or run.info.end_time is None:
        found.append(f"{state} ({reason}), and its MLflow run is {status}, {tags.get('state')} ({tags.get('reason')})")
    if [tags[PARENT_RUN]] != [parent.info.run_id for parent in parents]:
        found.append("its MLflow run hangs on another parent run")
    config = trial.user_attrs[records.CONFIG]
    told = {key: as_text(value) for key, value in TrainConfig.model_validate(config).model_dump().items()}
    # One that was killed before it wrote down which run it had begun may not have told its params.
    if run.data.params != told and (records.RUN_ID in trial.user_attrs or run.data.params):
        found.append(f"MLflow lacks params {sorted(told.items() - run.data.params.items())}")
    reported = sorted(trial.intermediate_values.items())
    # One that is given up as it is taken up is not trained again, even where its last checkpoint was damaged: then
    # MLflow has that epoch in the run of the trial that trained it.
    folder = simulation.folder / trial.user_attrs[records.FOLDER] if records.FOLDER in trial.user_attrs else None
    kept = load(simulation.world, folder) if folder is not None else None
    remembered = len(kept.losses) if kept else 0
    known = min(len(reported), remembered) if records.GIVEN_UP in trial.user_attrs else len(reported)
    for key in ("val_loss", "train_loss", "epoch_seconds"):
        points = sorted((point.step, point.value) for point in run.history.get(key, ()))
        if len({step for step, _ in points}) != len(points):
            found.append(f"MLflow has an epoch of {key} twice: {points}")
        # What a process had not sent as it was killed its successor's run has; and it may have sent what it had not
        # reported yet.
        expected = list(enumerate(whole(config, len(points)), start=1))
        if trial.state != TrialState.FAIL and not known <= len(points) <= len(reported):
            found.append(f"MLflow has {len(points)} epochs of {key}, the database {len(reported)}")
        elif key == "val_loss" and (points != expected or len(points) > len(reported) + 1):
            found.append(f"MLflow has {points} as {key}, the database {reported}")
    return found


def stream(seed: int) -> random.Random:
    """Of MLflow's faults alone."""
    return random.Random(f"{seed}-mlflow")
