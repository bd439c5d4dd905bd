"""What a search has left to do: what dead workers left, what waits, the repeats that are wanted, the test loss."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from search import records
from search.processes import is_gone
from search.storage import lifecycle
from search.verdict.leaders import verdict_of
from search.verdict.tested import is_due
from search.workers import repeats

if TYPE_CHECKING:
    from search.records import TrialRecord
    from search.session.opening import Opened
    from search.storage.lifecycle import Unfinished
    from search.tracking.runs import StudyRuns
    from search.workers.pool import WorkerPool
    from search.workers.protocol import Display


class Left:
    """What the supervisor asks between its looks at the workers."""

    def __init__(self, opened: Opened, runs: StudyRuns, pool: WorkerPool, display: Display) -> None:
        self._opened, self._runs, self._pool, self._display = opened, runs, pool, display

    def __call__(self, blamed: Collection[int]) -> Unfinished:
        """Take up what dead workers left, and say how many trials wait and run.

        Args:
            blamed: Numbers of the trials that their worker's death is put down to.
        """
        study, rules = self._opened.study, self._opened.rules
        gone = lifecycle.requeue_lost(study, is_alive=self._pool.alive, blamed=blamed)
        for lost in gone:
            then = "it is not tried again" if lost.successor is None else f"trial {lost.successor} takes up its work"
            self._display.say(f"trial {lost.number} was lost: {lost.detail}; {then}")
            if lost.run_id is not None:
                self._runs.end(lost.run_id, "KILLED", {"state": "FAIL", "reason": records.LOST})
        if gone:  # a worker may have died before it wrote down which run it had begun
            self._runs.close_dangling(nobody_writes(lambda: lifecycle.read_trials(study)))
        left = lifecycle.unfinished(study, repeats=rules is not None)
        if rules is not None and not left.waiting and not left.running:
            left = replace(left, waiting=len(repeats.wanted(study, rules, self._opened.budget)))
        return left


def nobody_writes(trials: Callable[[], Iterable[TrialRecord]]) -> Callable[[Mapping[str, str]], bool]:
    """Says of a trial's MLflow run, by its tags, whether its process was here and is gone, or its trial was lost.

    Of a process of an earlier boot, or of another host, nothing is known. If it died before it wrote down which run it
    had begun, only the trial's number leads to that run.

    Args:
        trials: Reads the study's, if it comes to that.
    """

    @functools.cache
    def lost() -> frozenset[str]:
        return frozenset(str(t.number) for t in trials() if t.state == "FAIL" and t.reason == records.LOST)

    return lambda tags: is_gone(tags) or (tags.get("kind") == "trial" and tags.get("trial") in lost())


def has_work(opened: Opened, left: Unfinished, test_images: int) -> bool:
    """Whether workers have anything to do: trials, or the test loss, if a search was interrupted before it.

    Args:
        opened: The study.
        left: What waits and runs, repeats that are wanted included.
        test_images: Held-out images that the test loss is taken on; 0 for none.
    """
    study = opened.study
    if left.waiting or left.running or opened.budget.new_left(study.get_trials(deepcopy=False)):
        return True
    if opened.rules is None or not test_images:
        return False
    verdict = verdict_of(lifecycle.read_trials(study), study.user_attrs)
    return verdict is not None and is_due(study.user_attrs, verdict)
