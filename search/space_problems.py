"""What a search space can give that TrainConfig does not accept: found before a trial would fail by it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from search.space import ALONE, Choice, Float, Int, Multiple, Space
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
                TrainConfig.parse({**values, **ALONE, name: value})
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


def pair_problems(space: Space, values: Mapping[str, Any]) -> Iterator[str]:
    """What no single value shows: a micro-batch that can be larger than its batch, dtypes that do not go together."""
    micro_batch = _micro_batch_problem(space, values)
    if micro_batch:
        yield micro_batch
    if {"base_dtype", "torch_dtype"} & set(space):
        lower = [dtype for dtype in _possible(space, values, "base_dtype") if dtype is not None]
        others = [dtype for dtype in _possible(space, values, "torch_dtype") if dtype != "float32"]
        if lower and others:
            yield (
                f"base_dtype can be {lower[0]} where torch_dtype is {others[0]}, but it is for adapters in float32: "
                "search one of the two"
            )


def _micro_batch_problem(space: Space, values: Mapping[str, Any]) -> str:
    if not {"micro_batch_size", "batch_size"} & set(space):
        return ""
    param = space.get("micro_batch_size")
    if isinstance(param, Multiple) and param.of == "batch_size":
        most = max(param.factors)
        return f"micro_batch_size can be {most:g} times batch_size, but must not be larger" if most > 1 else ""
    micro = [size for size in _possible(space, values, "micro_batch_size") if size is not None]
    smallest = min(_possible(space, values, "batch_size"))
    if not micro or max(micro) <= smallest:
        return ""
    return (
        f"micro_batch_size can be {max(micro)}, but must not be larger than batch_size, which can be {smallest}: "
        f"set micro_batch_size to {smallest} or less, or search batch_size from {max(micro)}"
    )
