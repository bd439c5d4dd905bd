"""What a search space can give that TrainConfig does not accept. On plain values, so that it need not know `Study`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from search.space import Choice, Float, Int, Multiple, Space
from trainer.common.errors import ConfigError, shown
from trainer.config import TrainConfig


def range_problems(space: Space, values: Mapping[str, Any]) -> Iterator[str]:
    """Values that the space can give and TrainConfig refuses; `values` are those of the base configuration."""
    for name, param in space.items():
        if isinstance(param, Multiple):
            problem = _multiple_problem(space, values, name, param)
            if problem:
                yield f"{name} is a multiple of {shown(param.of)}, {problem}"
                continue
        rules = {}
        for value in _possible(space, values, name):
            try:
                TrainConfig.parse({**values, "micro_batch_size": None, name: value})
            except ConfigError as error:
                rule = str(error).splitlines()[-1].strip(" -")
                rules[rule.partition(", but got")[0]] = rule
        yield from (f"search space of {name}: {rule}" for rule in rules.values())


def _multiple_problem(space: Space, values: Mapping[str, Any], name: str, param: Multiple) -> str:
    """What is wrong with the field that the parameter is a multiple of; empty if nothing is."""
    seen, of = {name}, param.of
    while True:
        if of not in values:
            return "which TrainConfig does not have"
        if of in seen:
            return "which is a multiple of itself"
        seen.add(of)
        below = space.get(of)
        if not isinstance(below, Multiple):
            break
        of = below.of
    numbers = _possible(space, values, of)
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in numbers):
        return "which is not a number"
    return ""


def _possible(space: Space, values: Mapping[str, Any], name: str) -> list[Any]:
    """Values of a field that stand for all it can have: if TrainConfig accepts them, it accepts the others.

    That holds because TrainConfig's rules are limits and kinds: a value within a range of real numbers shows whether
    whole numbers are required, two neighbours whether a multiple of whole numbers is whole.
    """
    match space.get(name):
        case Float(low=low, high=high):
            return [low, high, low + (high - low) * 0.381966] if low < high else [low]
        case Int(low=low, high=high):
            return [low, min(low + 1, high), high]
        case Choice(values=choices):
            return list(choices)
        case Multiple(of=of, factors=factors):
            return [value * factor for value in _possible(space, values, of) for factor in factors]
    return [values[name]]


def micro_batch_problem(space: Space, values: Mapping[str, Any]) -> str:
    """What is wrong if a micro-batch can be larger than its batch, which no single value shows; empty if it cannot."""
    if not {"micro_batch_size", "batch_size"} & set(space):
        return ""
    micro = [size for size in _possible(space, values, "micro_batch_size") if size is not None]
    smallest = min(_possible(space, values, "batch_size"))
    if not micro or max(micro) <= smallest:
        return ""
    return (
        f"micro_batch_size can be {max(micro)}, but must not be larger than batch_size, which can be {smallest}: "
        f"set micro_batch_size to {smallest} or less, or search batch_size from {max(micro)}"
    )
