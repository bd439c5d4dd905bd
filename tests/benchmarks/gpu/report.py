"""What the check finds: rows, targets and what was not reached, printed at once and kept as JSON after each."""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class Report:
    """A check that ends in order: each part has a share of the time, and each piece says beforehand what it takes."""

    def __init__(
        self,
        budget_s: float,
        file: Path | None,
        machine: Mapping[str, Any],
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
        only: str = "",
    ) -> None:
        self.file = file
        self.machine = dict(machine)
        self.budget_s = budget_s
        self.rows: list[dict[str, Any]] = []
        self.targets: list[dict[str, Any]] = []
        self.not_reached: list[str] = []
        self.failed: list[str] = []
        self._clock = clock
        self._only = re.compile(only)
        self._began = clock() if began is None else began
        self._until = budget_s

    def spent(self) -> float:
        """Seconds since the check began."""
        return self._clock() - self._began

    def part(self, title: str, until: float) -> None:
        """Begin a part, which has until this share of the whole time; what it leaves is the next one's."""
        self._until = until * self.budget_s
        print(f"\n== {title} (until {self._until:.0f} s; {self.spent():.0f} s have passed)", flush=True)

    def left(self) -> float:
        """Seconds left for this part."""
        return self._until - self.spent()

    def run(self, name: str, needs_s: float, piece: Callable[[], T]) -> T | None:
        """A piece of the check; None if there is no time for it, or it failed, which ends nothing else."""
        if not self._only.search(name):
            return None
        if self.left() < needs_s:
            self.not_reached.append(f"{name}: {self.left():.0f} s were left of the part's time, {needs_s:.0f} needed")
            print(f"  not reached: {self.not_reached[-1]}", flush=True)
            self.save()
            return None
        began = self.spent()
        try:
            return piece()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a GPU or a side may raise: the rest goes on
            self.failed.append(f"{name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}")
            print(f"  FAILED {self.failed[-1]}\n{traceback.format_exc(limit=-4)}", flush=True)
            return None
        finally:
            print(f"  ({name}: {self.spent() - began:.1f} s)", flush=True)
            self.save()

    def say(self, name: str, **facts: Any) -> None:
        """A row."""
        self.rows.append({"name": name, **facts})
        told = "  ".join(f"{key} {_short(value)}" for key, value in facts.items() if value is not None)
        print(f"  {name:34s} {told}", flush=True)
        self.save()

    def target(self, name: str, found: float | None, wanted: float, *, at_most: bool = False) -> None:
        """A target and what was found; None where the figures for it are missing."""
        reached = None if found is None else (found <= wanted if at_most else found >= wanted)
        limit = f"{'at most' if at_most else 'at least'} {wanted:g}"
        self.targets.append({"name": name, "found": found, "limit": limit, "reached": reached})
        word = {None: "not measured", True: "reached", False: "MISSED"}[reached]
        if self.machine.get("rehearsal"):
            word = "rehearsed, means nothing"
            self.targets[-1]["reached"] = None
        print(f"  target: {name}: {_short(found)} ({limit}): {word}", flush=True)
        self.save()

    def save(self) -> None:
        """Write everything so far."""
        if self.file is not None:
            self.file.write_text(json.dumps(self.as_json(), indent=1, default=str), encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """Everything so far, as plain data."""
        names = ("machine", "budget_s", "rows", "targets", "not_reached", "failed")
        return {"seconds": round(self.spent(), 1), **{name: getattr(self, name) for name in names}}

    def end(self) -> int:
        """Sum up; 0 if every piece ran and held."""
        wrong = [row["name"] for row in self.rows if row.get("ok") is False]
        missed = [target["name"] for target in self.targets if target["reached"] is False]
        print(f"\n{self.spent():.0f} of {self.budget_s:.0f} s")
        for title, names in (
            ("wrong", wrong),
            ("failed", self.failed),
            ("not reached", self.not_reached),
            ("targets missed", missed),
        ):
            for name in names:
                print(f"{title}: {name}")
        self.save()
        return 1 if wrong or self.failed else 0


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
