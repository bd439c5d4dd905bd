"""What is known of good effective rates before a study begins: from published runs, and from earlier studies.

All of it is in log10 of the model's rate (`coordinates.model_rate`), which is z at a batch of 4 and rank 8.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import PurePosixPath
from typing import Any

from search.planning.coordinates import DECAYING

SHARPNESS = 0.01
"""A run whose loss is 1 % above the best of its study counts 1/e as much."""
LEAST_WIDTH = 0.3
"""Decades. A task of another size has its optimum elsewhere: -2.6 to -2.3 on the embedded model's three."""
DEFAULT_WIDTH = 0.5
ELSEWHERE = 0.5
"""Decades by which a prior is widened for each condition in which its runs differ from the study that begins.

The tables' best tenth moves by half a decade between 1 and 20 epochs, and by 0.2 between two tasks that differ in
samples, modules and epochs (docs/search-quality.md, "One steep direction"). The larger is taken for each condition:
how far one alone moves it was measured for epochs only."""
MUCH = 4
"""Numbers of samples or epochs differ if one is more than so many times the other: with four times the samples, the
second of the tables has its optimum where the first has it, within 0.2 decades."""


@dataclass(frozen=True)
class Conditions:
    """What moves the best effective rate, as far as it is known: None is not."""

    model: str | None = None
    """The last part of its path or hub id: hosts have the same one in different folders."""
    modules: frozenset[str] | None = None
    """Endings of the adapted modules' names."""
    samples: int | None = None
    epochs: int | None = None
    decays: bool | None = None
    """Whether the learning rate falls after its warmup. The model's rate knows that its mean is half as high then; the
    best one is higher still after 20 epochs."""

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Conditions:
        """What a configuration says, fields of another kind left out: recorded runs may have any.

        Args:
            config: Values by field of TrainConfig; `model_name`, as recorded runs have it, is `model`.
        """
        model, modules = config.get("model", config.get("model_name")), config.get("target_modules")
        endings = modules if isinstance(modules, list | tuple) and all(isinstance(m, str) for m in modules) else None
        schedule = config.get("lr_scheduler_type")
        return cls(
            model=_name(model) if isinstance(model, str) else None,
            modules=frozenset(endings) if endings else None,
            samples=_count(config.get("max_samples")),
            epochs=_count(config.get("num_epochs")),
            decays=schedule in DECAYING if isinstance(schedule, str) else None,
        )

    @classmethod
    def usual(cls, runs: Sequence[Conditions]) -> Conditions:
        """Of each condition what most of the runs have; unknown where most do not say it."""
        values = {each.name: [getattr(run, each.name) for run in runs] for each in fields(cls)}
        return cls(**{name: Counter(found).most_common(1)[0][0] for name, found in values.items() if found})

    def differences(self, other: Conditions) -> tuple[str, ...]:
        """The conditions, known of both, in which the two differ."""
        known = {each.name: (getattr(self, each.name), getattr(other, each.name)) for each in fields(self)}
        return tuple(name for name, (a, b) in known.items() if a is not None and b is not None and _differ(a, b))


def _differ(one: Any, other: Any) -> bool:
    if type(one) is int:
        return bool(max(one, other) > MUCH * min(one, other))
    return bool(one != other)


def _count(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _name(model: str) -> str:
    """The last part of a path or hub id; of a path into the hub's cache, the id's."""
    parts = PurePosixPath(model.lower()).parts
    cached = [part.rpartition("--")[2] for part in parts if part.startswith("models--")]
    return (cached or parts or ("",))[-1]


@dataclass(frozen=True)
class Prior:
    """A normal distribution of log10 of the best rate, in the unit of `coordinates.model_rate`."""

    centre: float = -2.6
    """The author of the hand-run log published five runs of InstructBLIP-FlanT5-XL on 2,068 images of RSICap
    (tests/data/recorded-runs.json). In z = rate x alpha / sqrt(batch), where this was read, the lowest losses are
    after 6 epochs at -2.30 and -2.73, after 8 at -2.30 and -2.86, of all at -2.73, -2.86 and -2.30: -2.66 by
    `from_runs`. In the model's rate, rate x alpha / batch^0.75 / r^0.25, where it is used, those three lie at -3.23,
    -2.98 and -2.47, since their batches are of 10 and 12, two ranks are 16 and the first one's rate falls: -2.98 by
    `from_runs`. The best tenth of the tables `aerial` and `mixed` has its median at -2.68 and -2.62 there. So this is
    0.4 decades above the real runs, within its width."""
    width: float = DEFAULT_WIDTH
    """Standard deviation in decades."""

    def widened(self, differences: int) -> Prior:
        """What it says of a study that differs in so many conditions from the runs that it is made of."""
        return Prior(self.centre, math.hypot(self.width, ELSEWHERE * math.sqrt(differences)))


def from_runs(runs: Iterable[tuple[float, float]]) -> Prior | None:
    """The prior that runs of one study give: the better a run, the more its effective rate counts.

    Args:
        runs: (log10 of the effective rate, lowest validation loss) of each, losses comparable with each other.

    Returns:
        None without a run whose rate and loss are finite.
    """
    known = [(z, math.log(loss)) for z, loss in runs if math.isfinite(z) and math.isfinite(loss) and loss > 0]
    if not known:
        return None
    lowest = min(loss for _, loss in known)
    weights = [math.exp(-(loss - lowest) / SHARPNESS) for _, loss in known]
    total = sum(weights)
    centre = sum(w * z for w, (z, _) in zip(weights, known, strict=True)) / total
    spread = math.sqrt(sum(w * (z - centre) ** 2 for w, (z, _) in zip(weights, known, strict=True)) / total)
    effective = total**2 / sum(w * w for w in weights)
    return Prior(centre, max(LEAST_WIDTH, math.hypot(spread, DEFAULT_WIDTH / math.sqrt(1 + effective))))


def combined(priors: Sequence[Prior]) -> Prior:
    """The product of several priors that know of each other's studies nothing, never narrower than `LEAST_WIDTH`.

    Each counts by its precision: one that was `widened` moves the centre less than one of nearer runs.
    """
    precision = sum(1 / p.width**2 for p in priors)
    centre = sum(p.centre / p.width**2 for p in priors) / precision
    return Prior(centre, max(LEAST_WIDTH, math.sqrt(1 / precision)))
