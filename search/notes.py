"""What optuna-dashboard shows beside its charts: a note with findings, plot and link for each trial, a summary.

optuna-dashboard renders notes as Markdown; whatever comes from data or study files is escaped.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact
from optuna_dashboard import save_note
from optuna_dashboard.artifact import get_artifact_path

from search import leaderboard
from search.diagnosis import Finding, leaf, messages
from search.mlflow_uri import run_page
from search.opening import ARTIFACTS
from search.records import EpochRecord, TrialRecord
from search.report.render import escape

if TYPE_CHECKING:
    from search.trial import Outcome

LOCAL_MLFLOW = "http://127.0.0.1:5000"
"""Where `python -m search.ui` serves a database's MLflow pages unless told otherwise."""


def annotate_trial(
    trial: optuna.Trial,
    *,
    runs_dir: Path,
    outcome: Outcome,
    findings: Sequence[Finding],
    epochs: Sequence[EpochRecord],
    config: dict[str, Any],
    run: tuple[str, str, str],
) -> None:
    """Write a trial's note and keep its plot as an artifact. To be called before the trial is told.

    Args:
        runs_dir: Artifacts go to `ARTIFACTS` below it.
        run: (address of MLflow's pages, experiment id, run id).
    """
    plot = ""
    if epochs:
        plot = _keep(trial, runs_dir, loss_curve(epochs, trial.number), f"trial-{trial.number:03d}-losses.png")
        best = min((e.val_loss for e in epochs if e.val_loss is not None), default=None)
        seen = "" if best is None else f", lowest validation loss {best:.4f}"
        plot = f"![Losses of {len(epochs)} epochs{seen}]({plot})"
    end = leaf(findings)
    lines = [f"**{outcome.state}** ({outcome.reason}): {escape(outcome.detail)}", ""]
    for finding in findings:
        lines.append(f"- **{messages.title(finding.id)}** (`{finding.id}`): {escape(messages.sentence(finding))}")
        cause = messages.cause(finding)
        if cause:
            lines.append(f"  - cause: {escape(cause)}")
        lines += [f"  - advice: {escape(text)}" for text in messages.advices(finding.advice)]
    lines += ["", f"Decision tree: {escape(messages.leaf_text(end))}", ""]
    address, experiment_id, run_id = run
    lines += [plot, "", f"[Curves in MLflow]({run_page(address, experiment_id, run_id)})", ""]
    lines += ["```python", leaderboard.training_config(config), "```"]
    save_note(trial, "\n".join(lines))


def annotate_study(study: optuna.Study, trials: Sequence[TrialRecord], runs_page: str, log: Path) -> None:
    """Write the study's note: where it stands, its best configuration, where its log lies."""
    lines = [escape(leaderboard.summary(trials)), ""]
    best = leaderboard.best(trials)
    if best is not None:
        where = f"trial {best.number}, validation loss {best.value:.4f} at epoch {best.best_epoch}"
        lines += [f"**Best: {where}**", "", "```python", leaderboard.training_config(best.config), "```", ""]
    heads, rows = leaderboard.rows([t for t in trials if t.state in ("COMPLETE", "PRUNED", "FAIL")])
    if rows:
        lines.append("| " + " | ".join(escape(head) for head in heads) + " |")
        lines.append("|" + "---|" * len(heads))
        lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows[:20]]
        lines.append("")
    lines += [f"[All curves in MLflow]({runs_page})", "", f"Tuning log: `{log}`"]
    save_note(study, "\n".join(lines))


def pages_of(tracking_uri: str) -> str:
    """Address of the pages that show this store: the server itself, or search.ui's for a database."""
    from search.mlflow_uri import masked

    return masked(tracking_uri) if tracking_uri.startswith("http") else LOCAL_MLFLOW


def loss_curve(epochs: Sequence[EpochRecord], number: int) -> bytes:
    """PNG of a trial's training and validation loss by epoch, the best epoch marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, values, style in (
        ("training", [e.train_loss for e in epochs], "s--"),
        ("validation", [e.val_loss for e in epochs], "o-"),
    ):
        known = [(e.epoch, value) for e, value in zip(epochs, values, strict=True) if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), style, label=name, markersize=4)
    finite = [(e.val_loss, e.epoch) for e in epochs if e.val_loss is not None]
    if finite:
        loss, epoch = min(finite)
        axes.plot(epoch, loss, "*", color="black", markersize=12, label=f"best {loss:.4f}")
    axes.set(xlabel="epoch", ylabel="loss", title=f"trial {number}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return content.getvalue()


def _keep(trial: optuna.Trial, runs_dir: Path, content: bytes, name: str) -> str:
    """Keep a file with the trial; its path on optuna-dashboard."""
    folder = runs_dir / ARTIFACTS
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / name
        file.write_bytes(content)
        artifact = upload_artifact(
            artifact_store=FileSystemArtifactStore(folder), file_path=str(file), study_or_trial=trial
        )
    path: str = get_artifact_path(trial, artifact)
    return path
