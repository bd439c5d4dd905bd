"""What can be wrong with a study's definition, all of it found before anything is written or started.

A definition that passes has nothing left that could fail in a trial: every configuration that its space can give is
one that TrainConfig takes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from search.space import Choice, Float, Int, Multiple, Param, Space
from trainer.common.errors import ConfigError, nearest, shown
from trainer.config import MOST, TrainConfig

if TYPE_CHECKING:
    from search.study import Study

SAMPLERS = ("tpe", "random", "grid")
LIMITS = {"n_trials": (1, MOST), "seed": (0, 2**32 - 1)}
"""(Smallest, largest) value. NumPy takes no larger seed."""
MOST_CHARACTERS = 100
"""Of a study's name: it names folders and MLflow's experiments."""
RESERVED = re.compile(r"artifacts|dashboard|.*\.(db|lock)(-.*)?", re.IGNORECASE)
"""Names that lie in the runs folder beside the studies' folders."""


def form_problems(study: Study) -> Iterator[str]:
    """Fields that are of another kind than they must be; nothing else can be judged while there are any."""
    if not isinstance(study.name, str):
        yield f"name must be a text, but got {shown(study.name)}"
    for field in ("description", "get_data", "get_model"):
        if not _is_text(getattr(study, field)):
            yield f"{field} must be a text, but got {shown(getattr(study, field))}"
    if study.data_env is not None and not (_is_text(study.data_env) and re.fullmatch(r"\w+", study.data_env)):
        yield f"data_env must name an environment variable, but got {shown(study.data_env)}"
    for field in LIMITS:
        value = getattr(study, field)
        if isinstance(value, bool) or not isinstance(value, int):
            yield f"{field} must be a whole number, but got {shown(value)}"
    if study.sampler not in SAMPLERS:
        hint = nearest(study.sampler, SAMPLERS) if isinstance(study.sampler, str) else ""
        yield f"sampler must be one of {', '.join(SAMPLERS)}, but got {shown(study.sampler)}{hint}"
    yield from _mapping_problems("base", study.base)
    yield from _mapping_problems("space", study.space)
    if isinstance(study.space, Mapping):
        for name, param in study.space.items():
            if not isinstance(param, Param):
                yield f"space must give {shown(name)} a Float, Int, Choice or Multiple, but got {shown(param)}"
    if not isinstance(study.enqueue, tuple | list):
        yield f"enqueue must be a tuple of Fixed(...), but got {shown(study.enqueue)}"
        return
    yield from _enqueue_problems(study)


def _enqueue_problems(study: Study) -> Iterator[str]:
    from search.study import Fixed

    for fixed in study.enqueue:
        if not isinstance(fixed, Fixed):
            yield f"enqueue must be a tuple of Fixed(...), but has {shown(fixed)}"
            continue
        for field in ("label", "note"):
            if not _is_text(getattr(fixed, field)):
                yield f"the {field} of a trial given by hand must be a text, but got {shown(getattr(fixed, field))}"
        yield from _mapping_problems(f"config of the trial given by hand {shown(fixed.label)}", fixed.config)


def _mapping_problems(what: str, value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{what} must be a dict of fields, but got {shown(value)}"
        return
    for name in value:
        if not isinstance(name, str):
            yield f"{what} must name fields of TrainConfig, but has {shown(name)}"


def _is_text(value: object) -> bool:
    """Whether it can be printed and stored: half a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def limit_problems(study: Study) -> Iterator[str]:
    """Numbers of the right kind that are too small or too large."""
    for field, (low, high) in LIMITS.items():
        value = getattr(study, field)
        if value < low:
            yield f"{field} must be at least {low}, but got {shown(value)}"
        if value > high:
            yield f"{field} must be at most {high}, but got {shown(value)}"


def name_problems(name: str) -> Iterator[str]:
    """What keeps a text from naming a study, its folder and its experiment."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        yield f"the name must be letters, digits, '_', '-' and '.', but got {shown(name)}"
    elif len(name) > MOST_CHARACTERS:
        yield f"the name must have at most {MOST_CHARACTERS} characters, but {shown(name, 40)} has {len(name)}"
    elif RESERVED.fullmatch(name):
        yield f"the name {name!r} is that of a file or folder beside the studies; take another"


def range_problems(space: Space, values: Mapping[str, Any]) -> Iterator[str]:
    """Values that the space can give and TrainConfig does not take; `values` are those of the base configuration."""
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
    """What is wrong with the field it is a multiple of; empty if nothing is."""
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
        return "which is no number"
    return ""


def _possible(space: Space, values: Mapping[str, Any], name: str) -> list[Any]:
    """Values of a field that stand for all it can take: if they are possible, so are the others.

    That holds as TrainConfig's rules are limits, and kinds: a value within a range of real numbers shows whether
    whole ones are asked for, two neighbours whether a multiple of whole numbers is whole.
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
    """Whether a micro-batch could be larger than its batch, which one value alone does not show."""
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
