"""Facts to Markdown: a template for each language, with everything that comes from data escaped by default.

What a template prints is escaped for Markdown and HTML unless a filter here has marked it as safe: a label `<script>`
or `# heading` stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import BytecodeCache, Environment
from jinja2.bccache import Bucket
from markupsafe import Markup

from search.diagnosis import messages
from search.diagnosis.finding import INCONCLUSIVE
from search.diagnosis.messages import Lang
from search.diagnosis.noise import SIGNIFICANT
from search.diagnosis.tree import TREE
from search.leaderboard import show_metric, show_value, state_of
from search.markdown import code, environment, escape, fenced, slug
from search.report import blocks, importance, parameters, words
from search.report.experiment import ConfigLine, Experiment
from search.report.facts import Facts
from search.report.level import Level
from search.report.parameters import Row, Table
from search.tracking.pages import run_page
from search.verdict import text
from search.verdict.leaders import APART

TEMPLATES = Path(__file__).with_name("templates")
MOST_IN_TABLE = 10
"""Most trials whose losses are listed by epoch at the end of a log; the file beside it has those of all."""
MOST_LISTED = 12
"""Most trials named one by one in a sentence; the rest are counted."""


def loss(value: float | None) -> Markup:
    """A loss, `–` where there is none."""
    return Markup("–" if value is None else show_metric(value))


def times(value: float) -> Markup:
    """A factor with two digits, a large one as a whole number."""
    return Markup(f"{value:.0f}" if value >= 100 else f"{value:.2g}")


def number(value: float | None, digits: int = 3) -> Markup:
    """A plain number."""
    return Markup("–" if value is None else f"{value:.{digits}g}")


def sigmas(value: float) -> Markup:
    """A difference in deviations with two digits, and more where fewer would put it on the bound's other side: 2.95 is
    not the 3 from which it counts."""
    digits = next((d for d in range(2, 8) if (float(f"{value:.{d}g}") < SIGNIFICANT) == (value < SIGNIFICANT)), 8)
    return number(value, digits)


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

    def __init__(self, facts: Facts, lang: Lang, plots: Mapping[str, str], data: str | None = None) -> None:
        self.facts, self.lang, self.plots, self.data = facts, lang, plots, data
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

    def parameter(self, name: str) -> Markup:
        """The subject of a table: a field or an expression of fields as code, anything else in words."""
        text = words.parameter(name, self.lang)
        return escape(text) if name in words.QUANTITIES else code(text)

    def span(self, row: Row | Level, name: str) -> Markup:
        """The range of values tried in a table's row; a share in percent."""

        def one(value: Any) -> str:
            shown = "learning_rate" if name == "effective_rate" else name
            return str(self.pct(value)) if name == "warmup_share" else show_value(shown, value)

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
        if what is None or what.id == INCONCLUSIVE:
            said = words.state(state_of(e.record), self.lang)
        else:
            said = messages.title(messages.key(what), self.lang)
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
            told = self.facts.verdict is not None and self.facts.verdict.standings
            heading = words.REPEATS_HEADING if told else words.VERDICT_HEADING
            return self.url(self.repeats[n].run_id) or f"#{slug(words.pick(heading, self.lang))}"
        e = self.experiments[n]
        section = self.title(e) if n in self.facts.full else words.pick(words.OTHERS_HEADING, self.lang)
        return self.url(e.record.run_id) or f"#{slug(section)}"

    def bare_ref(self, n: int) -> Markup:
        """A trial's number, linked."""
        return Markup(f"[{n}]({self._target(n)})")

    def run_ref(self, n: int) -> Markup:
        """A trial where it is told, linked to its run's page if there is one."""
        name, url = words.fill("trial", self.lang, n), self.url(self.experiments[n].record.run_id)
        return Markup(f"[{name}]({url})" if url else name)

    def repeat_ref(self, n: int) -> Markup:
        """A repeat's number, linked to its run's page if there is one."""
        url = self.url(self.repeats[n].run_id)
        return Markup(f"[{n}]({url})" if url else n)

    def outcome(self, e: Experiment) -> Markup:
        """How a trial ended and what it is called, in a few words."""
        main = e.main_finding
        said = [] if state_of(e.record) == "COMPLETE" and main else [words.state(state_of(e.record), self.lang)]
        name = messages.title(messages.key(main), self.lang) if main else ""
        said += [name] if name and not any(name in text for text in said) else []
        return escape(words.fill("list", self.lang).join(said))

    def changes(self, lines: Sequence[ConfigLine]) -> Markup:
        """What was changed, each field with its value before and after."""
        return Markup(words.fill("comma", self.lang).join(self._change(line) for line in lines))

    def _change(self, line: ConfigLine) -> str:
        before, after = (self.value(value, line.name) for value in (line.before, line.value))
        if before == after:  # too close to be told apart with so few digits
            before, after = (escape(f"{v:.5g}" if isinstance(v, float) else str(v)) for v in (line.before, line.value))
        return f"{code(line.name)} {before} → {after}"

    def whole_span(self, table: Table) -> Markup:
        """All values tried of a parameter, from the lowest to the highest."""
        return self.span(replace(table.rows[0], high=table.rows[-1].high), table.name)

    def cell_value(self, value: Any, name: str) -> Markup:
        """A configuration value in a table; `–` for a trial that has none."""
        return Markup("–") if value is None else self.value(value, name)

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
            for answer, branch, bar, target in ((yes, "├─", "│  ", node.yes), (no, "└─", "   ", node.no)):
                asks = messages.question(target, self.lang) if target in nodes else leaf_of(target)
                lines.append(f"{indent}{branch} {answer} → {asks}")
                if target in nodes:
                    walk(target, f"{indent}{bar}     ")

        lines.append(messages.question(TREE[0].name, self.lang))
        walk(TREE[0].name, "    ")
        return fenced("\n".join(lines))

    def templates(self) -> Environment:
        """Jinja's environment with this renderer's filters."""
        lang = self.lang
        env = environment(TEMPLATES, finalize=_finalize, keep_trailing_newline=True, bytecode_cache=_COMPILED)
        own = ["pct", "duration", "value", "span", "date", "run", "ref", "refs", "bare_ref", "run_ref", "repeat_ref"]
        own += ["title", "outcome", "changes", "whole_span", "cell_value"]
        env.filters |= {name: getattr(self, name) for name in own}
        best = words.fill("best", lang)
        env.filters |= {"loss": loss, "code": code, "num": number, "sigmas": sigmas, "times": times, "fenced": fenced}
        env.filters |= {
            "config_block": blocks.config_block,
            "short_config": blocks.short_config,
            "lora_line": blocks.lora_line,
            "losses": blocks.losses,
            "epoch_table": lambda e, heading: blocks.epoch_table(e, self.facts.columns, heading, lang),
            "raw": lambda e: blocks.raw(e, best),
            "mark": lambda mark: Markup(blocks.MARKS[mark]),
            "sentence": lambda finding: messages.sentence(finding, lang),
            "finding_title": lambda name: messages.title(name, lang),
            "finding_key": messages.key,
            "cause": lambda finding: messages.cause(finding, lang),
            "advice": lambda item: messages.advice(item, lang),
            "advices": lambda items: messages.advices(items, lang),
            "verdict_sentence": lambda verdict: text.sentence(verdict, lang),
            "signed": lambda share: Markup(words.fill("percent", lang, f"{100 * share:+.2f}")),
            "reason": lambda name: words.reason(name, lang),
            "state": lambda text: words.state(text, lang),
            "state_of": state_of,
            "verdict": lambda name: words.pick(words.VERDICTS[name], lang),
            "sign": lambda name: words.pick(words.SIGNS[name], lang),
            "parameter": self.parameter,
            "link": lambda path: Markup(quote(str(path), safe="/:.-_~%,;=+")),
        }
        env.globals |= {
            "tree_text": self.tree_text,
            "plots": self.plots,
            "fewest": parameters.FEWEST,
            "apart": APART,
            "sure_from": parameters.SURE,
            "data": self.data,
            "listed": MOST_IN_TABLE,
            "others_heading": words.pick(words.OTHERS_HEADING, lang),
            "fewest_complete": importance.FEWEST,
            "resamples": importance.RESAMPLES,
        }
        return env


def _finalize(value: Any) -> Markup:
    """Escapes what no filter has marked as safe."""
    if isinstance(value, Markup):
        return value
    return escape(value) if isinstance(value, str) else escape(str(value))


def markdown(facts: Facts, lang: Lang, plots: Mapping[str, str], data: str | None = None) -> str:
    """The tuning log in Markdown.

    Args:
        facts: See `search.report.facts.gather`.
        lang: en or zh.
        plots: Address of each plot by its name, such as `loss-curves`; plots that are missing are left out.
        data: Address of the file with all epochs; without one they are all written at the end.
    """
    renderer = Renderer(facts, lang, plots, data)
    text = renderer.templates().get_template(f"tuning-log.{lang}.md.jinja").render(facts=facts, record=facts.record)
    # Empty blocks leave blank lines behind.
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
