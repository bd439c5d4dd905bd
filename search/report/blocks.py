"""Blocks of the log that are the same in every language: configurations, epochs, the raw data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from search.diagnosis.finding import NON_FINITE
from search.diagnosis.messages import rate
from search.leaderboard import LOG_FIELDS, show_metric, show_value, training_config
from search.markdown import code, escape, fenced
from search.records import finite
from search.report.epochs import Column, EpochRow, Mark
from search.report.experiment import ConfigLine, Experiment
from trainer.config import TrainConfig

MARKS: dict[Mark, str] = {"good": "✅", "warning": "⚠️", "bad": "❌", "unknown": "❔"}
MOST_EPOCHS = 15
"""Most epochs that a table or line of the log shows; of more, some are left out between the first and the last."""
MOST_STEPS = 12
"""Most steps shown of a trial without an epoch."""


def config_block(e: Experiment, was: str, blamed: str) -> Markup:
    """The TRAINING_CONFIG of a trial, its changes marked."""
    lines = [_line(line, was, blamed) for line in e.lines]
    return fenced("TRAINING_CONFIG = {\n" + "\n".join(lines) + "\n}", "python")


def _line(line: ConfigLine, was: str, blamed: str) -> str:
    text = f'    "{line.name}": {literal(line.value, line.name)},'
    remarks = [f"{was} {inline(line.name, line.before)}"] if line.changed else []
    remarks += [blamed] if line.blamed else []
    return f"{text:<36}  # {('; ' if blamed.isascii() else '；').join(remarks)}" if remarks else text


def short_config(config: Mapping[str, Any]) -> Markup:
    """A configuration to paste: the hand-run log's fields, and those that are not TrainConfig's defaults."""
    kept = {k: v for k, v in config.items() if k in LOG_FIELDS or v != _DEFAULTS.get(k)}
    return fenced(training_config(kept), "python")


_DEFAULTS = TrainConfig().model_dump(mode="json")


def lora_line(e: Experiment) -> Markup:
    """PEFT's LoraConfig of a trial."""
    config = e.record.config
    fields = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    parts = [f"{name}={literal(config.get(field), field)}" for name, field in fields.items()]
    parts.append(f"target_modules={literal(config.get('target_modules', []))}")
    return code(f"LoraConfig({', '.join(parts)}, task_type=None)")


def cell(row: EpochRow, column: Column) -> str:
    """A metric of an epoch in the format of its column, `–` where there is none."""
    value = getattr(row.record, column.name)
    return show_metric(value, column.format) if finite(value) else "–"


def epoch_table(e: Experiment, columns: Sequence[Column], heading: str, lang: str) -> Markup:
    """The epochs of a trial side by side, a line for each metric, the best epoch bold, and a line of marks.

    Args:
        e: The trial.
        columns: Its metrics.
        heading: The word for an epoch.
        lang: Language of the metrics' names.
    """
    rows = thinned(e.rows)
    head = [heading, *(f"**{row.epoch}**" if row.is_best else str(row.epoch) for row in rows)]
    lines = [head, ["---"] * len(head)]
    lines += [[str(escape(column.heading[lang])), *(cell(row, column) for row in rows)] for column in columns]
    lines.append(["", *(MARKS[row.mark] for row in rows)])
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def losses(e: Experiment, name: str) -> Markup:
    """The losses of a trial in a row, its best epoch's bold."""
    shown = []
    last = 0
    for row in thinned(e.rows):
        value = getattr(row.record, name)
        text = show_metric(value) if finite(value) else "–"
        shown += ["…"] if row.epoch > last + 1 else []
        shown.append(f"**{text}**" if row.is_best and name == "val_loss" else text)
        last = row.epoch
    return Markup(" ".join(shown))


def thinned(rows: Sequence[EpochRow]) -> list[EpochRow]:
    """At most `MOST_EPOCHS` of the epochs, the first, the last and the best among them."""
    if len(rows) <= MOST_EPOCHS:
        return list(rows)
    step = (len(rows) - 1) / (MOST_EPOCHS - 2)
    kept = {round(step * i) for i in range(MOST_EPOCHS - 1)}
    return [row for i, row in enumerate(rows) if i in kept or row.is_best]


def epoch_line(row: EpochRow, best: str) -> str:
    """One line of the raw data, as the hand-run log writes it."""
    record = row.record
    known = [("Train", row.train_loss), ("Val", row.val_loss)]
    parts = [f"{name}={'–' if value is None else show_metric(value)}" for name, value in known]
    if record.learning_rate is not None:
        parts.append(f"lr={rate(record.learning_rate)}")
    if record.grad_norm_max is not None:
        parts.append(f"grad_norm_max={record.grad_norm_max:.3g}")
    if record.epoch_seconds is not None:
        parts.append(f"{record.epoch_seconds:.1f} s")
    return f"Epoch {row.epoch}: {', '.join(parts)} {MARKS[row.mark]}{best if row.is_best else ''}"


def raw(e: Experiment, best: str) -> Markup:
    """All that was recorded of a trial: its epochs, or its first steps if it has none."""
    lines = [epoch_line(row, best) for row in e.rows]
    if not lines:
        known = [step for step in e.record.steps if step.loss is not None][:MOST_STEPS]
        lines = [f"Step {step.step}: Loss={step.loss:.6f} {MARKS['good']}" for step in known]
        bad = next((f for f in e.findings if f.id == NON_FINITE and f.step is not None), None)
        if bad is not None:
            what = f"{bad.evidence.get('tensor')} = {bad.evidence.get('value')}"
            lines.append(f"Step {bad.step}: {' '.join(what.split())} {MARKS['bad']}")
    return fenced("\n".join(lines) or "–")


def literal(value: Any, name: str = "") -> str:
    """A value as Python: strings in double quotes on one line, numbers with at most four digits."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        return "[" + ", ".join(literal(item) for item in value) + "]"
    if isinstance(value, float) and name == "lora_alpha" and value == int(value):
        return str(int(value))
    if isinstance(value, float) and 0 < abs(value) < 0.01:
        return short_rate(value)
    return repr(value) if not isinstance(value, float) or len(repr(value)) <= 6 else f"{value:.4g}"


def short_rate(value: float) -> str:
    """A small number as the log writes rates, with at most four digits: `2e-4`, `1.464e-4`."""
    digits, exponent = f"{value:.3e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def inline(name: str, value: Any) -> str:
    return literal(value) if isinstance(value, str | list) else show_value(name, value)
