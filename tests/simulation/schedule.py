"""One schedule: a search by several hosts on one study, drawn from a seed, and the checks at its end.

Real are the worker's loop, its trials, the queue, heartbeats, losses, repeats, and Optuna's storage on SQLite. Made up
are training (`world.trained`), the checkpoints' disk, time, processes and MLflow's client. A supervisor is what it
does for trials: it notices a dead worker, takes up what is lost, and starts another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest import mock

import optuna
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.orm import Session

from search import processes, pruning, records
from search.errors import DatabaseAway, StorageError
from search.places import Places
from search.planning.budget import Budget
from search.planning.rungs import RungPlan
from search.space import Float, Int
from search.storage import database, lifecycle, retry
from search.storage.database import close_storage, open_storage
from search.storage.identity import claim
from search.storage.retry import RetryingStorage
from search.storage.studies import open_study
from search.study import Study
from search.verdict.leaders import Rules, verdict_of
from search.workers import repeats, trial, worker
from search.workers.protocol import Idle, Job, Order, TrialEnded
from search.workers.supervisor import IDLE_LOOK_S, LOOK_S
from tests.simulation import tracking
from tests.simulation.run_store import URI, Network
from tests.simulation.tracking import Search
from tests.simulation.world import Checkpoint, Host, Killed, Process, World, load, save, trained, whole
from tests.support.made_up_events import epoch

EPOCHS = 4
LOST_AFTER_S = 60.0
ROUND_S = 5.0
"""What an epoch takes."""
MOST_TURNS = 20_000

T = TypeVar("T")


class Wrong(AssertionError):
    """A promise that a schedule broke."""


class Pack:
    """Trains by `world.trained`, an epoch of each run a round, and writes a checkpoint before it says so."""

    def __init__(self, bench: Any, owner: str | None = None) -> None:
        self.bench = bench
        self.members: dict[Any, tuple[Any, Path]] = {}
        self.states: dict[Any, Checkpoint | None] = {}
        self.passes = SimpleNamespace(at_once=None, alive=lambda: None)

    def __enter__(self) -> Pack:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def accepts(self, _config: Any) -> bool:
        """Any."""
        return True

    def add(self, config: Any, folder: Path) -> Any:
        """A run, from its checkpoint on."""
        member = object()
        self.members[member] = (config, folder)
        self.states[member] = load(self.bench.world, folder)
        return member

    def remove(self, member: Any) -> None:
        """Let it go."""
        del self.members[member]

    def round(self) -> Iterator[tuple[Any, Any]]:
        """The next epoch of each."""
        world: World = self.bench.world
        process = world.current
        assert process is not None
        for member in list(self.members):
            if member not in self.members:
                continue
            config, folder = self.members[member]
            state = self.states[member]
            if state is not None and len(state.losses) >= config.num_epochs:
                del self.members[member]  # as the trainer's: finished by another process meanwhile
                continue
            world.sleep(ROUND_S)
            self.bench.beat()
            process.check()
            made = self.states[member] = trained(config.model_dump(mode="json"), self.states[member])
            world.trained += 1
            if world.chance.random() < world.deadly:
                process.dead = True
                raise Killed
            save(world, folder, made, config.num_epochs)
            yield member, epoch(len(made.losses), val_loss=made.losses[-1])


class Link:
    """A worker's end of the pipe.

    Args:
        world: Whose time a wait takes.
        waits: Called when a trial of the worker's waits.
    """

    def __init__(self, world: World, waits: Callable[[], None]) -> None:
        self.world = world
        self.waits = waits
        self.share = self.look = False
        self.now = Order.GO_ON
        self.idle = False

    def send(self, message: Any) -> None:
        """Only whether it has anything to do is of interest."""
        self.idle = isinstance(message, Idle)
        if isinstance(message, TrialEnded) and message.state == "WAITING":
            self.waits()

    def alive(self) -> None:
        """Nobody waits for it."""

    def order(self) -> Order:
        """What the supervisor wants."""
        return self.now

    def wait(self, timeout_s: float) -> None:
        """Time goes on."""
        self.world.sleep(5 * timeout_s)  # more seldom than it is, which only costs time


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
        self.gone: list[lifecycle.Lost] = []
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
        with self.seams():
            self.open()
            try:
                self.play()
                self.close()
                self.judge()
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
            self.searches[supervisor] = Search(self, Budget(self.definition.n_trials))
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
            for number in {lost.number for lost in self.gone} - self.lost:
                self.check_loss(trials[number])
            self.lost |= {lost.number for lost in self.gone}
        return left

    def check_loss(self, lost: FrozenTrial) -> None:
        """Nothing is taken from a process that lives and was heard of."""
        record = lost.user_attrs.get(records.WORKER) or {}
        silence = self.world.now - self.world.beats.get(lost._trial_id, -1e9)
        for process in self.world.processes:
            its = bool(record) and record.items() >= self.record(process).items()
            if its and not process.dead and silence <= LOST_AFTER_S:
                self.wrong.append(f"trial {lost.number} was taken from a live process after {silence:.0f} s")

    # The end.

    def judge(self) -> None:
        """All final, nothing doubled, nothing lost, the same bits."""
        trials = self.study.get_trials()
        wrong = self.wrong
        wrong += [f"trial {t.number} is {t.state.name}" for t in trials if not t.state.is_finished()]
        resumed = [t.user_attrs[records.RESUMES] for t in trials if records.RESUMES in t.user_attrs]
        wrong += [f"trial {n} was taken up twice" for n in set(resumed) if resumed.count(n) > 1]
        for t in trials:
            config = t.user_attrs.get(records.CONFIG)
            if config is not None:
                expected = whole(config, max(t.intermediate_values, default=0))
                if tuple(t.intermediate_values[e] for e in sorted(t.intermediate_values)) != expected:
                    wrong.append(f"trial {t.number} has other losses than undisturbed")
            best = t.user_attrs.get(records.BEST_EPOCH)
            if t.state == TrialState.COMPLETE:
                kept = self.world.disk.get((self.folder / t.user_attrs[records.FOLDER]).as_posix(), {})
                if best not in kept:
                    wrong.append(f"trial {t.number} has no adapter of its best epoch, {best}: {sorted(kept)}")
            if t.number in resumed:
                successor = next(s for s in trials if s.user_attrs.get(records.RESUMES) == t.number)
                if not successor.intermediate_values.items() >= t.intermediate_values.items():
                    wrong.append(f"trial {successor.number} lost an epoch that {t.number} had reported")
            attempts, first = t.user_attrs.get(records.ATTEMPT, 0), lifecycle.lineage(self.study, t.number)[-1]
            if attempts > self.blamed.get(first, 0):
                wrong.append(f"trial {t.number} has used {attempts} attempts by deaths that were not its fault")
            if t.state == TrialState.FAIL and t.number not in resumed:
                first = lifecycle.lineage(self.study, t.number)[-1]
                if (
                    t.user_attrs.get(records.REASON) != records.LOST
                    or self.blamed.get(first, 0) <= records.MAX_RETRIES
                ):
                    wrong.append(
                        f"trial {t.number} failed: {t.user_attrs.get(records.REASON)}, "
                        f"{t.user_attrs.get(records.DETAIL)}; {self.blamed.get(first, 0)} deaths to blame it for"
                    )
        ended = [t for t in trials if t.number not in resumed and records.REPEAT_OF not in t.user_attrs]
        if len(ended) != self.definition.n_trials:
            wrong.append(f"{len(ended)} configurations were searched, not {self.definition.n_trials}")
        verdict = verdict_of(lifecycle.read_trials(self.study), self.study.user_attrs)
        if verdict is not None and verdict.kind == "running":
            wrong.append("repeats are still to be trained")
        # An epoch is trained again only by who died in it, or whose last checkpoint was damaged.
        needed = sum(max(t.intermediate_values, default=0) for t in trials if t.number not in resumed)
        allowed = needed + (self.deaths + len(resumed)) * self.slots
        if self.world.trained > allowed:
            wrong.append(f"{self.world.trained} epochs were trained for {needed}, {self.deaths} deaths")
        wrong += tracking.problems(self, trials)
        if wrong:
            raise Wrong("; ".join(wrong))

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

    @contextmanager
    def seams(self) -> Iterator[None]:
        """Put the world in place of what the product asks outside."""
        world, commit = self.world, Session.commit

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
            self.gone += gone
            return gone

        kind = pruning.Kind("simulated", rising=False, plan=pausing if self.pauses else None)
        clock = SimpleNamespace(monotonic=lambda: world.now, sleep=world.sleep)
        patches: list[tuple[Any, str, Any]] = [
            (Session, "commit", lambda session: world.commit(session, commit)),
            (database, "locked", world.lock),
            (retry, "time", clock),
            (retry, "random", world.chance),
            (lifecycle, "_silences", silences),
            (lifecycle, "requeue_lost", requeued),
            *tracking.patches(world, self.network, self.record),
            (RetryingStorage, "record_heartbeat", lambda _, number: world.beats.update({number: world.now})),
            (processes, "_namespace", lambda: mine().host.namespace),
            (processes, "_boot", boot),
            (processes, "_since_boot", lambda pid: f"{boot()}:{pid}"),
            (processes, "is_running", lambda pid: world.lives(mine().host, pid)),
            (processes.socket, "gethostname", lambda: mine().host.name),
            (worker, "this_process", lambda: self.record(mine())),
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


class Worker:
    """A worker process: the real loop in a thread."""

    def __init__(self, simulation: Simulation, host: Host) -> None:
        self.simulation = simulation
        self.process = simulation.world.process(host)
        self.process.bench = self  # type: ignore[attr-defined]
        self.link = Link(simulation.world, self.waits)
        self.world = simulation.world
        self.error: BaseException | None = None
        self.alive = True
        self.loop: worker.Worker | None = None
        self.progress: Any = None
        self.process.thread = threading.Thread(target=self.live, daemon=True)
        self.process.thread.start()

    def live(self) -> None:
        """The process from its start to its end."""
        process, simulation = self.process, self.simulation
        self.world.local.process = process
        process.go.acquire()
        try:
            process.check()
            job = Job(
                study=simulation.definition,
                study_name=simulation.study.study_name,
                places=simulation.places,
                budget=Budget(simulation.definition.n_trials),
                strategy="joint",
                pruner="simulated",
                examined=SimpleNamespace(rows=(), fingerprint="d"),  # type: ignore[arg-type]
                threads=1,
                slots=simulation.slots,
                lost_after_s=LOST_AFTER_S,
                confirm=simulation.rules,
            )
            self.loop = worker.Worker(job, self.link)  # type: ignore[arg-type]
            self.loop.run()
        except (Killed, DatabaseAway):
            pass
        except BaseException as error:  # noqa: BLE001 - a fault of ours, told at the end
            self.error = error
        finally:
            if self.loop is not None:
                with suppress(Exception):
                    close_storage(self.loop.storage)
            self.alive = False
            self.world.back.release()

    def waits(self) -> None:
        """A trial of it waits: its supervisor has the others look for trials again."""
        for other in self.simulation.workers[self.process.host]:
            if other is not self:
                other.link.look = True

    # A workbench.

    def base(self, _config: Any) -> Any:
        """No model."""
        return SimpleNamespace(model=None, fingerprint="m", device=SimpleNamespace(type="cpu"))

    def beat(self) -> None:
        """What the heartbeat's thread does meanwhile."""
        if self.loop is None:
            return
        for run in self.loop._alive():
            run.taken_over = not lifecycle.heartbeat(self.loop.study, run.trial)
