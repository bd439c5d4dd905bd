"""A simulated worker process: the product's own loop in a thread, with a pack that does not train and a pipe that is
none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from search.errors import DatabaseAway
from search.planning.budget import Budget
from search.storage import lifecycle
from search.storage.database import close_storage
from search.workers import worker
from search.workers.protocol import Idle, Job, Order, TrialEnded
from tests.simulation.world import Checkpoint, Host, Killed, World, load, save, trained
from tests.support.made_up_events import epoch

if TYPE_CHECKING:
    from tests.simulation.schedule import Simulation

EPOCHS = 4
"""Of a trial."""
LOST_AFTER_S = 60.0
ROUND_S = 5.0
"""What an epoch takes."""


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
