"""The parameters of a search space: what may vary, between which values, on which scale.

Pure descriptions: `search.sampling.params` turns them into Optuna's distributions.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trainer.common.errors import ConfigError, shown
from trainer.config import MOST, TrainConfig

Scalar = float | int | str | bool


@dataclass(frozen=True)
class Float:
    """A real number in [low, high], uniform or log-uniform."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not _is_number(value):
                raise ValueError(f"Float needs a finite number as {name}, but got {shown(value)}")
        _check_range(self)

    def edges(self) -> tuple[Scalar, ...]:
        """The extreme values: if they are valid, so is the range."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Int:
    """A whole number in [low, high], uniform or log-uniform."""

    low: int
    high: int
    log: bool = False

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"Int needs a whole number as {name}, but got {shown(value)}")
        _check_range(self)

    def edges(self) -> tuple[Scalar, ...]:
        """The extreme values: if they are valid, so is the range."""
        return (self.low, self.high)


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Scalar | None, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.values, tuple | list):
            raise ValueError(f"Choice needs a tuple of values, but got {shown(self.values)}")
        for value in self.values:
            if not isinstance(value, float | int | str | bool | None):
                raise ValueError(f"Choice needs numbers, texts, True, False or None, but got {shown(value)}")
        if not self.values:
            raise ValueError("Choice needs at least one value, but got none")
        if len(set(self.values)) != len(self.values):
            raise ValueError(f"Choice names a value twice: {shown(self.values)}")

    def edges(self) -> tuple[Scalar | None, ...]:
        """All values: if they are valid, so is the choice."""
        return self.values


@dataclass(frozen=True)
class Multiple:
    """A whole multiple or fraction of another field, as LoRA's alpha is of its rank.

    Searching alpha / r rather than alpha keeps the size of the update (scaling = alpha / r, Hu et al. 2021)
    apart from its rank. In Optuna the parameter is called `<field>_per_<of>`, e.g. `lora_alpha_per_lora_r`.
    """

    of: str
    factors: tuple[float, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.of, str):
            raise ValueError(f"Multiple needs the name of a field, but got {shown(self.of)}")
        if not isinstance(self.factors, tuple | list):
            raise ValueError(f"Multiple needs a tuple of factors, but got {shown(self.factors)}")
        if not self.factors or not all(_is_number(factor) and factor > 0 for factor in self.factors):
            raise ValueError(f"Multiple needs positive factors, but got {shown(self.factors)}")
        if len(set(self.factors)) != len(self.factors):
            raise ValueError(f"Multiple names a factor twice: {shown(self.factors)}")


Param = Float | Int | Choice | Multiple
Space = Mapping[str, Param]


def _is_number(value: object) -> bool:
    """Whether the value is a number that a float can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return -sys.float_info.max <= value <= sys.float_info.max


def _check_range(param: Float | Int) -> None:
    if not isinstance(param.log, bool):
        raise ValueError(f"log must be True or False, but got {shown(param.log)}")
    if not param.low <= param.high:
        raise ValueError(f"low must not be above high, but got low={shown(param.low)}, high={shown(param.high)}")
    if param.log and param.low <= 0:
        raise ValueError(f"a log scale needs low > 0, but got low={shown(param.low)}")


def to_dict(space: Space) -> dict[str, dict[str, Any]]:
    """The space as plain data, as it is stored with a study: each param's fields and the name of its class."""
    return {
        field: {"type": type(param).__name__}
        | {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(param).items()}
        for field, param in space.items()
    }


def in_words(stored: Mapping[str, Any]) -> str:
    """A param of `to_dict` for people: `5e-06 to 0.001, log`, `8, 16, 32`, `1, 2, 4 x lora_r`."""
    values = [str(value) for value in stored.get("values", stored.get("factors", ()))]
    if "low" in stored:
        return f"{stored['low']:g} to {stored['high']:g}" + (", log" if stored.get("log") else "")
    return ", ".join(values) + (f" x {stored['of']}" if "of" in stored else "")


def from_dict(data: Mapping[str, Mapping[str, Any]]) -> dict[str, Param]:
    """The inverse of `to_dict`."""
    kinds: dict[str, Any] = {cls.__name__: cls for cls in (Float, Int, Choice, Multiple)}
    space = {}
    for field, stored in data.items():
        values = dict(stored)
        kind = kinds[values.pop("type")]
        space[field] = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
    return space


def param_name(field: str, param: Param) -> str:
    """The name under which Optuna knows the parameter of this field."""
    return f"{field}_per_{param.of}" if isinstance(param, Multiple) else field


def to_config(space: Space, base: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Field values from sampled params over the base values: plain params first, multiples after.

    Fields whose param is missing in `params` keep their base value.
    """
    values = dict(base)
    for field, param in space.items():
        if not isinstance(param, Multiple) and field in params:
            values[field] = params[field]
    for field in _multiples(space):
        param = space[field]
        name = param_name(field, param)
        if isinstance(param, Multiple) and name in params:
            values[field] = values[param.of] * params[name]
    return values


def _multiples(space: Space) -> list[str]:
    """The fields that are multiples, each after the one that it is a multiple of."""

    def depth(field: str, seen: tuple[str, ...] = ()) -> int:
        param = space.get(field)
        if not isinstance(param, Multiple) or field in seen:
            return 0
        return 1 + depth(param.of, (*seen, field))

    return sorted((field for field, param in space.items() if isinstance(param, Multiple)), key=depth)


def to_params(space: Space, values: Mapping[str, Any]) -> dict[str, Any]:
    """The params that give these field values: the inverse of `to_config`, for trials given by hand.

    Raises:
        ValueError: a value lies outside its range, so that Optuna could not hold it.
    """
    params: dict[str, Any] = {}
    for field, param in space.items():
        if field not in values:
            continue
        value = values[field]
        if isinstance(param, Multiple):
            value = values[param.of] and value / values[param.of]
        if not contains(param, value):
            raise ValueError(f"{field}={values[field]!r} lies outside its search range {param}")
        params[param_name(field, param)] = value
    return params


def size(space: Space) -> int | None:
    """How many configurations a space has; None if one of its ranges is continuous."""
    found = 1
    for param in space.values():
        values = _values(param)
        if values is None:
            return None
        found *= len(values)
    return found


def points(space: Space) -> Iterator[dict[str, Any]]:
    """All configurations of a finite space: params by Optuna's names."""
    names = [param_name(field, param) for field, param in space.items()]
    values = [_values(param) or () for param in space.values()]
    return (dict(zip(names, point, strict=True)) for point in itertools.product(*values))


def _values(param: Param) -> Sequence[Any] | None:
    """What Optuna's param can be; None for a continuous range."""
    match param:
        case Float(low=low, high=high):
            return (float(low),) if low == high else None
        case Int(low=low, high=high):
            return range(low, high + 1)
        case Choice(values=values):
            return values
        case Multiple(factors=factors):
            return factors
    raise TypeError(param)


def contains(param: Param, value: Any) -> bool:
    """Whether the param can take this value (for a Multiple, this factor)."""
    match param:
        case Float() | Int():
            whole = isinstance(param, Float) or value == int(value) if _is_number(value) else False
            return whole and param.low <= value <= param.high
        case Choice():
            return value in param.values
        case Multiple():
            return value in param.factors


def fits(space: Space) -> Callable[[str, Any], bool]:
    """Whether a value is one that the space has for the param of this name (Optuna's)."""
    params = {param_name(field, param): param for field, param in space.items()}
    return lambda name, value: name in params and contains(params[name], value)


ALONE: Mapping[str, Any] = {"batch_size": MOST, "micro_batch_size": None, "torch_dtype": "float32", "base_dtype": None}
"""Values of the fields that limit each other beside which each can have any of its own, see `space_problems`."""


def plain(space: Space) -> Space:
    """The space with choices as TrainConfig reads them: a number or a truth value where it was given as text (`"4"`).

    Raises:
        ValueError: a choice names such a value twice.
    """

    def read(name: str, value: Scalar | None) -> Scalar | None:
        if not isinstance(value, str):
            return value
        try:
            found = TrainConfig.parse({**ALONE, name: value}).model_dump()[name]
        except ConfigError:  # `range_problems` says why
            return value
        return found if isinstance(found, int | float) else value

    found = dict(space)
    for name, param in space.items():
        if isinstance(param, Choice) and name in TrainConfig.model_fields:
            try:
                found[name] = Choice(tuple(read(name, value) for value in param.values))
            except ValueError as error:
                raise ValueError(f"search space of {name}: {error}") from None
    return found
