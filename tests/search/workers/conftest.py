"""A worker in this process, on a study of a few quick trials."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from search.places import Places
from search.planning.budget import Budget
from search.records import TrialRecord
from search.space import Float, Int
from search.storage import lifecycle
from search.storage import studies as store
from search.storage.database import close_storage, open_storage
from search.study import Study
from search.tracking.client import open_tracking
from search.verdict.leaders import Rules
from search.workers.protocol import (
    Idle,
    Job,
    Message,
    Order,
    Progress,
)
from search.workers.worker import Worker
from trainer import workbench
from trainer.events import EpochEnded
from trainer.model.base import Base, load_base


class RecordingLink:
    """A worker's link that keeps its messages, and orders an end once it has nothing to do."""

    def __init__(self, share_after: int | None = None) -> None:
        self.heard: list[Message] = []
        self.share = self.look = False
        self.share_after = share_after
        """Epochs after which half of the trials are wanted elsewhere."""

    def send(self, message: Message) -> None:
        self.heard.append(message)
        if is_epoch(message) and self.share_after is not None:
            self.share_after -= 1
            self.share = self.share_after == 0

    def alive(self) -> None:
        """Do nothing: no supervisor watches."""

    def order(self) -> Order:
        return Order.END_AFTER_EPOCH if any(isinstance(message, Idle) for message in self.heard) else Order.GO_ON

    def wait(self, timeout_s: float) -> None:
        """Do nothing: nothing will come."""


def is_epoch(message: Message) -> bool:
    """Whether it reports an epoch."""
    return isinstance(message, Progress) and isinstance(message.event, EpochEnded)


Search = Callable[..., tuple[tuple[TrialRecord, ...], list[Message]]]


_bases: dict[tuple[Any, ...], Base] = {}


@pytest.fixture
def one_base(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model is loaded once a process, as by a worker that goes on: 0.3 s for each search otherwise."""

    def load(name: str, **how: Any) -> Base:
        if name != str(tiny_checkpoint):
            return load_base(name, **how)
        key = (name, *sorted((option, str(value)) for option, value in how.items()))
        if key not in _bases:
            _bases[key] = load_base(name, **how)
        return _bases[key]

    monkeypatch.setattr(workbench, "load_base", load)


@pytest.fixture
def search(
    tiny_checkpoint: Path, one_base: None, embedded: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> Search:
    """`search(trials=4, slots=2)`: the trials, and the worker's messages."""

    def run(
        trials: int = 4,
        slots: int | None = 4,
        fails: type[Exception] | None = None,
        where: str = "runs",
        share_after: int | None = None,
        one_by_one: int = 0,
        redefined: bool = False,
        confirm: Rules | None = None,
        strategy: str = "joint",
        pruner: str = "none",
        captions: int = 0,
        test_images: int = 0,
        epochs: int | None = None,
        screen: Any = None,
        objective: Any = "loss",
        prepare: Callable[[optuna.Study], None] = lambda study: None,
        **base: Any,
    ) -> Any:
        runs = tmp_path / where
        runs.mkdir(exist_ok=True)
        fixed = {"max_samples": 16, "num_epochs": 2, "warmup_steps": 0, "lora_dropout": 0.1, "device": "cpu"}
        study = Study(
            name="work",
            description="a few quick trials",
            base={"model": str(tiny_checkpoint), "data": "mini", "batch_size": 4, **fixed, **base},
            space={"learning_rate": Float(1e-4, 1e-2, log=True), "lora_r": Int(2, 8)},
            n_trials=trials,
            screen=screen,
            objective=objective,
        )
        urls = [f"sqlite:///{runs / name}" for name in ("optuna.db", "mlflow.db")]
        storage = open_storage(urls[0])
        opened = store.open_study(storage, study)
        if redefined:  # by another search, in the moment before this one asks for its first trial
            opened.set_user_attr(store.DEFINITION, {**opened.user_attrs[store.DEFINITION], "seed": 7})
        prepare(opened)
        tracking = open_tracking(urls[1], runs / "artifacts")
        tracking.experiment("work")
        tracking.parent_run("work", {})
        job = Job(
            study=study,
            study_name="work",
            places=Places.of(runs, urls[0], urls[1]),
            budget=Budget(trials, epochs, each=study.base_config().num_epochs),
            strategy=strategy,
            pruner=pruner,
            examined=embedded,
            threads=1,
            slots=slots,
            captions=captions,
            test_images=test_images,
            one_by_one=one_by_one,
            confirm=confirm,
        )
        link = RecordingLink(share_after)
        worker = Worker(job, link)  # type: ignore[arg-type]  # it has what a worker uses of one
        request.addfinalizer(lambda: (close_storage(storage), close_storage(worker.storage)))
        if fails is None:
            worker.run()
        else:
            with pytest.raises(fails):
                worker.run()
        assert not worker._running
        return lifecycle.read_trials(opened), link.heard

    return run
