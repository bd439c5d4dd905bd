"""What to run next, as facts and commands: untested regions, parameters at the edge of their range, open questions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from search import records
from search.diagnosis import finding as ids
from search.leaderboard import LOG_FIELDS
from search.records import StudyRecord
from search.report.experiment import UNFINISHED, Experiment
from search.report.summary import Recommended
from search.space import Choice, Float, Int, Multiple, Space, from_dict
from search.study import Study
from search.verdict.race import Verdict
from trainer.config import EMBEDDED, MACHINE_FIELDS, TrainConfig

NEAR_EDGE = 0.05
"""Share of a range, on its own scale, within which a value lies at the edge."""
WIDE_GAP = 0.35
"""Share of a range without a trial from which it is called untested. A batch size tried at 2, 4, 8 and 16 leaves gaps
of a third."""


@dataclass(frozen=True, kw_only=True)
class Edge:
    """The best trial lies at the edge of a parameter's range."""

    name: str
    value: float
    edge: float
    is_low: bool


@dataclass(frozen=True, kw_only=True)
class Gap:
    """The widest part of a parameter's range in which no trial lies."""

    name: str
    low: float
    high: float
    share: float


@dataclass(frozen=True, kw_only=True)
class NextSteps:
    """Open questions, and the commands that would answer them."""

    waiting: tuple[int, ...]
    edges: tuple[Edge, ...]
    gaps: tuple[Gap, ...]
    long_warmups: tuple[int, ...]
    """Trials whose warmup was longer than their training, if they are at least half of all trials."""
    warmup_limit: int | None
    """A tenth of the steps of such a trial, the share in the hand-run log."""
    untried: tuple[tuple[str, tuple[Any, ...]], ...]
    """(parameter, its values that no trial had), for parameters with a few values."""
    more: str
    """Command that continues the study."""
    more_trials: int
    longer: str | None
    """Command that starts over with more epochs, where the best trial's loss was still falling."""
    longer_epochs: int | None
    repeats: tuple[str, ...]
    """Commands that train the best configuration with another seed, and the runner-up's if it is as good; none once
    the study has measured its noise itself."""
    confirm: str | None
    """Command that repeats the leaders further, where that has not decided it yet."""


def next_steps(
    record: StudyRecord,
    experiments: Sequence[Experiment],
    best: Recommended | None,
    options: Sequence[str],
    verdict: Verdict | None = None,
) -> NextSteps:
    """What to run next.

    Args:
        options: Further options of the search's command line, such as `--runs-dir`, that its continuation needs.
        verdict: What repeats of the leaders have shown.
    """
    finished = [e for e in experiments if e.record.state not in UNFINISHED]
    space = from_dict(record.definition.get("space", {}))
    more = _more_trials(experiments)
    longer = _longer(best)
    long_warmups = [e for e in finished if e.has(ids.WARMUP_EXCEEDS_TRAINING)]
    often = bool(long_warmups) and 2 * len(long_warmups) >= len(finished)
    totals = [total for e in long_warmups if (total := e.tag("total_steps")) is not None]
    return NextSteps(
        waiting=tuple(e.number for e in experiments if e.record.state == "WAITING"),
        edges=tuple(_edges(space, best)),
        gaps=tuple(_gaps(space, finished)),
        long_warmups=tuple(e.number for e in long_warmups) if often else (),
        warmup_limit=int(median(totals) / 10) if often and totals else None,
        untried=tuple(_untried(space, finished)),
        more=_search(record, experiments, ["--trials", str(more), *options]),
        more_trials=more,
        longer=None
        if longer is None
        else _search(record, experiments, ["--fresh", *options], {"num_epochs": str(longer)}),
        longer_epochs=longer,
        repeats=() if verdict is not None else tuple(_repeats(best)),
        confirm=_confirm(record, verdict, options),
    )


def _more_trials(experiments: Sequence[Experiment]) -> int:
    """The trials so far and half as many again, at least six: enough for TPE to build on."""
    done = sum(1 for e in experiments if records.RESUMES not in e.record.attrs)
    return done + max(6, math.ceil(done / 2))


def _longer(best: Recommended | None) -> int | None:
    if best is None:
        return None
    for found in best.best.findings:
        for item in found.advice:
            if found.id == ids.TOO_SLOW and item.parameter == "num_epochs" and isinstance(item.after, int | float):
                return int(item.after)
    return None


def _position(param: Float | Int, value: float) -> float:
    """Where a value lies in its range, 0 to 1, on the range's own scale."""
    if param.high == param.low:
        return 0.5
    if param.log:
        return math.log(value / param.low) / math.log(param.high / param.low)
    return float((value - param.low) / (param.high - param.low))


def _value(param: Float | Int, position: float) -> float:
    """The inverse of `_position`."""
    if param.log:
        return float(param.low * (param.high / param.low) ** position)
    return float(param.low + position * (param.high - param.low))


def _edges(space: Space, best: Recommended | None) -> list[Edge]:
    found = []
    for name, param in space.items():
        if best is None:
            break
        value = best.best.record.config.get(name)
        if isinstance(param, Multiple):
            partner = best.best.record.config.get(param.of)
            low, high = min(param.factors), max(param.factors)
            if value and partner and len(param.factors) > 2 and value / partner in (low, high):
                factor = value / partner
                found.append(Edge(name=f"{name}/{param.of}", value=factor, edge=factor, is_low=factor == low))
        elif isinstance(param, Float | Int) and isinstance(value, int | float) and param.high > param.low:
            position = _position(param, value) if value > 0 or not param.log else 0.0
            # Zero dropout or warmup is not an edge that could be moved.
            if position <= NEAR_EDGE and param.low > 0:
                found.append(Edge(name=name, value=value, edge=param.low, is_low=True))
            elif position >= 1 - NEAR_EDGE:
                found.append(Edge(name=name, value=value, edge=param.high, is_low=False))
    return found


def _gaps(space: Space, finished: Sequence[Experiment]) -> list[Gap]:
    found = []
    for name, param in space.items():
        if not isinstance(param, Float | Int) or param.high <= param.low:
            continue
        values = [e.record.config[name] for e in finished if name in e.record.config]
        inside = sorted({_position(param, v) for v in values if param.low <= v <= param.high})
        points = [0.0, *inside, 1.0]
        width, start = max(((b - a, a) for a, b in pairwise(points)), key=lambda item: (item[0], -item[1]))
        if width > WIDE_GAP:
            low, high = _value(param, start), _value(param, start + width)
            found.append(Gap(name=name, low=low, high=high, share=width))
    return found


def _untried(space: Space, finished: Sequence[Experiment]) -> list[tuple[str, tuple[Any, ...]]]:
    found: list[tuple[str, tuple[Any, ...]]] = []
    for name, param in space.items():
        if isinstance(param, Choice):
            tried = {e.record.config.get(name) for e in finished}
            found.append((name, tuple(v for v in param.values if v not in tried)))
        elif isinstance(param, Multiple):
            configs = [e.record.config for e in finished if e.record.config.get(param.of)]
            ratios = {c[name] / c[param.of] for c in configs if name in c}
            found.append((f"{name}/{param.of}", tuple(v for v in param.factors if v not in ratios)))
    return [(name, missing) for name, missing in found if missing]


def setting(name: str, value: Any) -> str:
    """`name=value` as `--set` reads it, quoted for a shell."""
    if isinstance(value, list | tuple):
        text = ",".join(map(str, value))
    elif value is None:
        text = "none"
    elif isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        text = str(int(value))
    else:
        text = str(value)
    return shlex.quote(f"{name}={text}")


def _search(
    record: StudyRecord,
    experiments: Sequence[Experiment],
    options: Sequence[str],
    changes: Mapping[str, str] | None = None,
) -> str:
    """A command line of the search with this study's settings."""
    given = record.attrs.get(records.SETTINGS)
    settings: dict[str, str] = {}
    if isinstance(given, list):
        for item in given:
            name, _, text = str(item).partition("=")
            settings[name] = shlex.quote(f"{name}={text}")
    else:
        settings = {name: setting(name, value) for name, value in _not_default(record, experiments).items()}
    settings |= {name: f"{name}={text}" for name, text in (changes or {}).items()}
    seed = record.definition.get("seed") or 0
    words = ["python -m search.run", "--study", shlex.quote(str(record.attrs.get("study", record.name)))]
    words += [f"--set {text}" for text in settings.values()]
    words += ["--seed", str(seed)] if seed else []
    strategy = record.attrs.get("strategy")
    if isinstance(strategy, Mapping) and strategy.get("strategy", "joint") != "joint":
        words += ["--strategy", str(strategy["strategy"])]
    return " ".join([*words, *(shlex.quote(option) for option in options)])


def _not_default(record: StudyRecord, experiments: Sequence[Experiment]) -> dict[str, Any]:
    """Base values that are not TrainConfig's own: said again they change nothing, left out they might."""
    defaults = {**TrainConfig().model_dump(mode="json"), "patience": Study.patience, "min_delta": Study.min_delta}
    base = {**record.definition.get("base", {}), **record.attrs.get(records.STOP_RULE, {})}
    space = record.definition.get("space", {})
    found = {k: v for k, v in base.items() if k not in space and k in defaults and v != defaults[k]}
    for name in ("model", "data"):
        places = {e.record.config.get(name) for e in experiments if e.record.config}
        if len(places) == 1 and (place := places.pop()) not in (None, EMBEDDED):
            found[name] = place
    return found


def _repeats(best: Recommended | None) -> list[str]:
    if best is None:
        return []
    tied = best.runner_up is not None and best.runner_up.number in best.within_noise
    wanted = [best.best, *([best.runner_up] if best.runner_up is not None and tied else [])]
    return [_train(e) for e in wanted]


def _confirm(record: StudyRecord, verdict: Verdict | None, options: Sequence[str]) -> str | None:
    """The command that repeats the leaders as often as a decision is expected to take."""
    if verdict is None or verdict.kind != "undecided" or verdict.more is None:
        return None
    left = sum(not standing.out for standing in verdict.standings)
    seeds = verdict.blocks + math.ceil(verdict.more / max(1, left))
    words = ["python -m search.confirm", "--study", shlex.quote(record.name)]
    words += ["--top", str(len(verdict.standings)), "--seeds", str(seeds)]
    return " ".join([*words, *(shlex.quote(option) for option in options)])


def _train(experiment: Experiment) -> str:
    """The command that trains the trial's configuration with the next seed."""
    defaults = TrainConfig().model_dump(mode="json")
    config = experiment.record.config
    seed = int(config.get("seed", 42)) + 1
    order = [*LOG_FIELDS, *(name for name in config if name not in LOG_FIELDS)]
    words = [
        f"--set {setting(name, config[name])}"
        for name in order
        if name in config
        and name not in ("seed", *MACHINE_FIELDS)
        and (name in LOG_FIELDS or config[name] != defaults.get(name))
    ]
    out = f"runs/repeats/trial-{experiment.number}-seed-{seed}"
    return " ".join(["python -m trainer.run", *words, f"--set seed={seed}", "--out", out])
