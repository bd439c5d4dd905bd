"""`--executor ray`: workers on the nodes of a Ray cluster. The only module that imports Ray.

Ray finds a node for each worker and reports when one is lost; the supervisor then asks for another worker, which Ray
places elsewhere. Trials are left to Optuna, as on one machine, and the worker is the same program: an actor
(`search.workers.ray_host`) starts it as a process of its own and passes its messages on. When an actor dies, or its
node, Ray kills the process.

    Supervisor  --pipe--  thread  --exchange, twice a second--  actor on a node  --pipe--  worker process
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from search.errors import StudyError
from search.workers.pool import WorkerPool
from search.workers.protocol import Alive, HandOver, Idle, Job, Message, Notice, Order, TrialStarted
from search.workers.ray_host import EXCHANGE_S, WorkerHost, passed_on
from search.workers.ray_layout import Layout, amount, check_shared, lay_out, node_of

CONNECT_S = 10
"""Longest wait for the head of a cluster to answer."""
PENDING_S, AGAIN_S = 10, 600
"""Seconds without a node for a worker after which the user is notified, and seconds until the next notice."""
KILL_S = 10
"""Seconds that an actor has to kill its worker; after that it is killed itself."""

log = logging.getLogger("search.workers.ray_pool")


class RayPool(WorkerPool):
    """Worker processes on the nodes of a Ray cluster. A context, which connects to the cluster.

    Args:
        workers: Number of workers; None for as many as the cluster has GPUs for, without GPUs one for each node.
        gpus_per_worker: GPUs that a worker asks for, where the cluster has any.
        address: Address of the cluster, e.g. `10.0.0.1:6379`; None for the one of this machine or, if there is none,
            one that is started for this search.
        databases: What the workers share, see `check_shared`.
    """

    def __init__(
        self, workers: int | None, gpus_per_worker: int, address: str | None, databases: Mapping[str, str]
    ) -> None:
        super().__init__(0, 1)
        self._forks = False  # the workers' processes are their actors'
        self._wanted = workers
        self._gpus_per_worker = gpus_per_worker
        self._address = address
        self._databases = databases
        self._layout = Layout(0, 1, 0)
        self._disconnects = False
        self._gone: list[dict[str, Any]] = []
        self.placed: dict[RemoteProcess, bool] = {}
        """The workers on nodes; whether each has nothing to train."""

    def __enter__(self) -> RayPool:
        self._connect()
        import ray

        try:
            nodes = [node_of(each["Resources"]) for each in ray.nodes() if each["Alive"]]
            check_shared(self._databases, len(nodes))
            self._layout = lay_out(nodes, self._wanted, self._gpus_per_worker)
            self.size, self.threads = self._layout.workers, self._layout.threads
            super().__enter__()
        except BaseException:
            self._disconnect()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._disconnect()

    def alive(self, worker: Mapping[str, Any]) -> bool | None:
        """Whether a `records.WORKER` still runs: on this host by its process, else by what Ray said about it."""
        known = super().alive(worker)
        if known is None and any(_same(worker, gone) for gone in self._gone):
            return False
        return known

    def lost(self, worker: dict[str, Any]) -> None:
        """Note that a worker has ended, or its node has."""
        self._gone.append(worker)

    def nothing_to_do(self) -> bool:
        """Whether there are workers on nodes, and none of them has anything to train: nor would one more."""
        placed = list(self.placed.values())
        return bool(placed) and all(placed)

    def _connect(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing we run calls home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default; silences its warning
        try:
            import ray
        except ImportError as error:
            raise StudyError(f"--executor ray needs Ray: pip install 'lora-search[ray]' ({error})") from None
        if ray.is_initialized():
            return
        self._reach()
        where = self._address or (None if _left_behind() else "auto")
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            try:
                if where is None:
                    raise ConnectionError
                ray.init(address=where, **quiet)
            except ConnectionError:
                if self._address is not None:
                    raise
                ray.init(address="local", include_dashboard=False, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            where = f" at {self._address}" if self._address else ""
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise StudyError(
                f"cannot join the Ray cluster{where}: {said[0]} (the search runs on a node of the cluster: "
                "`ray start --head` on the first, `ray start --address=...` on the others)"
            ) from None
        self._disconnects = True
        _keep_off_the_terminal()

    def _reach(self) -> None:
        """Try the address once: Ray itself tries one at which nothing answers for longer than four minutes."""
        host, _, port = (self._address or "").rpartition(":")
        if not host or not port.isdigit():
            return
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
        except OSError as error:
            raise StudyError(
                f"no Ray cluster answers at --ray-address {self._address}: {error.strerror or error}; is the head "
                "started (`ray start --head` prints its address)?"
            ) from None

    def _disconnect(self) -> None:
        if self._disconnects:
            import ray

            ray.shutdown()
            self._disconnects = False

    def _spawn(self, index: int) -> tuple[RemoteProcess, Connection]:
        import ray

        ours, theirs = multiprocessing.Pipe()
        actor = (
            ray.remote(WorkerHost)
            .options(num_cpus=self.threads, num_gpus=self._layout.gpus, max_restarts=0, max_task_retries=0)
            .remote(self.threads, passed_on(), os.getcwd())  # noqa: PTH109 - a text for another machine
        )
        needs = f"{amount(self._layout.gpus, 'GPU')} and {amount(self.threads, 'CPU')}"
        return RemoteProcess(index, actor, theirs, self, needs), ours


class RemoteProcess:
    """A worker on a node, with the interface of a local process; its messages come over a pipe of this process."""

    def __init__(self, index: int, actor: Any, link: Connection, pool: RayPool, needs: str) -> None:
        self.exitcode: int | None = None
        self.sentinel, self._sentinel_end = os.pipe()
        self._index = index
        self._actor = actor
        self._link = link
        self._pool = pool
        self._needs = needs
        self._orders: list[Order | HandOver | Job] = []
        self._killed_at: float | None = None
        self._identity: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._relay, name=f"worker-{index}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """Its process id on its node, once it has one."""
        return None if self._identity is None else int(self._identity["pid"])

    def is_alive(self) -> bool:
        """Whether it may still send messages."""
        return self.exitcode is None

    def terminate(self) -> None:
        """Ask for what SIGTERM means to a worker: stop at the next step, and keep the trial for later."""
        self._orders.append(Order.END_NOW)

    def kill(self) -> None:
        """Have it killed, whatever it is doing."""
        if self._killed_at is None:
            self._killed_at = time.monotonic()

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""
        self._thread.join(timeout)

    def close(self) -> None:
        """Close the sentinel."""
        os.close(self.sentinel)

    def _relay(self) -> None:
        """Pass messages on between the supervisor's pipe and the actor until the worker has ended: the thread."""
        import ray
        from ray.exceptions import RayActorError, RayError

        code = -signal.SIGKILL
        try:
            unplaced = self._wait_for_node()
            code = self._exchange_until_end() if unplaced is None else unplaced
        except RayActorError as error:
            self._say(f"worker {self._index} was lost: {_reason(error)}")
        except RayError as error:
            log.exception("worker %d cannot be reached", self._index)
            self._say(f"worker {self._index} cannot be reached: {_reason(error)}")
        finally:
            with suppress(Exception):  # the cluster may be gone
                ray.kill(self._actor)
            if self._identity is not None:
                self._pool.lost(self._identity)
            self._pool.placed.pop(self, None)
            self.exitcode = code
            self._link.close()
            os.close(self._sentinel_end)

    def _wait_for_node(self) -> int | None:
        """Wait until Ray has placed the actor: None, or the exit code if the worker is no longer wanted by then."""
        import ray

        tell_at = time.monotonic() + PENDING_S
        reference = self._actor.identity.remote()
        while not ray.wait([reference], timeout=EXCHANGE_S)[0]:
            self._take_orders()
            self._pass_on(Alive())  # waiting is not hanging
            if self._killed_at is not None:
                return -signal.SIGKILL
            if any(isinstance(order, Order) and order > Order.GO_ON for order in self._orders):
                return 0
            if self._pool.nothing_to_do():
                self._pass_on(Idle())  # the supervisor ends a search whose workers are all idle
            if time.monotonic() > tell_at:
                tell_at = time.monotonic() + AGAIN_S
                self._say(f"worker {self._index} waits for a node of the Ray cluster with {self._needs} free")
        self._identity = ray.get(reference)
        self._pool.placed[self] = False
        return None

    def _exchange_until_end(self) -> int:
        import ray
        from ray.exceptions import ActorUnavailableError

        while True:
            self._take_orders()
            orders = list(self._orders)
            reference = self._actor.exchange.remote(orders, self._killed_at is not None)
            while not ray.wait([reference], timeout=KILL_S)[0]:
                if self._killed_at is not None and time.monotonic() - self._killed_at > KILL_S:
                    return -signal.SIGKILL  # the actor hangs too, and is killed with its worker
            try:
                messages, code = ray.get(reference)
            except ActorUnavailableError:  # the network; Ray will find out whether the node is lost
                time.sleep(EXCHANGE_S)
                continue
            del self._orders[: len(orders)]
            for message in messages:
                self._pass_on(message)
            if code is not None:
                return int(code)

    def _take_orders(self) -> None:
        """Take what the supervisor has sent since."""
        try:
            while self._link.poll():
                self._orders.append(self._link.recv())
        except (EOFError, OSError):  # the supervisor is ending
            self._orders.append(Order.END_NOW)

    def _pass_on(self, message: Message) -> None:
        if self in self._pool.placed and isinstance(message, Idle | TrialStarted):
            self._pool.placed[self] = isinstance(message, Idle)
        with suppress(OSError):  # the supervisor is ending
            self._link.send(message)

    def _say(self, text: str) -> None:
        log.error("%s", text)
        self._pass_on(Notice(text=text))


def _left_behind() -> bool:
    """Whether the cluster that Ray remembers on this machine is gone.

    One that was killed has left its address behind, at which Ray would try for minutes.
    """
    from ray._private import utils

    if "RAY_ADDRESS" in os.environ or not hasattr(utils, "read_ray_address"):
        return False
    host, _, port = (utils.read_ray_address() or "").rpartition(":")
    if not host or not port.isdigit():
        return False
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except OSError:
        return True
    return False


def _keep_off_the_terminal() -> None:
    """Send Ray's reports on its nodes, whole state dumps, to our log file: it prints them even if asked not to."""
    from ray._private import worker

    def record(data: Mapping[str, Any], **_: Any) -> None:
        log.warning("Ray: %s", "\n".join(data.get("lines", ())))

    if hasattr(worker, "print_to_stdstream"):
        worker.print_to_stdstream = record


def _same(worker: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    same = worker.get("host") == other["host"] and worker.get("pid") == other["pid"]
    return same and bool(abs(worker["started_s"] - other["started_s"]) < 2)


def _reason(error: BaseException) -> str:
    """The line of Ray's message that gives the reason, without ids."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    for line in reversed(lines):
        if "because" in line:
            return line.partition(". Node Id")[0].rstrip(".")
    return lines[0] if lines else type(error).__name__
