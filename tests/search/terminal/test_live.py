"""What the terminal shows of workers' messages, as lines and as a table."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from search import records
from search.planning.budget import Budget
from search.terminal.live import LiveDisplay, Logged, Plain
from search.terminal.pace import Pace, about, left_epochs
from search.verdict.leaders import Rules
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
from tests.support.candidate_trials import repeat, trial
from tests.support.made_up_events import epoch, started, step
from trainer.config import TrainConfig

CONFIG = TrainConfig.parse({"data": "mini", "num_epochs": 2}).model_dump(mode="json")
BEGUN = TrialStarted(number=3, config=CONFIG, label="by hand", resumed_from_epoch=1)
ENDED = TrialEnded(
    number=3, state="COMPLETE", reason="finished", detail="2 epochs done", value=0.3, findings=("ok",), elapsed_s=61
)
FAILED = replace(ENDED, state="FAIL", reason=records.ERROR, detail="the image is truncated")
LOST = replace(FAILED, reason=records.LOST)


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
        FAILED,
        LOST,
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
        "trial 3: epoch 2: Train=0.5000, Val=0.3000  (3.0 s)",
        "trial 3: COMPLETE (finished), best Val=0.3000 in 1:01: 2 epochs done; ok",
        "no [markup] here",
        "a worker failed: out of luck",
    ]


def test_how_far_the_study_is_follows_each_trial() -> None:
    """By the lines of all epochs that were trained here, and by the trials as the database has them."""
    now = [100.0]
    done = [trial(n, 0.4 - n / 100) for n in range(3)]
    pace = Pace(lambda: done, Budget(12), None, lambda: now[0])
    out = io.StringIO()
    with Logged(Plain(Console(file=out, width=300)), pace) as display:
        display(Progress(number=3, event=epoch(1), from_checkpoint=True))
        display(Progress(number=3, event=started()))
        now[0] += 20.0
        for number in range(1, 4):
            display(Progress(number=3, event=epoch(number)))
        display(ENDED)
        said = out.getvalue()
        now[0] += 1e6
        display(LOST)
        assert out.getvalue() == said
    # Nine trials of the six epochs that each of the three took, and 20 s for three epochs.
    assert out.getvalue().splitlines()[-1] == "3 of 12 trials, best 0.3800 (trial 2), about 6 min left"


def test_what_is_left() -> None:
    done = [trial(n, 0.4 + n / 1000) for n in range(4)]
    assert left_epochs(done[:2], Budget(12), None) is None
    assert left_epochs(done, Budget(12), None) == 8 * 6
    begun = trial(4, None, "RUNNING")
    paused = trial(5, 0.5, "WAITING", reason=records.PAUSED)
    assert left_epochs([*done, begun], Budget(12), None) == 8 * 6 - 6
    assert left_epochs([*done, paused], Budget(12), None) == 7 * 6
    # Three blocks of three candidates up to their best epochs, less what their repeats have trained.
    repeats = 3 * 3 * 4
    assert left_epochs(done, Budget(4), Rules()) == repeats
    assert left_epochs(done, Budget(30, epochs=30), None) == 30 - 4 * 6  # all that the budget still has
    assert left_epochs([*done, repeat(4, 0, 1, 0.4)], Budget(4), Rules()) == repeats - 6


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (5, "less than a minute"),
        (170, "about 3 min"),
        (5000, "about 83 min"),
        (9000, "about 2.5 h"),
        (1e5, "about 28 h"),
    ],
)
def test_estimates_are_as_exact_as_they_can_be(seconds: float, said: str) -> None:
    assert about(seconds) == said


def shown(display: LiveDisplay) -> str:
    """The tables as text, each run of blanks as one."""
    out = io.StringIO()
    Console(file=out, width=200).print(display._view())
    return " ".join(out.getvalue().split())


def test_a_row_of_the_table() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    with LiveDisplay(console, lambda: ()) as display:
        display(Progress(number=9, event=step(1)))  # a trial whose start was not seen
        display(BEGUN)
        assert "3 0/2 - - - 2e-4 " in shown(display)
        display(Progress(number=3, event=epoch(1), from_checkpoint=True))
        display(Progress(number=3, event=started(total_steps=8)))
        assert "3 1/2 4/8 0.5000 0.4000 2e-4 " in shown(display)
        display(Progress(number=3, event=step(5, epoch=2)))
        assert "3 2/2 5/8 0.5000 0.4000 2e-4 8 16 " in shown(display)
        assert display._running[3].left_s() is None, "an epoch from the checkpoint says nothing of the pace"
        display(Progress(number=3, event=epoch(2, val_loss=0.3)))
        assert "3 2/2 8/8 0.5000 0.3000 2e-4 " in shown(display) and display._running[3].left_s() == 0
        display(ENDED)
        assert "3 2/2" not in shown(display)
        display(BEGUN)
        display(FAILED)
        display(LOST)
        assert "Running trial epoch step" in shown(display) and not display._running
        assert "FAIL" not in out.getvalue() and out.getvalue().count("trial 3") == 1, "a notice says it"
        display.progress("9 of 12 trials")
        assert "Running: 9 of 12 trials" in shown(display)
