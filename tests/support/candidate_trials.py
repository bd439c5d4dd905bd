"""Trials of a search and repeats of them, as the verdict reads them: six epochs each, the fourth the best."""

from __future__ import annotations

from typing import Any

from search import records
from search.records import TrialRecord

BASE = {"seed": 42, "split_seed": 0, "lora_r": 8, "target_modules": ["query"], "lr_scheduler_type": "linear"}


def trial(
    number: int, value: float | None, state: str = "COMPLETE", *, best_epoch: int = 4, **more: Any
) -> TrialRecord:
    attrs = {records.TRAIN_LOSSES: [1.0] * 6, **more.pop("attrs", {})}
    config = {**BASE, "learning_rate": (number + 1) * 1e-4, **more.pop("config", {})}
    return TrialRecord(
        number=number,
        state=state,
        value=value,
        params={},
        config=config,
        reason=more.pop("reason", records.FINISHED),
        detail=None,
        best_epoch=best_epoch,
        stopped_early=False,
        attrs=attrs,
        violated=more.pop("violated", ()),
        start_s=None,
        end_s=None,
        run_id=None,
    )


def repeat(number: int, of: int, block: int, value: float | None, **more: Any) -> TrialRecord:
    attrs = {records.REPEAT_OF: of, records.BLOCK: block, records.TRAINS_TO: 4, **more.pop("attrs", {})}
    return trial(number, value, more.pop("state", "PRUNED"), attrs=attrs, reason=more.pop("reason", records.REPEAT))
