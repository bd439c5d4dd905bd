"""Calling the command lines in this process (`tests.support.called`), up to where workers would get their job."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from tests.support.called import Outcome, Started, call
from tests.support.near_probe import NearProbe
from trainer.data import dataset
from trainer.data.dataset import Examined


def search(arguments: Sequence[str]) -> Outcome:
    """`python -m search.run`, without worker processes: where they would get their job it ends as accepted."""
    from search import run

    run._session = None
    return call(run.app, arguments, run.log_file)


@contextmanager
def no_workers() -> Iterator[None]:
    """No processes, no tuning log, the embedded data examined once."""
    from search import preflight
    from search.report import keeper
    from search.workers import executor, supervisor

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(executor, "WorkerPool", _Pool)
        patch.setattr(supervisor, "Supervisor", _start)
        patch.setattr(keeper, "LogKeeper", _Keeper)
        patch.setattr(dataset, "examine", _examine)
        patch.setattr(preflight, "Probe", NearProbe)
        yield


_real_examine = dataset.examine


@cache
def _embedded() -> Examined:
    return _real_examine("mini")


def _examine(data: str, *more: Any, **named: Any) -> Examined:
    return _embedded() if data == "mini" else _real_examine(data, *more, **named)


def _start(*_: Any, **__: Any) -> None:
    raise Started


class _Pool:
    def __init__(self, size: int, threads: int, *_: object) -> None:
        self.size, self.threads = size, threads

    def alive(self, worker: object) -> None:
        """Nothing is known."""

    def importing(self) -> AbstractContextManager[None]:
        """Nothing is imported."""
        return nullcontext()

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _Keeper:
    due = None

    def __init__(self, *_: Any) -> None:
        pass

    def start(self) -> None:
        pass


@contextmanager
def folder() -> Iterator[Path]:
    """A new folder for one example: pytest's are one a test."""
    with tempfile.TemporaryDirectory(prefix="bad-input-") as name:
        yield Path(name)


def written(runs: Path) -> list[str]:
    """What lies in a runs folder, below it included."""
    return sorted(str(path.relative_to(runs)) for path in runs.rglob("*")) if runs.exists() else []


DEEP = bool(os.environ.get("BAD_INPUT_DEEP"))
"""Many more examples, others each time: set by test_deep.py."""


def examples(quick: int, deep_factor: int = 20) -> settings:
    """Hypothesis's settings: few examples and always the same ones, unless DEEP."""
    return settings(
        max_examples=quick * deep_factor if DEEP else quick,
        derandomize=not DEEP,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def argument(text: str) -> bool:
    """Whether a shell can hand the text to a program."""
    return "\0" not in text and len(text) < 100_000


def plain(text: str) -> tuple[str, ...]:
    """The beginning of a text, where a message shows it as it is."""
    begin = text[:30]
    return (begin,) if begin.strip() and begin.isprintable() and not set(begin) & set("'\"\\") else ()


ODD = ("", " ", "x" * 5000, "é☃漢字", "\u2028", "\udcff", "../..", "/", "~nobody", "%s", "{0}", "'\"`$()", "nan", "-1")
"""Texts that break programs."""
TEXT = st.text(max_size=30).filter(argument) | st.sampled_from(ODD)
