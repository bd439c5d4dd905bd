"""Facts to Markdown: a template for each language, with everything that comes from data escaped by default.

What a template prints is escaped for Markdown and HTML unless a filter here has marked it as safe: a label `<script>`
or `# heading` stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import BytecodeCache, Environment
from jinja2.bccache import Bucket
from markupsafe import Markup

from search.diagnosis import messages
from search.diagnosis.finding import NON_FINITE
from search.diagnosis.messages import Lang, rate
from search.diagnosis.tree import TREE
from search.leaderboard import show_metric, show_value, state_of, training_config
from search.markdown import code, environment, escape, fenced, slug
from search.records import finite
from search.report import importance, parameters, words
from search.report.epochs import Column, EpochRow, Mark
from search.report.experiment import ConfigLine, Experiment
from search.report.facts import Facts
from search.tracking.pages import run_page
from search.verdict import text

TEMPLATES = Path(__file__).with_name("templates")
MARKS: dict[Mark, str] = {"good": "✅", "warning": "⚠️", "bad": "❌", "unknown": "❔"}
MOST_LISTED = 12
"""Most trials named one by one in a sentence; the rest are counted."""


def loss(value: float | None) -> Markup:
    """A loss, `–` where there is none."""
    return Markup("–" if value is None else show_metric(value))


def number(value: float | None, digits: int = 3) -> Markup:
    """A plain number."""
    return Markup("–" if value is None else f"{value:.{digits}g}")


def cell(row: EpochRow, column: Column) -> Markup:
    """A metric of an epoch in the format of its column, `–` where there is none."""
    value = getattr(row.record, column.name)
    return Markup(show_metric(value, column.format) if finite(value) else "–")


class _Compiled(BytecodeCache):
    """Compiled templates, once per process: a log is written after every trial, and compiling takes longer."""

    def __init__(self) -> None:
        self._code: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        if bucket.key in self._code:
            bucket.bytecode_from_string(self._code[bucket.key])

    def dump_bytecode(self, bucket: Bucket) -> None:
        self._code[bucket.key] = bucket.bytecode_to_string()


_COMPILED = _Compiled()


class Renderer:
    """The filters and words of one language over one study's facts."""

    def __init__(self, facts: Facts, lang: Lang, plots: Mapping[str, str]) -> None:
        self.facts, self.lang, self.plots = facts, lang, plots
        self.experiments = {e.number: e for e in facts.experiments}
        self.repeats = {t.number: t for t in facts.repeats}

    # ------------------------------------------------------------------ numbers

    def pct(self, share: float) -> Markup:
        """A share in percent, one decimal below ten."""
        text = f"{100 * share:.1f}" if abs(share) < 0.0995 and share != 0 else f"{100 * share:.0f}"
        if text == "0.0":
            text = "&lt;0.1"
        return Markup(words.fill("percent", self.lang, text))

    def duration(self, seconds: float | None) -> Markup:
        """Seconds, minutes or hours."""
        if seconds is None:
            return Markup("–")
        unit, length = ("hours", 3600) if seconds >= 5400 else ("minutes", 60) if seconds >= 120 else ("seconds", 1)
        return Markup(words.fill(unit, self.lang, f"{seconds / length:.3g}"))

    def value(self, value: Any, name: str = "") -> Markup:
        """A configuration value as the log writes it."""
        if isinstance(value, list | tuple):
            return escape(", ".join(map(str, value)))
        return escape(show_value(name, value))

    def span(self, row: Any, name: str) -> Markup:
        """The range of values tried in a table's row; a share in percent."""

        def one(value: Any) -> str:
            return str(self.pct(value)) if name == "warmup_share" else show_value(name, value)

        low, high = one(row.low), one(row.high)
        return escape(low) if low == high else Markup(f"{escape(low)} – {escape(high)}")

    def date(self, seconds: float | None) -> Markup:
        """A moment in UTC."""
        if seconds is None:
            return Markup("–")
        return Markup(datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC"))

    # ------------------------------------------------------------------ trials

    def url(self, run_id: str | None) -> str | None:
        """A run's page on the tracking server; None without one."""
        record = self.facts.record
        return run_page(record.tracking_url, record.experiment_id, run_id)

    def run(self, run_id: str | None) -> Markup:
        """A run's id, linked where a server shows the run."""
        if not run_id:
            return Markup("–")
        url = self.url(run_id)
        return Markup(f"[{code(run_id)}]({url})") if url else code(run_id)

    def title(self, e: Experiment) -> str:
        """The heading of an experiment: its number, its label and its main finding."""
        label = f": {' '.join(e.label.split())}" if e.label else ""
        what = e.main_finding
        said = messages.title(what.id, self.lang) if what else words.state(state_of(e.record), self.lang)
        return words.fill("experiment", self.lang, e.number, label, said)

    def ref(self, n: int, epoch: int | None = None) -> Markup:
        """A trial, linked to its run's page or to its section, with the epoch of a figure."""
        link = f"[{words.fill('trial', self.lang, n)}]({self._target(n)})"
        return Markup(link if epoch is None else words.fill("at_epoch", self.lang, link, epoch))

    def refs(self, trials: Iterable[int]) -> Markup:
        """Several trials, `–` for none."""
        numbers = list(trials)
        links = [f"[{n}]({self._target(n)})" for n in numbers[:MOST_LISTED]]
        return Markup(words.trials(links, len(numbers), self.lang) if links else "–")

    def _target(self, n: int) -> str:
        if n in self.repeats:  # it has no section of its own
            return self.url(self.repeats[n].run_id) or f"#{slug(words.pick(words.VERDICT_HEADING, self.lang))}"
        e = self.experiments[n]
        return self.url(e.record.run_id) or f"#{slug(str(self.title(e)))}"

    def config_block(self, e: Experiment, was: str, blamed: str) -> Markup:
        """The TRAINING_CONFIG of a trial, its changes marked."""
        lines = [self._line(line, was, blamed) for line in e.lines]
        return fenced("TRAINING_CONFIG = {\n" + "\n".join(lines) + "\n}", "python")

    def _line(self, line: ConfigLine, was: str, blamed: str) -> str:
        text = f'    "{line.name}": {literal(line.value, line.name)},'
        remarks = [f"{was} {_inline(line.name, line.before)}"] if line.changed else []
        remarks += [blamed] if line.blamed else []
        return f"{text:<36}  # {'; '.join(remarks)}" if remarks else text

    def epoch_line(self, row: EpochRow) -> str:
        """One line of the raw data, as the log writes it."""
        parts = [f"Train={loss(row.train_loss)}", f"Val={loss(row.val_loss)}"]
        record = row.record
        if record.learning_rate is not None:
            parts.append(f"lr={rate(record.learning_rate)}")
        if record.grad_norm_max is not None:
            parts.append(f"grad_norm_max={record.grad_norm_max:.3g}")
        if record.epoch_seconds is not None:
            parts.append(f"{record.epoch_seconds:.1f} s")
        best = words.fill("best", self.lang) if row.is_best else ""
        return f"Epoch {row.epoch}: {', '.join(parts)} {MARKS[row.mark]}{best}"

    def raw(self, e: Experiment) -> Markup:
        """All that was recorded of a trial: its epochs, or its first steps if it has none."""
        lines = [self.epoch_line(row) for row in e.rows]
        if not lines:
            known = [step for step in e.record.steps if step.loss is not None][:MOST_LISTED]
            lines = [f"Step {step.step}: Loss={step.loss:.6f} {MARKS['good']}" for step in known]
            bad = next((f for f in e.findings if f.id == NON_FINITE and f.step is not None), None)
            if bad is not None:
                what = f"{bad.evidence.get('tensor')} = {bad.evidence.get('value')}"
                lines.append(f"Step {bad.step}: {' '.join(what.split())} {MARKS['bad']}")
        return fenced("\n".join(lines) or "–")

    # ------------------------------------------------------------------ diagnosis

    def tree_text(self, yes: str, no: str, one: str, many: str) -> Markup:
        """The decision tree with the number of trials at each leaf, drawn as in the hand-run log."""
        nodes = {node.name: node for node in TREE}
        lines: list[str] = []

        def leaf_of(name: str) -> str:
            trials = self.facts.tree[name]
            named = f": {', '.join(map(str, trials[:MOST_LISTED]))}{', …' if len(trials) > MOST_LISTED else ''}"
            count = (one if len(trials) == 1 else many).format(len(trials))
            return f"{messages.leaf_text(name, self.lang)}  [{count}{named if trials else ''}]"

        def walk(name: str, indent: str) -> None:
            node = nodes[name]
            lines.append(f"{indent}{messages.question(name, self.lang)}")
            for answer, branch, target in ((yes, "├─", node.yes), (no, "└─", node.no)):
                if target in nodes:
                    lines.append(f"{indent}    {branch} {answer} ↓")
                    walk(target, indent + ("    │    " if branch == "├─" else "         "))
                else:
                    lines.append(f"{indent}    {branch} {answer} → {leaf_of(target)}")

        walk(TREE[0].name, "")
        return fenced("\n".join(lines))

    def templates(self) -> Environment:
        """Jinja's environment with this renderer's filters."""
        lang = self.lang
        env = environment(TEMPLATES, finalize=_finalize, keep_trailing_newline=True, bytecode_cache=_COMPILED)
        own = ("pct", "duration", "value", "span", "date", "run", "ref", "refs", "config_block", "title", "epoch_line")
        env.filters |= {name: getattr(self, name) for name in own}
        env.filters |= {"loss": loss, "cell": cell, "code": code, "num": number, "fenced": fenced}
        env.filters |= {
            "mark": lambda mark: Markup(MARKS[mark]),
            "sentence": lambda finding: messages.sentence(finding, lang),
            "finding_title": lambda name: messages.title(name, lang),
            "cause": lambda finding: messages.cause(finding, lang),
            "advices": lambda items: messages.advices(items, lang),
            "verdict_sentence": lambda verdict: text.sentence(verdict, lang),
            "signed": lambda share: Markup(words.fill("percent", lang, f"{100 * share:+.2f}")),
            "reason": lambda name: words.reason(name, lang),
            "state": lambda text: words.state(text, lang),
            "state_of": state_of,
            "verdict": lambda name: words.pick(words.VERDICTS[name], lang),
            "sign": lambda name: words.pick(words.SIGNS[name], lang),
            "heading": lambda column: column.heading[lang],
            "parameter": lambda name: code(words.parameter(name, lang)),
            "link": lambda path: Markup(quote(str(path), safe="/:.-_~%,;=+")),
            "join_lines": "\n".join,
            "raw": self.raw,
            "lora_block": lora_block,
            "training_config": lambda config: fenced(training_config(config), "python"),
        }
        env.globals |= {
            "tree_text": self.tree_text,
            "plots": self.plots,
            "fewest": parameters.FEWEST,
            "sure_from": parameters.SURE,
            "chance_below": parameters.CHANCE,
            "fewest_complete": importance.FEWEST,
            "resamples": importance.RESAMPLES,
        }
        return env


def _finalize(value: Any) -> Markup:
    """Escapes what no filter has marked as safe."""
    if isinstance(value, Markup):
        return value
    return escape(value) if isinstance(value, str) else escape(str(value))


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


def lora_block(e: Experiment) -> Markup:
    """PEFT's LoraConfig of a trial."""
    config = e.record.config
    fields = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
    lines = [f"    {name}={literal(config.get(field), field)}," for name, field in fields.items()]
    lines += [f"    target_modules={literal(config.get('target_modules', []))},", "    task_type=None,"]
    return fenced("lora_config = LoraConfig(\n" + "\n".join(lines) + "\n)", "python")


def _inline(name: str, value: Any) -> str:
    return literal(value) if isinstance(value, str | list) else show_value(name, value)


def markdown(facts: Facts, lang: Lang, plots: Mapping[str, str]) -> str:
    """The tuning log in Markdown.

    Args:
        facts: See `search.report.facts.gather`.
        lang: en or zh.
        plots: Address of each plot by its name, such as `loss-curves`; plots that are missing are left out.
    """
    renderer = Renderer(facts, lang, plots)
    text = renderer.templates().get_template(f"tuning-log.{lang}.md.jinja").render(facts=facts, record=facts.record)
    # Empty blocks leave blank lines behind.
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
