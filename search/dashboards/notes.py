"""Notes on optuna-dashboard: findings, plot and link for each trial, and a summary of the study.

optuna-dashboard renders notes as Markdown; text from data or study files is escaped.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.artifacts import FileSystemArtifactStore, upload_artifact

from search import leaderboard
from search.dashboards import losses_svg
from search.diagnosis import Finding, leaf, messages
from search.markdown import code, escape, fenced
from search.records import EpochRecord, Outcome, TrialRecord, finite, lowest
from search.storage.optuna_private import noted, set_system_attr, study_system_attrs, trial_id
from search.verdict import text
from search.verdict.leaders import winner
from trainer.common.imports import without_module

if TYPE_CHECKING:
    from search.captions import Captioned
    from search.verdict.race import Verdict

with without_module("sklearn"):
    # optuna-dashboard imports scikit-learn, SciPy and pandas for importances, which only its server computes. That
    # would add a second to each worker's start.
    from optuna_dashboard import get_note, save_note
    from optuna_dashboard.artifact import get_artifact_path

WIDTH = 104
"""Characters in a line of a trial's note. optuna-dashboard makes its page as wide as the longest user attribute,
thousands of pixels, and a line that it does not break would run out of a window of 1,280 pixels."""
OWN = "---\n\nYour own notes, below this line, are kept."
"""Text below this marker in a study's note is the user's. A note without it is entirely theirs."""


def annotate_trial(
    trial: optuna.Trial,
    *,
    folder: Path,
    outcome: Outcome,
    findings: Sequence[Finding],
    epochs: Sequence[EpochRecord],
    config: dict[str, Any],
    run: str | None,
    captioned: Captioned | None = None,
) -> None:
    """Write a trial's note and keep its plot as an artifact. Call it before `study.tell`.

    Args:
        folder: Where artifacts are kept (`Places.notes`).
        run: Address of the run's page in MLflow, None if it has none yet.
        captioned: What the trial says of a few images, None if it was not asked.
    """
    # Where optuna-dashboard (0.21) looks for constraints; Optuna 5 keeps them one by one, by name. Optuna still reads
    # this form too, as a constraint named "0".
    set_system_attr(trial.study, trial, "constraints", [1.0 if outcome.violated else 0.0])

    # The plot, where there is something to draw.
    plot = ""
    if any(finite(loss) for e in epochs for loss in (e.train_loss, e.val_loss)):
        plot = _keep(trial, folder, losses_svg.draw(epochs, trial.number), f"trial-{trial.number:03d}-losses.svg")
        best = lowest({e.epoch: e.val_loss for e in epochs})
        seen = "" if best is None else f", lowest validation loss {best[0]:.4f}"
        plot = f"![Losses of {len(epochs)} epochs{seen}]({plot})"

    # How it ended, what was found, where its curves are, what was trained.
    lines = [_text(outcome.detail, f"**{outcome.state}** ({outcome.reason}): "), "", _judgement(findings), ""]
    lines += [plot, "", f"[Curves in MLflow]({run})" if run else "MLflow was unavailable when this trial began.", ""]
    if captioned is not None:
        sheet = _keep(trial, folder, captioned.sheet, f"trial-{trial.number:03d}-images.png")
        lines += [f"**Captions** of validation images, from the left:  \n![Validation images]({sheet})", ""]
        said = zip(captioned.pictured.references, captioned.pictured.base, captioned.captions, strict=True)
        for number, (reference, base, ours) in enumerate(said, start=1):
            lines += [_text(reference, f"{number}. reference: ", "   ")]
            lines += [_text(base, "   - base: ", "     "), _text(ours, "   - **this trial**: ", "     ")]
        lines.append("")
    lines.append(fenced(leaderboard.training_config(config), "python"))
    save_note(trial, "\n".join(lines))


def retell(study: optuna.Study, findings: Mapping[int, Sequence[Finding]]) -> None:
    """Write another judgement into the notes of trials that have ended. The rest of a note is kept, and a note that
    has no judgement of ours where it was.

    Args:
        findings: By number of the trial.
    """
    for number, trial in _noted(study, findings).items():
        start, _, rest = get_note(trial).partition("\n\n")
        told = _JUDGEMENT.match(rest)
        if told is not None and told[1] != (now := _judgement(findings[number])):
            save_note(trial, f"{start}\n\n{now}{rest[told.end(1) :]}")


def _noted(study: optuna.Study, numbers: Collection[int]) -> dict[int, Any]:
    """Trials by number, to read and write the notes of many with one look at the database."""
    attrs: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, value in study_system_attrs(study).items():
        if name.startswith("dashboard:"):
            attrs[name.split(":")[1]][name] = value
    trials = (trial for trial in study.get_trials(deepcopy=False) if trial.number in numbers)
    return {trial.number: noted(study, trial, attrs[str(trial_id(trial))]) for trial in trials}


def _judgement(findings: Sequence[Finding]) -> str:
    """Each finding with its cause and advice, and the leaf of the decision tree."""
    lines = []
    for finding in findings:
        name = messages.key(finding)
        lines.append(_text(messages.sentence(finding), f"- **{messages.title(name)}** (`{name}`): ", "  "))
        cause = messages.cause(finding)
        lines += [_text(cause, "  - cause: ", "    ")] if cause else []
        lines += [_text(text, "  - advice: ", "    ") for text in messages.advices(finding.advice)]
    return "\n".join([*lines, "", _text(messages.leaf_text(leaf(findings)), "Decision tree: ")])


_PARAGRAPH = r"(?:(?!\n\n).)*"
_JUDGEMENT = re.compile(rf"(?s)((?:- \*\*{_PARAGRAPH}\n|)\nDecision tree: {_PARAGRAPH})\n\n")
"""What `_judgement` wrote, after a note's first paragraph."""


def _text(text: str, before: str = "", indent: str = "") -> str:
    """Text from data as Markdown behind a prefix of ours, in lines of `WIDTH`; further lines are indented."""
    room = "." * len(before)
    lines = textwrap.wrap(text, WIDTH, initial_indent=room, break_long_words=False, break_on_hyphens=False) or [room]
    first, *rest = (escape(line) for line in [lines[0][len(room) :], *lines[1:]])
    return "  \n".join([before + first, *(indent + line for line in rest)])


def annotate_study(
    study: optuna.Study,
    trials: Sequence[TrialRecord],
    verdict: Verdict | None,
    *,
    runs_page: str,
    log: Path,
    best_two: str | None = None,
) -> str:
    """Write the study's note: its verdict, leaderboard and the configuration that it names, the place of its log.
    Keeps the user's text, and returns ours.

    Args:
        trials: All of the study's, repeats as well.
        verdict: What its repeats have shown, as the log has it.
        runs_page: Address of the page with all curves in MLflow.
        best_two: The same of the page that compares the best two, None if there is none.
    """
    theirs = get_note(study).rpartition(OWN)[2].strip()
    links = [f"[All curves in MLflow]({runs_page})"]
    links += [] if best_two is None else [f"[The best two, compared]({best_two})"]
    ours = _of_study(trials, verdict, " · ".join(links), log)
    save_note(study, "\n".join([ours, OWN, "", theirs]))
    return ours


def _of_study(trials: Sequence[TrialRecord], verdict: Verdict | None, links: str, log: Path) -> str:
    lines = [escape(leaderboard.summary(trials)), ""]
    chosen = winner(trials, verdict)
    if chosen is not None:
        lines += [f"**{escape(leaderboard.named(chosen, trials))}**", ""]
    if verdict is not None:
        lines += [f"**Verdict**: {escape(text.sentence(verdict))}", ""]
        lines += [*(f"- {escape(line)}" for line in text.table(verdict)), ""]
    heads, rows = leaderboard.rows([t for t in trials if t.state in ("COMPLETE", "PRUNED", "FAIL")])
    if rows:
        lines.append("| " + " | ".join(escape(head) for head in heads) + " |")
        lines.append("|" + "---|" * len(heads))
        lines += ["| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows[:20]]
        lines.append("")
    if chosen is not None:
        lines += [fenced(leaderboard.training_config(chosen.config), "python"), ""]
    lines += [links, "", f"Tuning log: {code(log)}", ""]
    return "\n".join(lines)


def _keep(trial: optuna.Trial, folder: Path, content: bytes, name: str) -> str:
    """Keep a file with the trial, and return its path on optuna-dashboard."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / name
        file.write_bytes(content)
        artifact = upload_artifact(
            artifact_store=FileSystemArtifactStore(folder), file_path=str(file), study_or_trial=trial
        )
    path: str = get_artifact_path(trial, artifact)
    return path
