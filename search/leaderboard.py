"""The leaderboard and the best configuration, as text or as rich tables; pure functions of the trial records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search import records
from search.diagnosis.finding import Finding
from search.diagnosis.messages import key
from search.records import SAMPLE_FIELDS, TrialRecord
from trainer.config import default

if TYPE_CHECKING:
    from rich.table import Table

LOG_FIELDS = (
    "num_epochs",
    "batch_size",
    "learning_rate",
    "max_samples",
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "warmup_steps",
    "max_grad_norm",
    "torch_dtype",
    "num_workers",
)
"""The fields of the hand-run log's TRAINING_CONFIG, in its order."""


def sample_key(trial: TrialRecord) -> tuple[Any, ...]:
    """What decides the samples that a trial was validated on.

    The data are the study's, wherever a host has them, unless the trial itself names others.
    """
    return samples_of(trial.attrs, trial.config)


def samples_of(attrs: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Any, ...]:
    """`sample_key` of a trial's user attributes and its configuration."""
    return (own_path(attrs, "data"), *(config.get(name, default(name)) for name in SAMPLE_FIELDS))


def own_path(attrs: Mapping[str, Any], field: str) -> Any:
    """The `data` or `model` that a trial names itself; None for the study's, whose path differs by host.

    Args:
        attrs: The trial's user attributes.
        field: `data` or `model`.
    """
    given = attrs.get(records.OVERRIDES)
    return given.get(field) if isinstance(given, Mapping) else None


def is_repeat(trial: TrialRecord) -> bool:
    """Whether the trial repeats another one with another seed, and is none of the search's."""
    return records.REPEAT_OF in trial.attrs


def searched(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those that are no repeats."""
    return [trial for trial in trials if not is_repeat(trial)]


def ranked(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Trials, best first: COMPLETE ones, then PRUNED ones that violated nothing, then the rest by number, and repeats
    at the end, those of one trial together. The lowest loss is best, or the highest CIDEr-D if the study ranks by it,
    which COMPLETE trials alone have."""

    def key(trial: TrialRecord) -> tuple[int, float, int]:
        if is_repeat(trial):
            return (4, trial.attrs[records.REPEAT_OF], trial.number)
        score = records.score_of(trial.attrs)
        value = -score if score is not None else trial.value if trial.value is not None else float("inf")
        group = {"COMPLETE": 0, "PRUNED": 1}.get(trial.state, 3)
        return (2 if trial.violated else group, value, trial.number)

    return sorted(trials, key=key)


def best(trials: Sequence[TrialRecord]) -> TrialRecord | None:
    """The first COMPLETE trial in the order of `ranked`, None if there is none.

    One that was added or told by hand has no epoch that measured its value, and no adapter: it is not the best.
    """
    complete = [t for t in ranked(trials) if t.state == "COMPLETE" and t.best_epoch is not None]
    return complete[0] if complete else None


def all_failed(trials: Sequence[TrialRecord]) -> str | None:
    """What to say if trials have ended, and none of them has a result; None if one has.

    A result is a finite loss that an epoch measured, of a trial that violated no constraint. A lost trial has not
    ended as long as another goes on with its work.
    """
    ended = [t for t in not_taken_up(searched(trials)) if t.state in ("COMPLETE", "PRUNED", "FAIL")]
    if not ended or any(map(_has_result, ended)):
        return None
    if all(t.state == "FAIL" for t in ended):
        said = f"every trial failed ({len(ended)})"
    else:
        reasons = Counter(_why_not(t) for t in ended)
        said = f"no trial has a result ({', '.join(f'{n} {why}' for why, n in reasons.most_common())})"
    last = ended[-1]
    return f"{said}, the last with: {last.detail or last.reason or 'no reason given'}"


def _has_result(trial: TrialRecord) -> bool:
    measured = trial.best_epoch is not None and records.finite(trial.value)
    return trial.state in ("COMPLETE", "PRUNED") and measured and not trial.violated


def _why_not(trial: TrialRecord) -> str:
    """Why a trial that has ended has no result, in a word or two."""
    return trial.violated[0] if trial.violated else trial.reason or "told by hand"


def adapter(study_folder: Path, trial: TrialRecord) -> Path:
    """The folder of a trial's best adapter, in PEFT's format."""
    checkpoint = f"epoch-{trial.best_epoch:04d}"
    return study_folder / str(trial.attrs["folder"]) / "checkpoints" / checkpoint / "adapter"


def show_value(name: str, value: Any) -> str:
    """A configuration value as the hand-run log writes it: rates as 2e-4, other numbers plainly."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if name == "learning_rate" and isinstance(value, float):
        mantissa, _, exponent = f"{value:.1e}".partition("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 and value != int(value) else f"{value:.0f}"
    return str(value)


def show_metric(value: float, spec: str = ".4f") -> str:
    """A metric by its format spec, a loss's by default; a huge one with as many digits instead of decimals."""
    return format(value, spec if abs(value) < 1e4 else spec.replace("f", "g"))


def result_of(trial: TrialRecord) -> str:
    """What a trial came to: `validation loss 0.3742`, behind CIDEr-D if its study ranks by that."""
    score = records.score_of(trial.attrs)
    loss = "no validation loss" if trial.value is None else f"validation loss {show_metric(trial.value)}"
    return loss if score is None else f"CIDEr-D {score:.4f}, {loss}"


def named(chosen: TrialRecord, trials: Sequence[TrialRecord]) -> str:
    """What a study names, in a line, and the lowest of its losses where that is another trial's.

    Args:
        chosen: `search.verdict.leaders.winner` of them.
        trials: All of the study's.
    """
    line = f"Best: trial {chosen.number}, {result_of(chosen)} at epoch {chosen.best_epoch}"
    first = best(trials)
    if first is None or first.number == chosen.number or first.value is None:
        return line
    return f"{line}, named by the verdict; the lowest is that of trial {first.number}, {first.value:.4f}"


def state_of(trial: TrialRecord) -> str:
    """A trial's state with its reason, e.g. `PRUNED (rising)`."""
    if trial.state == "COMPLETE":
        return "COMPLETE (stopped early)" if trial.stopped_early else "COMPLETE"
    return f"{trial.state} ({trial.reason})" if trial.reason else trial.state


def columns(trials: Sequence[TrialRecord]) -> list[str]:
    """Configuration fields worth a column: those in which the trials differ, in TrainConfig's order."""
    configs = [t.config for t in searched(trials) if t.config]
    names = list(configs[0]) if configs else []
    return [name for name in names if len({repr(c.get(name)) for c in configs}) > 1]


def rows(trials: Sequence[TrialRecord]) -> tuple[list[str], list[list[str]]]:
    """(headings, a row of texts for each trial), best first."""
    names = columns(trials)
    by_cider = any(records.score_of(trial.attrs) is not None for trial in trials)
    heads = ["rank", "trial", *(["cider_d"] if by_cider else []), "val_loss", "epoch", *names, "state", "findings"]
    table = []
    for rank, trial in enumerate(ranked(trials), start=1):
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        label, score = name_of(trial), records.score_of(trial.attrs)
        cider = "-" if score is None else f"{score:.4f}"
        found = ", ".join(key(Finding.from_dict(f)) for f in trial.attrs.get(records.FINDINGS, ()))
        table.append(
            [
                str(rank) if trial.state == "COMPLETE" else "-",
                str(trial.number) + (f" ({label})" if label else ""),
                *([cider] if by_cider else []),
                value,
                "-" if trial.best_epoch is None else str(trial.best_epoch),
                *(show_value(name, trial.config[name]) if name in trial.config else "-" for name in names),
                state_of(trial),
                found,
            ]
        )
    return heads, table


def name_of(trial: TrialRecord) -> str | None:
    """What its list calls a trial beside its number: the label given by hand, or the trial that it repeats."""
    if is_repeat(trial):
        return f"repeat of {trial.attrs[records.REPEAT_OF]}"
    label = trial.attrs.get(records.LABEL)
    return None if label is None else str(label)


def as_text(trials: Sequence[TrialRecord]) -> str:
    """The leaderboard in plain aligned columns."""
    heads, table = rows(trials)
    widths = [max(len(row[i]) for row in [heads, *table]) for i in range(len(heads))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [heads, *table]]
    return "\n".join(line.rstrip() for line in lines)


def as_table(trials: Sequence[TrialRecord], limit: int | None = None) -> Table:
    """The leaderboard as a rich table."""
    from rich.table import Table

    heads, body = rows(trials)
    table = Table(title="Leaderboard", title_justify="left", header_style="bold", box=None, padding=(0, 1))
    for head in heads:
        table.add_column(head, justify="left" if head in ("state", "findings", "trial") else "right", no_wrap=True)
    for row in body[:limit]:
        table.add_row(*row, style="bold green" if row[0] == "1" else None)
    return table


def training_config(config: dict[str, Any]) -> str:
    """A TRAINING_CONFIG dict to paste, as the hand-run log has it."""
    names = [name for name in LOG_FIELDS if name in config]
    names += [name for name in config if name not in names and name not in ("model", "data", "device")]
    lines = [f'    "{name}": {_literal(name, config[name])},' for name in names]
    return "TRAINING_CONFIG = {\n" + "\n".join(lines) + "\n}"


def _literal(name: str, value: Any) -> str:
    if isinstance(value, float):
        # repr gives every digit: pasted, it is the same number.
        return repr(int(value)) if name == "lora_alpha" and value == int(value) else repr(value)
    return repr(value).replace("'", '"') if isinstance(value, str | list) else repr(value)


def summary(trials: Sequence[TrialRecord]) -> str:
    """One line: the trials by how they ended, the epochs trained, and the epochs saved by stopping early."""
    repeats = [t for t in trials if is_repeat(t)]
    trials = searched(trials)
    states = Counter(state_of(t) for t in trials)
    trained = {t.number: epochs_of(t) for t in not_taken_up(trials)}
    saved = sum(
        max(0, t.config["num_epochs"] - trained[t.number])
        for t in trials
        if "num_epochs" in t.config
        and t.state in ("COMPLETE", "PRUNED")
        and t.reason in records.SAVING
        and not t.violated
        and t.number in trained
    )
    parts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    stopped = f" of {sum(trained.values()) + saved} ({saved} saved by stopping early)" if saved else ""
    again = f", and {len(repeats)} repeats, {epochs_trained(repeats)} epochs" if repeats else ""
    return f"{len(trials)} trials ({parts}), {sum(trained.values())} epochs{stopped}{again}"


def epochs_trained(trials: Sequence[TrialRecord]) -> int:
    """Epochs of these trials; those of one that was resumed are in the trial that resumed it, too."""
    return sum(map(epochs_of, not_taken_up(trials)))


def not_taken_up(trials: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those whose epochs no other one has, too, since it resumed them."""
    resumed = {t.attrs[records.RESUMES] for t in trials if records.RESUMES in t.attrs}
    return [t for t in trials if t.number not in resumed]


def epochs_of(trial: TrialRecord) -> int:
    """Epochs that a trial has trained."""
    return len(trial.attrs.get(records.TRAIN_LOSSES, ()))
