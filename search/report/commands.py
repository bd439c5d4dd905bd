"""The commands that a log prints: each goes on with the study that it is about, with that study's settings."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from search import records
from search.records import StudyRecord
from search.report.experiment import Experiment
from search.study import Study
from search.verdict.race import Verdict
from trainer.config import EMBEDDED, TrainConfig

WARM = ("freeze-thaw", "rungs")
"""Strategies that `--warm-start` is for."""


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


def search(
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
    words = ["python -m search.run", "--study", shlex.quote(_study(record))]
    words += [f"--set {text}" for text in settings.values()]
    words += ["--seed", str(seed)] if seed else []
    strategy = record.attrs.get("strategy")
    # A grid and the other samplers know no other than `joint`; with `tpe` a new study would begin with the default.
    unsaid = (*records.RETIRED_STRATEGIES, *(() if record.definition.get("sampler") == "tpe" else ("joint",)))
    if isinstance(strategy, Mapping) and strategy.get("strategy", "joint") not in unsaid:
        words += ["--strategy", str(strategy["strategy"])]
    if record.attrs.get(records.PRUNER):
        words += ["--pruner", str(record.attrs[records.PRUNER])]
    return " ".join([*words, *(shlex.quote(option) for option in options)])


def _study(record: StudyRecord) -> str:
    """What `--study` of a search takes: the file, where the study is not in studies/ under its own name."""
    return str(record.attrs.get(records.GIVEN_STUDY) or record.attrs.get("study", record.name))


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


def repeated(record: StudyRecord, verdict: Verdict | None, options: Sequence[str]) -> str | None:
    """The command that trains the leaders again with other seeds and splits, which also measures the noise.

    None where that has been done, as often as a decision is expected to take.
    """
    words = ["python -m search.confirm", "--study", shlex.quote(record.name)]
    if verdict is not None and verdict.kind == "undecided" and verdict.more is not None:
        left = sum(not standing.out for standing in verdict.standings)
        seeds = verdict.blocks + math.ceil(verdict.more / max(1, left))
        words += ["--top", str(len(verdict.standings)), "--seeds", str(seeds)]
    elif verdict is not None and verdict.kind != "running":
        return None
    return " ".join([*words, *(shlex.quote(option) for option in options)])


def changed(
    record: StudyRecord, experiments: Sequence[Experiment], changes: Mapping[str, str], options: Sequence[str]
) -> str:
    """The command that searches again with another base, beginning where this study found good rates."""
    strategy = record.attrs.get("strategy")
    warm = isinstance(strategy, Mapping) and strategy.get("strategy") in WARM
    generation = record.attrs.get("generation")
    named = f"{record.attrs.get('study', record.name)}-{generation}" if isinstance(generation, int) else record.name
    known = ["--warm-start", named] if warm else []
    return search(record, experiments, ["--fresh", *known, *options], changes)


def export(record: StudyRecord, options: Sequence[str]) -> str:
    """The command that hands over the adapter that the study names."""
    name = shlex.quote(record.name)
    words = ["python -m search.export", "--study", name, "--out", f"exported/{name}"]
    return " ".join([*words, *(shlex.quote(option) for option in options)])
