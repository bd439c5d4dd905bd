"""One schedule: a search by several hosts on one study, drawn from a seed, and the checks at its end.

Real are the worker's loop, its trials, the queue, heartbeats, losses, repeats, and Optuna's storage on SQLite. Made up
are training (`world.trained`), the checkpoints' disk, time, processes and MLflow's client. A supervisor is what it
does for trials: it notices a dead worker, takes up what is lost, and starts another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from optuna.trial import FrozenTrial, TrialState

from search import processes, records
from search.errors import DatabaseAway, StorageError
from search.places import Places
from search.planning.budget import Budget
from search.space import Float, Int
from search.storage import lifecycle
from search.storage.database import close_storage, open_storage
from search.storage.identity import claim
from search.storage.studies import open_study
from search.study import Study
from search.verdict.leaders import Rules
from search.workers.protocol import Order
from search.workers.supervisor import IDLE_LOOK_S, LOOK_S
from tests.simulation import tracking
from tests.simulation.checks import problems
from tests.simulation.run_store import URI, Network
from tests.simulation.seams import seams
from tests.simulation.tracking import Search
from tests.simulation.workers import EPOCHS, LOST_AFTER_S, ROUND_S, Worker
from tests.simulation.world import Host, Killed, Process, World

MOST_TURNS = 20_000

T = TypeVar("T")


class Wrong(AssertionError):
    """A promise that a schedule broke."""


@dataclass(frozen=True)
class Moment:
    """How things stood as a trial was taken."""

    now: float
    beats: dict[int, float]
    """When each trial was last heard of, by Optuna's id."""
    alive: list[Process]


class Simulation:
    """A study, the hosts that work on it, and what befalls them.

    Args:
        seed: Of everything.
        folder: Where the database is; nothing else is written but the trials' folders.
        is_alive: Whether the process of a record is alive.
    """

    def __init__(self, seed: int, folder: Path, is_alive: Callable[[Any], bool | None] = processes.alive) -> None:
        self.is_alive = is_alive
        self.world = world = World(seed)
        chance = world.chance
        self.places = Places.of(folder, tracking=URI)
        self.network = Network(world, tracking.stream(seed), self.beat)
        self.searches: dict[Process, Search] = {}
        """What the supervisors have of MLflow."""
        self.definition = Study(
            name="simulated",
            description="faults from outside",
            base={"data": "mini", "num_epochs": EPOCHS, "device": "cpu"},
            space={"learning_rate": Float(1e-6, 1e-3, log=True), "lora_r": Int(2, 8)},
            n_trials=chance.randint(2, 6),
            sampler="random",
        )
        self.pauses = chance.random() < 0.4
        self.rules = Rules(top=2, seeds=2) if chance.random() < 0.3 else None
        names = ["node", "node", f"node{chance.randint(2, 3)}"]  # two containers have one name
        self.hosts = [Host(name, f"{4026531836 + n}") for n, name in enumerate(names[: chance.randint(1, 3)])]
        self.slots = chance.randint(1, 3)
        self.workers: dict[Host, list[Worker]] = {host: [] for host in self.hosts}
        self.supervisors: dict[Host, Process | None] = dict.fromkeys(self.hosts)
        self.faults = chance.randint(2, 12)
        self.blamed: dict[int, int] = {}
        """Deaths that a trial, by its first number, may be to blame for."""
        self.deaths = 0
        self.looked = -LOOK_S
        self.gone: dict[int, Moment] = {}
        """Trials that the look that goes on has found lost."""
        self.lost: set[int] = set()
        """Trials that were looked at as they were lost."""
        self.wrong: list[str] = []

    # The run.

    def run(self) -> None:
        """Play it to its end and check.

        Raises:
            Wrong: a promise is broken.
        """
        with seams(self):
            self.open()
            try:
                self.play()
                self.close()
                wrong = self.wrong + problems(self)
                if wrong:
                    raise Wrong("; ".join(wrong))
            finally:
                for process in self.world.processes:
                    self.end(process)
                self.bury_tasks()
                close_storage(self.storage)

    def open(self) -> None:
        """Create the study."""
        self.places.runs_dir.mkdir(parents=True, exist_ok=True)
        self.storage = open_storage(self.places.storage_url, grace_s=round(LOST_AFTER_S))
        self.study = open_study(self.storage, self.definition)
        self.name: str = self.study.study_name
        self.study_id: str = self.study.user_attrs[records.STUDY_ID]
        self.folder = self.places.study(self.name)
        self.folder.mkdir(exist_ok=True)
        claim(self.folder, self.study)
        if self.rules is not None:
            self.study.set_user_attr(records.CONFIRM, asdict(self.rules))

    def play(self) -> None:
        """Let processes go on and faults happen until the study has what was asked for."""
        for turn in range(MOST_TURNS):
            if self.wrong:
                raise Wrong("; ".join(self.wrong))
            if self.faults and self.world.chance.random() < 0.05:
                self.faults -= 1
                self.fault()
            self.network.change()
            if turn % 10 == 0 and self.is_due() and self.supervise():
                return
            able = [
                each
                for running in self.workers.values()
                for each in running
                if not each.process.dead and each.alive and each.process.host.asleep_until <= self.world.now
            ]
            if able:
                self.resume(self.world.chance.choice(able))
            else:
                self.world.now += ROUND_S
            self.let_tasks_go_on()
            for host in self.hosts:
                self.bury(host)
        raise Wrong(f"no end after {MOST_TURNS} turns: {[(t.number, t.state.name) for t in self.study.trials]}")

    def let_tasks_go_on(self) -> None:
        """Give one of the threads beside the processes' first the word; a process may die in it."""
        able = [task for task in self.world.tasks if task.able()]
        if able:
            self.network.chance.choice(able).resume()
        for host, supervisor in self.supervisors.items():
            if supervisor is not None and supervisor.dead:
                self.fell(host)
            for each in self.workers[host]:
                if each.process.dead and each.alive:
                    self.resume(each)
        self.bury_tasks()
        self.wrong += [f"a thread ended by {type(error).__name__}: {error}" for error in self.world.errors]
        self.world.errors.clear()

    def bury_tasks(self) -> None:
        """The other threads of processes that are dead end, and their locks are given up."""
        for task in [task for task in self.world.tasks if task.process.dead]:
            task.resume()
        for process in [process for process in self.searches if process.dead]:
            self.searches.pop(process).forget()

    def fell(self, host: Host) -> None:
        """A supervisor died alone: its workers end with it."""
        self.supervisors[host] = None
        for each in self.workers[host]:
            self.end(each.process)
        self.workers[host] = []

    def beat(self) -> None:
        """While a process waits for MLflow, the heartbeats of all go on."""
        for running in self.workers.values():
            for each in running:
                process = each.process
                if each.alive and not process.dead and process.host.asleep_until <= self.world.now and each.loop:
                    for run in each.loop._alive():
                        self.world.beats[run.trial._trial_id] = self.world.now

    def resume(self, chosen: Worker) -> None:
        """Give a worker the word until it gives way or ends."""
        chosen.process.go.release()
        self.world.back.acquire()

    def end(self, process: Process) -> None:
        """Kill a process, and let its thread run into that."""
        process.dead = True
        for running in self.workers.values():
            for each in running:
                if each.process is process and each.alive:
                    self.resume(each)

    # Faults.

    def fault(self) -> None:
        """One of the things that happen."""
        world = self.world
        host = world.chance.choice(self.hosts)
        kind = world.chance.choice(["worker", "group", "reboot", "stop", "away", "flaky", "deadly", "sleep", "damage"])
        supervisor = self.supervisors[host]
        if kind == "worker" and self.workers[host]:
            self.end(world.chance.choice(self.workers[host]).process)
        elif kind in ("group", "reboot"):
            if supervisor is not None:
                supervisor.dead = True
            for each in self.workers[host]:
                self.end(each.process)
            self.deaths += len(self.workers[host])
            self.workers[host], self.supervisors[host] = [], None
            if kind == "reboot":
                host.boot += 1
                host.pids = 100
        elif kind == "stop":
            for each in self.workers[host]:
                each.link.now = Order.END_AFTER_EPOCH
        elif kind == "away":
            world.away_until = world.now + world.chance.choice([5.0, 60.0, 1000.0])
        elif kind == "flaky":
            world.flaky = world.chance.choice([0.0, 0.02, 0.1])
        elif kind == "deadly":
            world.deadly = world.chance.choice([0.0, 0.0, 0.002, 0.01])
        elif kind == "sleep":
            host.asleep_until = world.now + world.chance.choice([30.0, 300.0])
        elif kind == "damage" and world.disk:
            folder = world.chance.choice(sorted(world.disk))
            kept = world.disk[folder]
            if len(kept) > 1 or max(kept) < EPOCHS:  # else it is the result, which nothing can bring back
                kept[max(kept)] = replace(kept[max(kept)], sound=False)
                self.deaths += 1
        if not self.faults:  # the rest is quiet
            world.flaky = world.deadly = 0.0

    def bury(self, host: Host) -> None:
        """A supervisor's workers that died: their trials may be why. Those that ended are forgotten."""
        for each in [each for each in self.workers[host] if not each.alive]:
            self.workers[host].remove(each)
            if each.error is not None:
                self.wrong.append(f"a worker ended by {type(each.error).__name__}: {each.error}")
            if not each.process.dead:
                each.process.dead = True
                continue
            self.deaths += 1
            supervisor = self.supervisors[host]
            if supervisor is not None:
                for number in (running := self.trials_of(each.process)):
                    first = lifecycle.lineage(self.study, number)[-1]
                    self.blamed[first] = self.blamed.get(first, 0) + 1
                self.look(supervisor, running)

    def trials_of(self, process: Process) -> list[int]:
        """Numbers of the trials that a process runs, by its record."""
        record = self.record(process)
        return [
            t.number
            for t in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            if (t.user_attrs.get(records.WORKER) or {}).items() >= record.items()
        ]

    # Supervisors.

    def is_due(self) -> bool:
        """Whether the supervisors look: each does so every `LOOK_S` seconds, more often while its workers are idle."""
        busy = any(each.alive and not each.link.idle for running in self.workers.values() for each in running)
        return self.world.now - self.looked >= (LOOK_S if busy else IDLE_LOOK_S)

    def supervise(self) -> bool:
        """Each host's supervisor looks for lost trials and keeps its workers going; True once all is done."""
        self.looked = self.world.now
        waiting, running = 0, 0
        for host in self.hosts:
            if host.asleep_until > self.world.now or self.world.now < self.world.away_until:
                return False
            supervisor = self.supervisors[host]
            if supervisor is None and (supervisor := self.begin(host)) is None:
                return False
            left = self.look(supervisor, ())
            if left is None:
                return False
            waiting, running = left.waiting, left.running
        done = not waiting and not running and lifecycle.counted(self.study) >= self.definition.n_trials
        for host in self.hosts:
            if done:
                for each in self.workers[host]:
                    each.link.now = Order.END_AFTER_EPOCH
            elif not self.workers[host]:
                self.workers[host] = [Worker(self, host) for _ in range(self.world.chance.randint(1, 2))]
            for each in self.workers[host]:
                each.link.look = True
        return done and not any(self.workers.values())

    def begin(self, host: Host) -> Process | None:
        """A supervisor's beginning; None if it dies of it."""
        supervisor = self.supervisors[host] = self.world.process(host)

        def begin() -> Process:
            self.searches[supervisor] = Search(self)
            self.searches[supervisor].begin(Budget(self.definition.n_trials))
            return supervisor

        try:
            return self.as_supervisor(supervisor, begin)
        except DatabaseAway:
            supervisor.dead = True
            self.fell(host)
            return None

    def as_supervisor(self, supervisor: Process, do: Callable[[], T]) -> T | None:
        """Have a supervisor do something; None if it dies of it."""
        try:
            with self.world.acting(supervisor):
                return do()
        except Killed:
            self.fell(supervisor.host)
            return None
        except StorageError as error:
            if not isinstance(error, DatabaseAway):
                self.wrong.append(f"a supervisor met {type(error).__name__}: {error}")
                return None
            raise

    def close(self) -> None:
        """The searches end; later, when MLflow is back, the same command comes once more on each host."""
        for host, supervisor in self.supervisors.items():
            with suppress(DatabaseAway):
                if supervisor is not None:
                    self.as_supervisor(supervisor, self.searches[supervisor].close)
                    supervisor.dead = True
            self.supervisors[host] = None
        self.bury_tasks()
        self.network.calm()
        self.world.flaky = self.world.deadly = 0.0
        self.world.away_until = -1.0
        for host in self.hosts:
            host.asleep_until = -1.0
            again = self.begin(host)
            assert again is not None
            self.as_supervisor(again, self.searches[again].close)
            again.dead = True
        self.bury_tasks()

    def look(self, supervisor: Process, blamed: Sequence[int]) -> lifecycle.Unfinished | None:
        """As `Session` looks; None if the database is away or the supervisor dies of it."""
        self.gone.clear()
        left = None
        with suppress(DatabaseAway):
            left = self.as_supervisor(supervisor, lambda: self.searches[supervisor].look(blamed))
        if self.gone:
            trials = self.study.get_trials(deepcopy=False)
            for number in self.gone.keys() - self.lost:
                self.check_loss(trials[number], self.gone[number])
            self.lost |= self.gone.keys()
        return left

    def note_losses(self, gone: Sequence[lifecycle.Lost]) -> None:
        """Keep how things stood: while the look goes on, MLflow takes its time, and workers are heard of again."""
        alive = [process for process in self.world.processes if not process.dead]
        self.gone |= {lost.number: Moment(self.world.now, dict(self.world.beats), alive) for lost in gone}

    def check_loss(self, lost: FrozenTrial, at: Moment) -> None:
        """Nothing is taken from a process that lives and was heard of."""
        record = lost.user_attrs.get(records.WORKER) or {}
        silence = at.now - at.beats.get(lost._trial_id, -1e9)
        for process in at.alive:
            its = bool(record) and record.items() >= self.record(process).items()
            if its and silence <= LOST_AFTER_S:
                self.wrong.append(f"trial {lost.number} was taken from a live process after {silence:.0f} s")

    # What is made up.

    def record(self, process: Process) -> dict[str, Any]:
        """A process as `processes.record` has it."""
        host = process.host
        return {
            "host": host.name,
            "pid": process.pid,
            "since_boot": f"{host.name}-{host.namespace}-{process.boot}:{process.pid}",
            "pid_namespace": host.namespace,
        }
