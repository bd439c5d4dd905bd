"""Configurations that could begin next: drawn around good effective rates, over the whole space, and near the best.

What is drawn, sampled and recorded are always the study's own params; the effective rate only decides where.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from search import records
from search.planning.coordinates import model_rate
from search.planning.prior import Prior
from search.space import Choice, Float, Int, Multiple, Param, Space, param_name, points, size, to_config

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SOUND = {"lora_r": 8, "lora_alpha": 16}
"""The ladder's rank and alpha: the hand-run log's recommended start."""
BESIDE_RATE = ("lora_alpha", "batch_size")
"""Fields by which the ladder goes on where the learning rate's range ends."""
LADDER = 17
"""Rungs of the ladder of effective rates, over two prior widths to either side."""
DRAWN, UNIFORM, NEAR = 24, 12, 12
"""Candidates drawn from the prior of the effective rate, from the whole space, and near the best trials."""
NEAR_STEP = 0.15
"""Standard deviation of a step from a good trial's params, in their ranges."""
SHORT = 0.1
"""Place in the range of a warmup whose base value lies beyond: `rsicap`'s 100 steps are 1 % of a trial's. At the
range's end the best of a study with short trials lies 0.7 % higher (docs/search-quality.md)."""
KEPT = 0.6
"""Chance that a param of a good trial is kept in a variant of it."""
MOST_VALUES = 32
"""Values of a range, less one, that are tried to reach an effective rate."""
MOST_POINTS = 10_000
"""Configurations of a finite space that are gone through for those that are left."""
Values = dict[str, Any]
Key = tuple[tuple[str, str], ...]


class Candidates:
    """Draws params of a space.

    Args:
        space: The study's space.
        base: The resolved base configuration's values by field.
    """

    def __init__(self, space: Space, base: Mapping[str, Any]) -> None:
        self._space, self._base = space, dict(base)
        rate = space.get("learning_rate")
        self._rate = rate if isinstance(rate, Float) and rate.low > 0 else None

    def config(self, params: Mapping[str, Any]) -> Values:
        """The resolved configuration's values of these params."""
        return to_config(self._space, self._base, params)

    def draw(self, rng: np.random.Generator, prior: Prior, good: Sequence[Mapping[str, Any]]) -> list[Values]:
        """Params of candidates, without duplicates.

        Args:
            rng: Decides everything that is drawn.
            prior: Of log10 of the effective rate.
            good: Params of the best trials so far.
        """
        found: list[Values] = []
        if self._rate is not None:
            sound = self._sound()
            ladder = np.linspace(prior.centre - 2 * prior.width, prior.centre + 2 * prior.width, LADDER)
            found += [self._aimed(sound, float(z)) for z in ladder]
            drawn = rng.normal(prior.centre, prior.width, DRAWN)
            found += [self._aimed(self._uniform(rng), float(z)) for z in drawn]
        found += [self._uniform(rng) for _ in range(UNIFORM if self._rate is not None else UNIFORM + DRAWN)]
        found += [self._near(rng, good[i % len(good)]) for i in range(NEAR if good else 0)]
        return list({key(params): params for params in found}.values())

    def sound_at(self, rng: np.random.Generator, z: float) -> Values:
        """The ladder's params at this effective rate; any of a space without the learning rate.

        Where the learning rate's range ends, alpha goes on, then the batch: 1e-3, `rsicap`'s highest, is -2.1 with the
        ladder's alpha and batch, half a decade above the prior, and -1.6 with an alpha of 32 and a batch of 2.
        """
        if self._rate is None:
            return self._uniform(rng)
        params, warmup = self._sound(), self._space.get("warmup_steps")
        if isinstance(warmup, Int) and self._base["warmup_steps"] > warmup.high:
            params["warmup_steps"] = _at(warmup, SHORT)  # not its end: a base of another size says nothing of it
        for field in BESIDE_RATE:
            if field in self._space:
                params = self._reached(params, field, z)
        return self._aimed(params, z)

    def any_at(self, rng: np.random.Generator, z: float) -> Values:
        """Any params at this effective rate, where the space has the learning rate."""
        params = self._uniform(rng)
        return params if self._rate is None else self._aimed(params, z)

    def varied(self, rng: np.random.Generator, good: Mapping[str, Any], step: float) -> Values:
        """A good trial's params, some drawn anew, at an effective rate some steps of this size away."""
        params = {name: good[name] if rng.random() < KEPT else value for name, value in self._uniform(rng).items()}
        if self._rate is None:
            return params
        return self._aimed(params, model_rate(self.config(good)) + float(rng.normal(0, step)))

    def _reached(self, params: Values, field: str, z: float) -> Values:
        """The params with the field's value nearest to its own at which the learning rate's range holds this effective
        rate; where none is, with the one that comes nearest to it."""
        name, before = param_name(field, self._space[field]), self.config(params)[field]

        def distance(changed: Values) -> tuple[float, float]:
            reached, now = model_rate(self.config(self._aimed(changed, z))), self.config(changed)[field]
            return round(abs(reached - z), 6), abs(math.log(now / before))

        changed = [params, *({**params, name: value} for value in _values(self._space[field]))]
        usable = [each for each in changed if before > 0 and self.config(each)[field] > 0]
        return min(usable, key=distance, default=params)

    def _sound(self) -> Values:
        """Params of the base, with the ladder's rank and alpha, each moved into its range."""
        values = {**self._base, **SOUND}
        return {param_name(field, param): _nearest(param, field, values) for field, param in self._space.items()}

    def _uniform(self, rng: np.random.Generator) -> Values:
        return {param_name(field, param): _at(param, rng.random()) for field, param in self._space.items()}

    def _near(self, rng: np.random.Generator, good: Mapping[str, Any]) -> Values:
        found = {}
        for field, param in self._space.items():
            name = param_name(field, param)
            if name not in good:
                found[name] = _at(param, rng.random())
            elif isinstance(param, Float | Int):
                found[name] = _at(param, min(1.0, max(0.0, _place(param, good[name]) + rng.normal(0, NEAR_STEP))))
            else:
                found[name] = good[name] if rng.random() < 0.7 else _at(param, rng.random())
        return found

    def _aimed(self, params: Values, z: float) -> Values:
        """The params with the learning rate that gives this effective rate, as near as its range allows."""
        assert self._rate is not None
        now = self.config({**params, "learning_rate": 1.0})
        power = z - model_rate({**now, "learning_rate": 1.0})
        rate = 10.0 ** min(max(power, -300.0), 300.0)  # what an alpha of 1e-320 asks for is more than a float can hold
        return {**params, "learning_rate": min(max(rate, self._rate.low), self._rate.high)}


def key(params: Mapping[str, Any]) -> Key:
    """What tells configurations apart: the same params give equal keys."""
    return tuple(sorted((name, repr(value)) for name, value in params.items()))


def begun(trials: Sequence[FrozenTrial]) -> set[Key]:
    """The keys of configurations that have begun.

    A trial given by hand with other fields, too, lies beside the space: its params without those have still to come.
    """
    return {key(trial.params) for trial in trials if not trial.user_attrs.get(records.OVERRIDES)}


def left(space: Space, taken: Collection[Key]) -> list[Values]:
    """Configurations of a finite space that are not taken, by their keys; none of a continuous one."""
    if size(space) is None:
        return []
    return [point for point in itertools.islice(points(space), MOST_POINTS) if key(point) not in taken]


def _at(param: Param, place: float) -> Any:
    """The value at a place of the range, 0 to 1."""
    match param:
        case Float(low=low, high=high, log=log):
            value = low * (high / low) ** place if log else low + (high - low) * place
            return min(max(float(value), low), high)
        case Int(low=low, high=high, log=log):
            value = low * ((high + 1) / low) ** place if log else low + (high + 1 - low) * place
            return min(int(value), high)
        case Choice(values=values):
            return values[min(int(place * len(values)), len(values) - 1)]
        case Multiple(factors=factors):
            return factors[min(int(place * len(factors)), len(factors) - 1)]
    raise TypeError(param)


def _values(param: Param) -> list[Any]:
    """Numbers of the range: all of a finite one, 33 over another."""
    match param:
        case Multiple(factors=factors):
            return list(factors)
        case Choice(values=values):
            return [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        case Int(low=low, high=high) if high - low <= MOST_VALUES:
            return list(range(low, high + 1))
    return [_at(param, place / MOST_VALUES) for place in range(MOST_VALUES + 1)]


def _place(param: Float | Int, value: float) -> float:
    """Where a value lies in the range: the inverse of `_at`."""
    low, high = param.low, param.high + isinstance(param, Int)
    if high <= low:
        return 0.0
    value += 0.5 * isinstance(param, Int)
    return math.log(value / low) / math.log(high / low) if param.log else (value - low) / (high - low)


def _nearest(param: Param, field: str, values: Mapping[str, Any]) -> Any:
    """The param's value that comes nearest to the field's value; the middle of the range if the field has none."""
    match param:
        case Float() | Int() if values[field] is None:  # one that may be None, as micro_batch_size
            return _at(param, 0.5)
        case Float(low=low, high=high):
            return min(max(float(values[field]), low), high)
        case Int(low=low, high=high):
            return int(min(max(values[field], low), high))
        case Multiple(factors=factors) if values[field] is None:
            return _at(param, 0.5)
        case Multiple(of=of, factors=factors):
            wanted = values[field] / values[of] if values[of] else factors[0]
            return min(factors, key=lambda factor: abs(factor - wanted))
        case Choice(values=choices):
            if values[field] in choices:
                return values[field]
            numbers = [c for c in choices if isinstance(c, int | float) and isinstance(values[field], int | float)]
            return min(numbers, key=lambda c: abs(c - values[field])) if numbers else choices[0]
    raise TypeError(param)
