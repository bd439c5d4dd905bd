"""An MLflow server in memory, and a client in place of `MlflowClient` whose calls fail as a seed draws it.

All above the client is the product's: `search.tracking` as it is, with its threads. What the server was told stays,
whoever is killed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS, RESOURCE_DOES_NOT_EXIST

from tests.simulation.world import GIVE_WAY, Killed, World

URI = "http://mlflow.simulated"
TIMEOUT_S = 30.0
"""As MLFLOW_HTTP_REQUEST_TIMEOUT in `search.tracking.library`."""


class Page(list[Any]):
    """What a search found, all at once."""

    token = None


class Server:
    """Experiments and runs, and what MLflow refuses."""

    def __init__(self, world: World, chance: random.Random) -> None:
        self.world = world
        self.chance = chance
        self.experiments: dict[str, SimpleNamespace] = {}
        self.all: dict[str, SimpleNamespace] = {}

    def now_ms(self) -> int:
        """The time of day."""
        return round(1000 * self.world.today())

    # Experiments.

    def search_experiments(self, max_results: int) -> Page:
        """Any."""
        return Page(list(self.experiments.values())[:max_results])

    def get_experiment_by_name(self, name: str) -> SimpleNamespace | None:
        """None if there is none."""
        return next((each for each in self.experiments.values() if each.name == name), None)

    def create_experiment(self, name: str, artifact_location: str | None = None, tags: Any = None) -> str:
        """Names are unique."""
        del artifact_location
        if self.get_experiment_by_name(name) is not None:
            raise MlflowException(f"experiment {name} exists", RESOURCE_ALREADY_EXISTS)
        key = str(len(self.experiments) + 1)
        made = SimpleNamespace(experiment_id=key, name=name, tags=dict(tags or {}), lifecycle_stage="active")
        self.experiments[key] = made
        return key

    def set_experiment_tag(self, experiment_id: str, key: str, value: str) -> None:
        """Set it."""
        self.experiments[experiment_id].tags[key] = value

    # Runs.

    def create_run(self, experiment_id: str, run_name: str, tags: Any, start_time: int | None) -> SimpleNamespace:
        """Each call makes one."""
        key = f"{self.chance.getrandbits(128):032x}"
        info = SimpleNamespace(
            run_id=key,
            run_name=run_name,
            experiment_id=experiment_id,
            status="RUNNING",
            start_time=self.now_ms() if start_time is None else start_time,
            end_time=None,
            lifecycle_stage="active",
        )
        data = SimpleNamespace(tags=dict(tags), params={}, metrics={})
        self.all[key] = SimpleNamespace(info=info, data=data, history={}, files={})
        return self.get_run(key)

    def get_run(self, run_id: str) -> SimpleNamespace:
        """A copy of what it has."""
        if run_id not in self.all:
            raise MlflowException(f"run {run_id} not found", RESOURCE_DOES_NOT_EXIST)
        run = self.all[run_id]
        data = {name: dict(values) for name, values in vars(run.data).items()}
        return SimpleNamespace(info=SimpleNamespace(**vars(run.info)), data=SimpleNamespace(**data))

    def search_runs(
        self,
        experiment_ids: Sequence[str],
        filter_string: str = "",
        max_results: int = 1000,
        page_token: str | None = None,
        order_by: Sequence[str] | None = None,
    ) -> Page:
        """Those that are not deleted, by `attributes.status` or a tag; the latest first unless asked otherwise."""
        assert page_token is None and order_by in (None, ["attributes.start_time ASC"])
        field, _, value = filter_string.replace("'", "").partition(" = ")
        kind, _, name = field.partition(".")
        found = []
        for run in self.all.values():
            if run.info.experiment_id in experiment_ids and run.info.lifecycle_stage == "active":
                has = run.info.status if kind == "attributes" else run.data.tags.get(name)
                if not filter_string or has == value:
                    found.append(run)
        found.sort(key=lambda run: (run.info.start_time if order_by else -run.info.start_time, run.info.run_id))
        return Page(self.get_run(run.info.run_id) for run in found[:max_results])

    def delete_run(self, run_id: str) -> None:
        """It is kept, but no longer found."""
        self.all[run_id].info.lifecycle_stage = "deleted"

    def update_run(self, run_id: str, status: str) -> None:
        """Set its status; it has no end then."""
        info = self._active(run_id).info
        info.status, info.end_time = status, None

    def set_terminated(self, run_id: str, status: str, end_time: int) -> None:
        """End it."""
        info = self._active(run_id).info
        info.status, info.end_time = status, end_time

    def delete_tag(self, run_id: str, key: str) -> None:
        """MLflow refuses one that is not there."""
        if self._active(run_id).data.tags.pop(key, None) is None:
            raise MlflowException(f"no tag with name: {key}", RESOURCE_DOES_NOT_EXIST)

    def log_batch(
        self, run_id: str, metrics: Iterable[Any] = (), params: Iterable[Any] = (), tags: Iterable[Any] = ()
    ) -> None:
        """All of it or none. Equal points are kept once; a param never changes."""
        run = self._active(run_id)
        changed = {each.key for each in params if run.data.params.get(each.key, each.value) != each.value}
        if changed:
            raise MlflowException(f"changing params is not allowed: {changed}", INVALID_PARAMETER_VALUE)
        run.data.params.update({each.key: each.value for each in params})
        run.data.tags.update({each.key: each.value for each in tags})
        for each in metrics:
            points = run.history.setdefault(each.key, [])
            if not any(vars(each) == vars(point) for point in points):
                points.append(each)
            run.data.metrics[each.key] = max(points, key=lambda point: (point.step, point.timestamp)).value

    def get_metric_history(self, run_id: str, key: str) -> list[Any]:
        """As it was written."""
        return list(self.all[run_id].history.get(key, ()))

    def log_text(self, run_id: str, text: str, file: str) -> None:
        """A file of the run."""
        self._active(run_id).files[file] = text

    def log_inputs(self, run_id: str, datasets: Any) -> None:
        """Which data it trains on."""
        self._active(run_id).files["inputs"] = datasets

    def _active(self, run_id: str) -> SimpleNamespace:
        self.get_run(run_id)
        if self.all[run_id].info.lifecycle_stage != "active":
            raise MlflowException(f"run {run_id} must be in the 'active' state", INVALID_PARAMETER_VALUE)
        return self.all[run_id]


class Network:
    """Between clients and the server: down, slow, flaky; and processes are killed in the midst of a call.

    Args:
        world: Whose time calls take.
        chance: Of these faults alone: those of `World.chance` come as they do without MLflow.
        meanwhile: Called as a process waits for an answer.
    """

    KINDS = ("away", "flaky", "slow", "deadly")

    def __init__(self, world: World, chance: random.Random, meanwhile: Callable[[], None]) -> None:
        self.world, self.chance, self.meanwhile = world, chance, meanwhile
        self.server = Server(world, chance)
        self.faults = chance.randint(0, 10)
        self.away_until = -1.0
        self.flaky = self.slow = self.deadly = 0.0
        self.quiet = False
        self.told: dict[str, int] = {}
        """How often each fault came, for who wonders whether a schedule shows anything."""

    def change(self) -> None:
        """Now and then, a change of how it goes."""
        if not self.faults or self.chance.random() >= 0.05:
            return
        self.faults -= 1
        kind = self.chance.choice(self.KINDS)
        if kind == "away":
            self.away_until = self.world.now + self.chance.choice([5.0, 60.0, 1000.0])
        elif kind == "flaky":
            self.flaky = self.chance.choice([0.0, 0.05, 0.3])
        elif kind == "slow":
            self.slow = self.chance.choice([0.0, 0.02, 0.1])
        else:
            self.deadly = self.chance.choice([0.0, 0.005, 0.02])

    def calm(self) -> None:
        """The server is back, and nothing befalls it any more."""
        self.faults, self.away_until = 0, -1.0
        self.flaky = self.slow = self.deadly = 0.0
        self.quiet = True

    def dies(self) -> bool:
        """Whether the running process is killed here."""
        process = self.world.current
        if process is None or self.quiet or self.chance.random() >= self.deadly:
            return False
        process.dead = True
        self._count("killed")
        return True

    def call(self, do: Callable[[], Any]) -> Any:
        """A call of a client's."""
        process = self.world.current
        if process is None or self.quiet:
            return do()
        process.check()
        if self.chance.random() < GIVE_WAY:
            process.give_way()
        if self.dies():
            if self.chance.random() < 0.5:
                do()
            raise Killed
        if self.world.now < self.away_until:
            self._count("away")
            raise _no_answer("connection refused")
        if self.chance.random() < self.slow:
            return self._slowly(do)
        if self.chance.random() < self.flaky:
            done = self.chance.random() < 0.5
            self._count("answer lost" if done else "refused")
            if done:
                do()
            raise _no_answer("the server closed the connection")
        return do()

    def _slowly(self, do: Callable[[], Any]) -> Any:
        """What takes longer than the client waits is done at once, after that, or never, and has no answer."""
        self._count("slow")
        takes_s = self.chance.choice([3.0, 15.0, 60.0])
        if takes_s > TIMEOUT_S:
            done = self.chance.random() < 0.5
            if done:
                do()
            self._wait(TIMEOUT_S)
            raise _no_answer(f"no answer for {TIMEOUT_S:.0f} s")
        if self.chance.random() < 0.5:
            answer = do()
            self._wait(takes_s)
            return answer
        self._wait(takes_s)
        return do()

    def _wait(self, seconds: float) -> None:
        """Of the running thread: a process goes on meanwhile in its others."""
        task = getattr(self.world.local, "task", None)
        if task is not None:
            task.wait(lambda: False, seconds)
            return
        self.world.now += seconds
        self.meanwhile()
        self.world.sleep(0.0)

    def _count(self, what: str) -> None:
        self.told[what] = self.told.get(what, 0) + 1


class Client:
    """In place of `MlflowClient`."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __getattr__(self, name: str) -> Callable[..., Any]:
        work = getattr(self._network.server, name)
        return lambda *arguments, **named: self._network.call(lambda: work(*arguments, **named))


def _no_answer(why: str) -> MlflowException:
    """As MLflow puts what went wrong on the way."""
    return MlflowException(f"API request to {URI} failed with exception: {why}")
