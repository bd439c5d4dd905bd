"""What the terminal shows while a search runs: a live table, or plain lines where the output is piped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from search import leaderboard
from search.records import LOST, TrialRecord
from search.terminal.pace import Pace
from search.workers.protocol import (
    Alive,
    Display,
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
from trainer.events import EpochEnded, RunStarted, StepEnded

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

log = logging.getLogger("search.terminal")

SHOWN = ("learning_rate", "lora_r", "lora_alpha", "lora_dropout", "batch_size", "warmup_steps")
"""Of a trial's configuration: what the hand-run log tunes."""
SHOWN_ON_TERMINAL = 8
"""Rows of the leaderboard in the live view; the whole of it is printed at the end."""


@dataclass
class Running:
    """A trial in progress, as far as its messages say."""

    number: int
    num_epochs: int
    config: dict[str, Any]
    epoch: int = 0
    step: int = 0
    total_steps: int = 0
    train_loss: float | None = None
    val_loss: float | None = None
    epoch_seconds: list[float] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    since: float = field(default_factory=time.monotonic)
    """When the epoch in progress began."""

    def take(self, event: RunStarted | StepEnded | EpochEnded, *, from_checkpoint: bool) -> None:
        """Take an event of its training in."""
        match event:
            case RunStarted():
                self.total_steps = event.total_steps
            case StepEnded():
                self.step, self.epoch = event.step, event.epoch
                self.train_loss = event.loss
            case EpochEnded():
                self.step, self.epoch = event.step, event.epoch
                self.train_loss, self.val_loss = event.train_loss, event.val_loss
                now = time.monotonic()
                if not from_checkpoint:  # by the clock: an epoch's own seconds are its share of a pass
                    self.epoch_seconds.append(now - self.since)
                self.since = now

    def left_s(self) -> float | None:
        """Seconds left by the pace of its epochs so far; None before the first."""
        if not self.epoch_seconds:
            return None
        pace = sum(self.epoch_seconds) / len(self.epoch_seconds)
        done = self.step / self.total_steps * self.num_epochs if self.total_steps else self.epoch
        return max(0.0, pace * (self.num_epochs - done))


class Logged:
    """Shows messages and keeps each line in search.log too: there they are if the terminal or pipe goes away."""

    def __init__(self, display: Display, pace: Pace) -> None:
        self._display, self._pace = display, pace

    def __enter__(self) -> Logged:
        self._display.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._display.__exit__(*exception)

    def say(self, text: str) -> None:
        """Show a line, and keep it."""
        log.info("%s", text)
        self._display.say(text)

    def __call__(self, message: Message) -> None:
        """Show a worker's message, and keep its line."""
        text = line(message)
        if text:
            log.info("%s", text)
        self._pace.take(message)
        self._display(message)
        if isinstance(message, TrialEnded) and _is_news(message) and (progress := self._pace.line()):
            log.info("%s", progress)
            self._display.progress(progress)

    def progress(self, text: str) -> None:
        """Show how far the study is."""
        self._display.progress(text)

    def refresh(self) -> None:
        """Pass it on."""
        self._display.refresh()


class Plain:
    """One line for each event."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, message: Message) -> None:
        """Show a worker's message."""
        text = line(message)
        if text:
            self.say(text)

    def progress(self, text: str) -> None:
        """Print how far the study is."""
        self.say(text)

    def refresh(self) -> None:
        """Do nothing: plain output does not move."""


class LiveDisplay:
    """A table of the running trials above the leaderboard, redrawn in place; lines scroll above it."""

    def __init__(self, console: Console, read: Callable[[], Sequence[TrialRecord]]) -> None:
        from rich.live import Live

        self.console = console
        self._read = read
        self._trials: Sequence[TrialRecord] = ()
        self._running: dict[int, Running] = {}
        self._progress = ""
        self._live: Live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> LiveDisplay:
        self._trials = self._read()
        self._live.start()
        self.refresh()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def say(self, text: str) -> None:
        """Print a line above the tables."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __call__(self, message: Message) -> None:
        """Take a worker's message in."""
        match message:
            case TrialStarted():
                self._running[message.number] = Running(message.number, message.config["num_epochs"], message.config)
            case Progress() if message.number in self._running:
                self._running[message.number].take(message.event, from_checkpoint=message.from_checkpoint)
            case TrialEnded():
                self._running.pop(message.number, None)
                if _is_news(message):
                    self._trials = self._read()
                if text := line(message):
                    self.say(text)
            case Notice() | WorkerFailed() | Loading() | SlotsChosen():
                self.say(line(message))
        self.refresh()

    def progress(self, text: str) -> None:
        """Show how far the study is, above the tables."""
        self._progress = text

    def refresh(self) -> None:
        """Redraw, so that clocks move on."""
        self._live.update(self._view(), refresh=True)

    def _view(self) -> Group:
        from rich.console import Group
        from rich.table import Table

        title = f"Running: {self._progress}" if self._progress else "Running"
        table = Table(title=title, title_justify="left", header_style="bold", box=None, padding=(0, 1))
        heads = ("trial", "epoch", "step", "train", "val", "lr", "r", "alpha", "drop", "batch", "warm", "time", "left")
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
        for running in self._running.values():
            config = running.config
            table.add_row(
                str(running.number),
                f"{running.epoch}/{running.num_epochs}",
                f"{running.step}/{running.total_steps}" if running.total_steps else "-",
                _loss(running.train_loss),
                _loss(running.val_loss),
                *(leaderboard.show_value(name, config[name]) for name in SHOWN),
                clock(time.monotonic() - running.began),
                clock(running.left_s()),
            )
        done = [t for t in self._trials if t.state in ("COMPLETE", "PRUNED", "FAIL")]
        parts: list[Any] = [table]
        if done:
            parts.append(leaderboard.as_table(done, limit=SHOWN_ON_TERMINAL))
        return Group(*parts)


def _is_news(ended: TrialEnded) -> bool:
    """Whether the study is a trial further. Not so if one is lost, and then its database may be away."""
    return ended.reason != LOST


def clock(seconds: float | None) -> str:
    """`1:02:03`, `2:03`, or `-`."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def line(message: Message) -> str:
    """A message as one line; empty for those that only the live view shows."""
    match message:
        case Loading():
            return f"loading {message.what}"
        case SlotsChosen():
            auto = " (--slots auto)" if message.auto else ""
            if message.most == 1:
                return f"one trial at a time{auto}"
            filled = f", until a pass has {message.samples:.0f} samples" if message.auto else ""
            return f"up to {message.most} trials train at once on one base{filled}{auto}"
        case TrialStarted():
            values = ", ".join(f"{name}={leaderboard.show_value(name, message.config[name])}" for name in SHOWN)
            label = f" ({message.label})" if message.label else ""
            resumed = f", resumed after epoch {message.resumed_from_epoch}" if message.resumed_from_epoch else ""
            return f"trial {message.number}{label}: {values}{resumed}"
        case Progress(event=EpochEnded() as epoch) if not message.from_checkpoint:
            return (
                f"trial {message.number}: epoch {epoch.epoch}: Train={epoch.train_loss:.4f}, "
                f"Val={epoch.val_loss:.4f}  ({epoch.timing.epoch_s:.1f} s)"
            )
        case TrialEnded(state="FAIL"):  # there was a notice
            return ""
        case TrialEnded():
            value = "" if message.value is None else f", best Val={message.value:.4f}"
            found = f"; {', '.join(message.findings)}" if message.findings else ""
            return (
                f"trial {message.number}: {message.state} ({message.reason}){value} "
                f"in {clock(message.elapsed_s)}: {message.detail}{found}"
            )
        case Notice():
            return message.text
        case WorkerFailed():
            return f"a worker failed: {message.text}"
        case Progress() | Idle() | Alive():
            return ""
