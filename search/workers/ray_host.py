"""The end of `--executor ray` on a node of the cluster: the actor that runs a worker. Ray itself is not imported."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from search import processes
from search.workers.protocol import HandOver, Job, Message, Order
from search.workers.start import work

EXCHANGE_S = 0.5
"""Longest wait of an actor for its worker's messages, and so of an order for the next exchange."""
PASSED_ON = ("LORA_SEARCH_", "MLFLOW_", "HF_")
"""Beginnings of the names of environment variables that workers get from the supervisor: actors have their node's."""


class WorkerHost:
    """Starts a worker process on its node, hands it orders and returns its messages."""

    def __init__(self, threads: int, environment: dict[str, str], folder: str) -> None:
        os.environ.update(environment)
        with suppress(OSError):  # relative paths then mean the same; the job's own are absolute
            os.chdir(folder)
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        # Ray has set CUDA_VISIBLE_DEVICES to the GPUs of this actor.
        self._process = context.Process(target=work, args=(theirs, None, threads), name="worker")
        self._process.start()
        theirs.close()
        self._has_job = False

    def identity(self) -> dict[str, Any]:
        """The worker as `records.WORKER` of its trials."""
        assert self._process.pid is not None
        return processes.record(self._process.pid)

    def exchange(self, orders: Sequence[Order | HandOver | Job], kill: bool) -> tuple[list[Message], int | None]:
        """Hand the worker what the supervisor sends; returns its messages, and its exit code once it has ended."""
        for order in orders:
            if isinstance(order, Job):
                if self._has_job:
                    continue  # the answer to the exchange that brought it was lost
                self._has_job = True
            with suppress(OSError):  # it has ended
                self._link.send(order)
        if kill:
            self._process.kill()
        wait([self._link, self._process.sentinel], EXCHANGE_S)
        ended = not self._process.is_alive()
        messages: list[Message] = []
        with suppress(EOFError, OSError):
            while self._link.poll():
                messages.append(self._link.recv())
        return messages, self._process.exitcode if ended else None


def passed_on() -> dict[str, str]:
    """The environment variables of this process that workers get.

    They are passed as an argument and not as Ray's runtime environment, which its dashboard shows, passwords included.
    """
    return {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
