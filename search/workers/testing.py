"""The last thing that a study's workers do: the test loss of the verdict's candidates."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from search import leaderboard
from search.errors import DatabaseAway
from search.evaluation import held_out
from search.evaluation.candidates import has_adapter
from search.evaluation.rows import Chosen, choose_rows, configs_of
from search.storage import lifecycle
from search.tracking.outbox import Point
from search.verdict import tested
from search.verdict.leaders import judge
from search.workers.captioning import choose
from search.workers.protocol import Link, Notice, Order
from trainer.common.errors import UserError
from trainer.config import TrainConfig
from trainer.held_out import loss_sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    import optuna

    from search.records import TrialRecord
    from search.tracking.runs import StudyRuns
    from search.verdict.race import Verdict
    from search.workers.protocol import Job
    from trainer.workbench import Workbench

log = logging.getLogger("search.workers.testing")


class Testing:
    """Judges the candidates once the study has nothing left to train. Workers that find this at the same time come to
    the same: they all judge, which costs an idle GPU, and no lock is held meanwhile."""

    __test__ = False  # pytest takes it for a test

    def __init__(self, study: optuna.Study, job: Job, bench: Workbench, runs: StudyRuns, link: Link) -> None:
        self._study, self._job, self._bench, self._runs, self._link = study, job, bench, runs, link
        self._over = job.confirm is None or job.test_images == 0

    def test(self) -> None:
        """Judge them if it is time to, and if it has not been done. Fails with the database alone."""
        if self._over:
            return
        left = lifecycle.unfinished(self._study)
        if left.waiting or left.running:
            return
        try:
            self._over = self._test()
        except DatabaseAway:
            raise
        except _Ended:
            return
        except Exception as error:
            self._over = True
            log.exception("no test losses")
            if isinstance(error, UserError):
                self._link.send(Notice(text=f"no test losses: {error}"))

    def _test(self) -> bool:
        """Judge the candidates; False if there is no verdict yet."""
        assert self._job.confirm is not None
        trials = lifecycle.read_trials(self._study)
        verdict = judge(trials, self._job.confirm)
        if verdict.kind == "running":
            return False
        candidates = self._candidates(trials, verdict)
        rows = self._rows(configs_of(candidates)) if candidates else None
        if rows is None:
            self._study.set_user_attr(tested.ATTRIBUTE, dict(tested.NOTHING))
            return True
        if self._is_done(rows, candidates, verdict):
            return True
        sums = {}
        for trial in candidates:
            adapter = leaderboard.adapter(self._job.folder, trial)
            config = TrainConfig.parse(trial.config)
            sums[trial.number] = loss_sums(self._bench, config, adapter, rows.rows, self._alive)
        found = held_out.judged(rows, {t.number: t.best_epoch or 0 for t in candidates}, sums)
        now = time.time_ns() // 1_000_000
        self._study.set_user_attr(tested.ATTRIBUTE, replace(found, read_s=now / 1000).to_dict())
        losses = {each.trial: each.loss for each in found.losses}
        for trial in candidates:
            if trial.run_id is not None:
                tags = {tested.METRIC: f"{rows.where}; fingerprint {rows.fingerprint}"}
                point = Point(tested.METRIC, losses[trial.number], trial.best_epoch or 1, now)
                self._runs.add(trial.run_id, [point], tags)
        return True

    def _candidates(self, trials: tuple[TrialRecord, ...], verdict: Verdict) -> list[TrialRecord]:
        """Those of the verdict that have an adapter, the one that it names first."""
        numbers = [standing.number for standing in verdict.standings]
        if verdict.choice is not None:
            numbers = [verdict.choice, *(number for number in numbers if number != verdict.choice)]
        by_number = {trial.number: trial for trial in trials}
        return [t for number in numbers if has_adapter(t := by_number[number], self._job.folder)]

    def _rows(self, configs: Mapping[int, TrainConfig]) -> Chosen | None:
        """Test rows, or rows that the candidates left out; None where there are none."""
        rows = choose_rows(configs, None, "auto")
        if rows.name not in ("test", "unused"):
            return None
        if len(rows.rows) <= self._job.test_images:
            return rows
        some = tuple(choose(rows.rows, self._job.test_images, next(iter(configs.values())).split_seed))
        return replace(rows, rows=some, where=f"{len(some)} of {rows.where}")

    def _is_done(self, rows: Chosen, candidates: list[TrialRecord], verdict: Verdict) -> bool:
        known = tested.TestLosses.of(self._study.user_attrs, verdict)
        asked = [(trial.number, trial.best_epoch) for trial in candidates]
        return (
            known is not None
            and (known.fingerprint, known.images) == (rows.fingerprint, len(rows.rows))
            and [(each.trial, each.epoch) for each in known.losses] == asked
        )

    def _alive(self) -> None:
        self._link.alive()
        if self._link.order() != Order.GO_ON:
            raise _Ended


class _Ended(Exception):
    """The worker is to end; the next search judges them (`search.session`)."""
