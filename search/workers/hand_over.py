"""Handing trials over: a worker that has several gives half of them to one that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.events import CheckpointSaved

if TYPE_CHECKING:
    from search.workers.protocol import Link
    from search.workers.trial import TrialRun
    from trainer.events import Event
    from trainer.loop import RunError

WORTH_MOVING_S = 2.0
"""A trial with less than this left to train is not handed over: resuming elsewhere takes half a second."""


class HandingOver:
    """Which of a worker's trials are still to be handed over, each after its epoch."""

    def __init__(self, link: Link) -> None:
        self.left = 0
        """Trials still to be handed over."""
        self._link = link

    def includes(self, run: TrialRun, happening: Event | RunError, running: int) -> bool:
        """Whether this trial is handed over now, from the checkpoint just written.

        Args:
            running: Trials that the worker has, this one included.
        """
        if self._link.share:
            self._link.share = False
            self.left = running // 2
        if not self.left or running < 2 or not isinstance(happening, CheckpointSaved):
            return False
        if run.left_s() < WORTH_MOVING_S:
            return False
        self.left -= 1
        return True

    def cancel(self) -> None:
        """There are trials for whoever is idle: no one waits for this worker's any more."""
        self.left = 0
