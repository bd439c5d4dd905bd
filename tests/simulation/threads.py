"""Threads of a simulated process beside its first one: those that write to MLflow and deliver what it did not take.

They are real threads of which one runs at a time, as `world` has it: one goes on when it is resumed, and gives way in
its waits and in calls of MLflow. When its process dies, it gets no further.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tests.simulation.world import Killed, Process, World


class Task:
    """One such thread, of the process that runs when it is made.

    Args:
        world: What it runs in.
        work: What it does.
    """

    def __init__(self, world: World, work: Callable[[], None]) -> None:
        assert world.current is not None
        self.world = world
        self.process: Process = world.current
        self.ended = False
        self._work = work
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._ready: Callable[[], bool] = lambda: True
        self.wakes_at = math.inf
        world.tasks.append(self)
        threading.Thread(target=self._live, daemon=True).start()

    def _live(self) -> None:
        self.world.local.process, self.world.local.task = self.process, self
        self._go.acquire()
        try:
            self.process.check()
            self._work()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - a fault of ours, told at the end
            self.world.errors.append(error)
        finally:
            self.ended = True
            self.world.tasks.remove(self)
            self._back.release()

    def able(self) -> bool:
        """Whether it would get any further now, be it to its end."""
        if self.process.dead:
            return True
        awake = self.process.host.asleep_until <= self.world.now
        return awake and (self.world.now >= self.wakes_at or self._ready())

    def resume(self) -> None:
        """Give it the word until it gives way or ends."""
        self._go.release()
        self._back.acquire()

    def give_way(self) -> None:
        """Go on when it is resumed."""
        self._back.release()
        self._go.acquire()
        self.process.check()

    def wait(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Wait for something, but not longer than this."""
        self._ready, self.wakes_at = ready, self.world.now + timeout_s
        while not ready() and self.world.now < self.wakes_at:
            self.give_way()
        self._ready, self.wakes_at = lambda: True, math.inf

    def join(self, timeout_s: float | None = None) -> None:
        """Have the running process, whose first thread calls this, wait for its end."""
        deadline = math.inf if timeout_s is None else self.world.now + timeout_s
        while not self.ended:
            self.process.check()
            if self.able():
                self.resume()
            elif self.world.now >= deadline:
                return
            else:
                self.world.sleep(max(0.0, min(deadline, self.wakes_at) - self.world.now))
        self.process.check()


class Condition:
    """In place of `threading.Condition`: no lock is needed where one thread runs at a time and none gives way here."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        if self._world.current is not None:
            self._world.current.check()

    def __exit__(self, *_: object) -> None:
        pass

    def notify(self) -> None:
        """Who waits looks for itself."""

    def wait_for(self, ready: Callable[[], bool], timeout_s: float) -> None:
        """Of a task."""
        self._world.local.task.wait(ready, timeout_s)


class Event:
    """In place of `threading.Event`."""

    def __init__(self, world: World) -> None:
        self._world, self._set = world, False

    def set(self) -> None:
        """See threading."""
        self._set = True

    def wait(self, timeout_s: float) -> bool:
        """Of a task; longer than it is asked for, which only costs time."""
        self._world.local.task.wait(lambda: self._set, 3 * timeout_s)
        return self._set


def in_place_of_threads(world: World, *kinds: type) -> list[tuple[Any, str, Any]]:
    """Patches of `threading.Thread`, by which threads of these classes are tasks."""
    start, join, is_alive = threading.Thread.start, threading.Thread.join, threading.Thread.is_alive

    def started(thread: Any) -> None:
        if isinstance(thread, kinds):
            thread.task = Task(world, thread.run)  # type: ignore[attr-defined]
        else:
            start(thread)

    def joined(thread: Any, timeout: float | None = None) -> None:
        thread.task.join(timeout) if hasattr(thread, "task") else join(thread, timeout)

    def lives(thread: Any) -> bool:
        return not thread.task.ended if hasattr(thread, "task") else is_alive(thread)

    return [
        (threading.Thread, "start", started),
        (threading.Thread, "join", joined),
        (threading.Thread, "is_alive", lives),
    ]


def threading_of(world: World) -> SimpleNamespace:
    """In place of the module in whoever makes conditions and events."""
    return SimpleNamespace(Condition=lambda: Condition(world), Event=lambda: Event(world))
