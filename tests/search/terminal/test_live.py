"""What the terminal shows of workers' messages, as lines and as a table."""

from __future__ import annotations

import io

from rich.console import Console

from search.terminal.live import LiveDisplay, Plain
from search.workers.protocol import (
    Alive,
    Idle,
    Loading,
    Message,
    Notice,
    Progress,
    SlotsChosen,
    TrialEnded,
    TrialStarted,
    WorkerFailed,
)
from tests.support.made_up_events import epoch, started, step
from trainer.config import TrainConfig

CONFIG = TrainConfig.parse({"data": "mini", "num_epochs": 2}).model_dump(mode="json")
BEGUN = TrialStarted(number=3, config=CONFIG, label="by hand", resumed_from_epoch=1)
ENDED = TrialEnded(
    number=3, state="COMPLETE", reason="finished", detail="2 epochs done", value=0.3, findings=("ok",), elapsed_s=61
)


def test_lines() -> None:
    messages: list[Message] = [
        Loading(what="mini"),
        SlotsChosen(most=1, samples=8, auto=True),
        SlotsChosen(most=4, samples=33.3, auto=True),
        BEGUN,
        Progress(number=3, event=epoch(1), from_checkpoint=True),
        Progress(number=3, event=started()),
        Progress(number=3, event=step(5)),
        Alive(),
        Idle(),
        Progress(number=3, event=epoch(2, val_loss=0.3)),
        ENDED,
        Notice(text="no [markup] here"),
        WorkerFailed(text="out of luck", user=False),
    ]
    out = io.StringIO()
    with Plain(Console(file=out, width=300)) as display:
        for message in messages:
            display(message)
        display.refresh()
    lines = out.getvalue().splitlines()
    assert lines[:3] == [
        "loading mini",
        "one trial at a time (--slots auto)",
        "up to 4 trials train at once on one base, until a pass has 33 samples (--slots auto)",
    ]
    assert lines[3].startswith("trial 3 (by hand): learning_rate=") and lines[3].endswith(", resumed after epoch 1")
    assert lines[4:] == [
        "trial 3: epoch 1: Train=0.5000, Val=0.4000  (3.0 s)  (from the checkpoint)",
        "trial 3: epoch 2: Train=0.5000, Val=0.3000  (3.0 s)",
        "trial 3: COMPLETE (finished), best Val=0.3000 in 1:01: 2 epochs done; ok",
        "no [markup] here",
        "a worker failed: out of luck",
    ]


def shown(display: LiveDisplay) -> str:
    """The tables as text, each run of blanks as one."""
    out = io.StringIO()
    Console(file=out, width=200).print(display._view())
    return " ".join(out.getvalue().split())


def test_a_row_of_the_table() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=200)
    with LiveDisplay(console, lambda: ()) as display:
        display(Progress(number=9, event=step(1)))  # a trial whose start was not seen
        display(BEGUN)
        assert "3 0/2 - - - - " in shown(display)
        display(Progress(number=3, event=epoch(1), from_checkpoint=True))
        display(Progress(number=3, event=started(total_steps=8)))
        assert "3 1/2 4/8 0.5000 0.4000 - " in shown(display)
        display(Progress(number=3, event=step(5, epoch=2)))
        assert "3 2/2 5/8 0.5000 0.4000 1.0e-03 " in shown(display)
        assert display._running[3].left_s() is None, "an epoch from the checkpoint says nothing of the pace"
        display(Progress(number=3, event=epoch(2, val_loss=0.3)))
        assert "3 2/2 8/8 0.5000 0.3000 1.0e-03 " in shown(display) and display._running[3].left_s() == 0
        display(ENDED)
        assert "3 2/2" not in shown(display)
