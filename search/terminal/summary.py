"""What the terminal shows about a study as a whole: a line at its start, and a summary at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optuna.trial import TrialState

from search import leaderboard
from search.planning.plan import is_repeat
from search.records import TrialRecord, score_of
from search.result import INTERRUPTED, Result
from search.urls import has_secret, shown
from search.verdict import text
from search.verdict.race import Verdict
from search.workers.protocol import Job

if TYPE_CHECKING:
    import optuna

    from search.places import Places


def headline(job: Job, study: optuna.Study, done: int) -> str:
    """One line about what is about to run; `done` trials count towards the total, waiting ones included."""
    held_back = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
    waiting = sum(not is_repeat(trial) for trial in held_back)
    finished = f", {done - waiting} done" if done - waiting else ""
    held = f", {waiting} waiting" if waiting else ""
    if len(held_back) > waiting:
        held += f", {len(held_back) - waiting} repeats waiting"
    return (
        f"study {study.study_name}: {job.budget.line()}{finished}{held}; "
        f"{len(job.examined.rows)} captioned images; files in {job.folder}"
    )


def study_tags(trials: Sequence[TrialRecord], verdict: Verdict | None = None) -> dict[str, str]:
    """Tags of the study's own MLflow run."""
    best = leaderboard.best(trials)
    tags = {"summary": leaderboard.summary(trials)}
    if best is not None and best.value is not None:
        score = score_of(best.attrs)
        tags["best_trial"] = str(best.number)
        tags |= {"best_val_loss": f"{best.value:.6f}"} if score is None else {"best_cider_d": f"{score:.6f}"}
    return tags if verdict is None else tags | text.tags(verdict)


def sum_up(console: Any, result: Result, places: Places) -> None:
    """Print the leaderboard, the best configuration, where everything lies, and how to look at it."""

    def say(text: str = "") -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    finished = [t for t in result.trials if t.state in ("COMPLETE", "PRUNED", "FAIL")]
    if finished:
        say()
        if console.is_terminal:
            console.print(leaderboard.as_table(finished))
        else:
            say(leaderboard.as_text(finished))
    say()
    say(leaderboard.summary(result.trials))
    chosen = result.winner
    if chosen is not None:
        say(f"\n{leaderboard.named(chosen, result.trials)}")
        say(leaderboard.training_config(chosen.config))
        say(f"\nadapter  {result.adapter}")
    if result.verdict is not None:
        say(f"\nVerdict: {text.sentence(result.verdict)}")
        for line in text.table(result.verdict):
            say(f"  {line}")
        if result.tested is not None:
            say(f"  {result.tested.sentence()}")
        say()
    say(f"files    {result.folder}")
    for path in result.logs:
        if path.suffix == ".md":
            say(f"log      {path}")

    say("\nLook at it:")
    for line in _pages(places):
        say(line)
    failed = leaderboard.all_failed(result.trials)
    if failed:
        say(f"\n{failed}")
    if result.code in INTERRUPTED:
        say("\nInterrupted; the same command continues the study.")
    if result.refused is not None:
        say(f"\nThe winner's adapter is not among MLflow's models: {result.refused}")
    if result.undelivered is not None:
        by_hand = places.command("python", "-m", "search.deliver", "--study", result.study_name)
        say(
            f"\nMLflow did not take everything: {result.undelivered}\n"
            f"The rest is kept in {places.outbox(result.study_name)}; the same command delivers it, as does\n"
            f"  {by_hand}"
        )


def _pages(places: Places) -> Iterator[str]:
    """Commands that open the dashboards, quoted for a shell.

    A URL with a password is in none of them: `search.ui` has it from the environment.
    """
    words = ("python", "-m", "search.ui")
    if has_secret(places.tracking_uri) or has_secret(places.storage_url):
        yield f"  {places.command(*words)}"
        return
    if places.tracking_uri.startswith("http"):
        yield f"  {shown(places.tracking_uri)}"
    else:
        yield f"  {shlex.join(['mlflow', 'ui', '--backend-store-uri', places.tracking_uri])}"
    yield f"  {shlex.join(['optuna-dashboard', '--artifact-dir', str(places.notes), places.storage_url])}"
    yield f"or both at once: {places.command(*words)}"
