"""What the terminal shows about a study as a whole: a line at its start, and a summary at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import leaderboard
from search.options import ARTIFACTS
from search.records import TrialRecord
from search.urls import shown
from search.workers.protocol import Job

if TYPE_CHECKING:
    import optuna


def undelivered(why: str, job: Job) -> str:
    """Says that MLflow lacks something, and how to deliver it once MLflow answers."""
    options = f" --runs-dir {job.runs_dir}" if job.runs_dir != Path("runs") else ""
    by_hand = f"python -m search.deliver --study {job.study_name}{options}"
    return (
        f"\nMLflow did not take everything: {why}\nThe rest is kept in {job.folder / 'spool'}; the same command "
        f"delivers it, as does `{by_hand}` with the same --tracking-uri"
    )


def headline(job: Job, study: optuna.Study, done: int, waiting: int) -> str:
    """One line about what is about to run."""
    finished = f", {done - waiting} done" if done - waiting else ""
    held = f", {waiting} waiting" if waiting else ""
    return (
        f"study {study.study_name}: {job.n_trials} trials{finished}{held}; "
        f"{len(job.examined.rows)} captioned images; files in {job.folder}"
    )


def study_tags(trials: Sequence[TrialRecord]) -> dict[str, str]:
    """Tags of the study's own MLflow run."""
    best = leaderboard.best(trials)
    tags = {"summary": leaderboard.summary(trials)}
    if best is not None and best.value is not None:
        tags |= {"best_trial": str(best.number), "best_val_loss": f"{best.value:.6f}"}
    return tags


def sum_up(console: Any, trials: Sequence[TrialRecord], job: Job, code: int, logs: Sequence[Path]) -> None:
    """Print the leaderboard, the best configuration, where everything lies, and how to look at it."""

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    finished = [t for t in trials if t.state in ("COMPLETE", "PRUNED", "FAIL")]
    if finished:
        say()
        if console.is_terminal:
            console.print(leaderboard.as_table(finished))
        else:
            say(leaderboard.as_text(finished))
    say()
    say(leaderboard.summary(trials))
    best = leaderboard.best(trials)
    if best is not None:
        say(f"\nBest: trial {best.number}, validation loss {best.value:.4f} at epoch {best.best_epoch}")
        say(leaderboard.training_config(best.config))
        folder = job.folder / best.attrs["folder"] / "checkpoints" / f"epoch-{best.best_epoch:04d}" / "adapter"
        say(f"\nadapter  {folder}")
    say(f"files    {job.folder}")
    options = f" --runs-dir {job.runs_dir}" if job.runs_dir != Path("runs") else ""
    for path in logs:
        if path.suffix == ".md":
            say(f"log      {path}")
    say("\nLook at it:")
    say(f"  mlflow ui --backend-store-uri {shown(job.tracking_uri)}")
    say(f"  optuna-dashboard --artifact-dir {job.runs_dir / ARTIFACTS} {shown(job.storage_url)}")
    say(f"or both at once: python -m search.ui{options}")
    if code in (130, 143):
        say("\ninterrupted; the same command continues the study")
