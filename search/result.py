"""What a search came to, for programs and for the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from search.leaderboard import adapter, best
from search.records import TrialRecord
from search.verdict.leaders import winner
from search.verdict.race import Verdict
from search.verdict.tested import TestLosses

INTERRUPTED = (129, 130, 143)
"""Exit codes after SIGHUP, Ctrl-C and SIGTERM."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a search came to."""

    code: int
    """Exit code: 0 done, 1 a fault, 2 wrong input, 75 the database is away, 129, 130 or 143 interrupted."""
    study_name: str
    """Optuna's, which tells generations apart."""
    trials: tuple[TrialRecord, ...]
    logs: tuple[Path, ...]
    """The tuning log's files; empty if it could not be written."""
    folder: Path
    """Where the study's files lie."""
    verdict: Verdict | None = None
    """What the repeats of the leaders say; None if none were asked for."""
    tested: TestLosses | None = None
    """The test loss of the verdict's candidates; None where it was not read."""
    undelivered: str | None = None
    """What MLflow has not taken yet, None if it has all."""
    refused: str | None = None
    """Why the winner's adapter is not among MLflow's models, None if it is or nobody has won."""

    @property
    def best(self) -> TrialRecord | None:
        """The completed trial with the lowest validation loss, or the highest CIDEr-D if the study ranks by it."""
        return best(self.trials)

    @property
    def winner(self) -> TrialRecord | None:
        """The trial that the verdict names, else the best."""
        return winner(self.trials, self.verdict)

    @property
    def adapter(self) -> Path | None:
        """Folder of the winner's adapter, in PEFT's format."""
        return None if self.winner is None else adapter(self.folder, self.winner)
