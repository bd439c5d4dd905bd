"""`DeliveryThread`: delivers a study's spool while the search runs, and says when MLflow is away and back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from search.errors import StorageError
from search.tracking.delivery import Delivered, Delivery

log = logging.getLogger("search.tracking.courier")

POLL_S = 1.0
"""How soon records that come into the spool are seen."""
MAX_PAUSE_S = 30.0
"""Longest pause between two tries while the store is away."""
FINAL_S = 10.0
"""How long a search that has ended still tries."""


class DeliveryThread(threading.Thread):
    """Delivers what comes into the spool, with growing pauses while the store is away."""

    def __init__(self, delivery: Delivery, where: str, say: Callable[[str], None]) -> None:
        """Set up; `start` starts.

        Args:
            delivery: What delivers.
            where: The store's address as it may be shown.
            say: Tells the user.
        """
        super().__init__(name="courier", daemon=True)
        self._delivery, self._where, self._say = delivery, where, say
        self._closing = threading.Event()
        self._told = False
        self._since = 0.0
        self._records = 0

    def start(self, away: str | None = None) -> None:
        """Begin; `away` says why the store did not answer already."""
        if away is not None:
            self._away(away)
        super().start()

    def run(self) -> None:
        """The thread's work."""
        pause = POLL_S
        while not self._closing.wait(pause):
            pause = POLL_S if self.deliver() is None else min(MAX_PAUSE_S, pause * 2)

    def deliver(self) -> str | None:
        """One round; returns why the store did not take what there is, if so."""
        try:
            done = self._delivery.once()
        except StorageError as error:
            self._away(str(error))
            return str(error)
        except Exception as error:  # a fault of ours must not end the thread: the records are safe where they are
            log.exception("delivery of the spool")
            self._away(f"{type(error).__name__}: {error}")
            return str(error)
        self._count(done)
        return None

    def close(self, for_s: float | None = None) -> str | None:
        """Try for `FINAL_S` seconds, or as long as said; returns what the user must know if something is left.

        May be called again, for what came after.
        """
        self._closing.set()
        if self.is_alive():
            self.join()
        deadline = time.monotonic() + (FINAL_S if for_s is None else for_s)
        pause = 0.5
        while True:
            why = self.deliver()
            runs = len(self._delivery.spool.runs())
            if not runs or time.monotonic() + pause > deadline:
                break
            time.sleep(pause)
            pause *= 2
        self._delivery.close()
        if not runs:
            return None
        return f"records of {runs} runs are still to be delivered: {why or 'another process delivers them'}"

    def _away(self, why: str) -> None:
        if not self._told:
            self._told, self._since, self._records = True, time.monotonic(), 0
            log.warning("MLflow is away: %s", why)
            self._say(
                f"MLflow ({self._where}) does not take records now: {why}; training goes on, and they are kept in "
                f"{self._delivery.spool.folder} until it does"
            )

    def _count(self, done: Delivered) -> None:
        for why in done.rejected:
            log.error("refused by MLflow: %s", why)
            self._say(f"MLflow refuses a record: {why}")
        self._records += done.records
        if self._told and not self._delivery.spool.runs():
            away_s = time.monotonic() - self._since
            self._told = False
            self._say(f"MLflow answers again after {away_s:.0f} s; {self._records} records are delivered")
