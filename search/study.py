"""`Study`: the definition of a search, and everything that can be wrong with one.

All of it is found before anything is written or started. A definition that passes has nothing left that could fail in
a trial: TrainConfig accepts every configuration that its space can give.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from search.errors import StudyError
from search.records import SAMPLE_FIELDS
from search.space import (
    Choice,
    Multiple,
    Param,
    Space,
    param_name,
    plain,
    to_config,
    to_dict,
    to_params,
)
from search.space_problems import pair_problems, range_problems
from trainer.common.errors import ConfigError, nearest, shown
from trainer.config import (
    MACHINE_FIELDS,
    MOST,
    RETIRED,
    TrainConfig,
    default,
    field_hint,
    read_settings,
    without_later,
    without_retired,
)

LOCATION_FIELDS = ("model", "data")
"""Where the model and the data lie may differ between machines; their fingerprints may not."""

Sampler = Literal["tpe", "random", "grid"]
Objective = Literal["loss", "cider"]
Screen = Literal["TF32", "bfloat16"]
SCREENS: Mapping[str, Mapping[str, Any]] = {
    "TF32": {"matmul_precision": "high"},
    "bfloat16": {"base_dtype": "bfloat16"},
}
"""The fields by which trials are trained in a faster precision."""
BY_LOSS = ("freeze-thaw", "rungs")
"""Strategies and pruners that decide by losses alone which trial is worth more."""
LIMITS = {"n_trials": (1, MOST), "seed": (0, 2**32 - 1), "patience": (1, MOST)}
"""(Smallest, largest) value of whole numbers. NumPy takes no larger seed."""
MOST_CHARACTERS = 100
"""In a study's name, which names folders and MLflow's experiments."""
RESERVED = re.compile(r"artifacts|dashboard|.*\.(db|lock)(-.*)?", re.IGNORECASE)
"""Names of other files and folders in the runs folder."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A trial given by hand, run before anything is sampled."""

    label: str
    config: Mapping[str, Any]
    """Values over the study's base; fields outside the search space are allowed."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is searched: the space, what stays fixed, the budget, and when a trial stops early.

    Raises:
        StudyError: everything wrong with the definition, in one message.
    """

    name: str
    description: str
    """One line, printed by `--list`."""
    space: Space
    base: Mapping[str, Any] = field(default_factory=dict)
    """Values over TrainConfig's defaults, the same for every trial."""
    n_trials: int
    """Trials in total; `--trials` overrides it."""
    sampler: Sampler = "tpe"
    enqueue: tuple[Fixed, ...] = ()
    patience: int = 3
    """Evaluations in a row without a new best before validation loss counts as rising. Real curves set a record
    after two flat epochs, never after three (tests/search/test_pruning.py holds it to the recorded runs)."""
    min_delta: float = 0.0
    """A validation loss is a new best if it is lower by more than this."""
    data_env: str | None = None
    """Environment variable that names the data folder."""
    get_data: str = ""
    """How to get the data, printed if it is missing."""
    get_model: str = ""
    """How to get the model, printed if it is missing."""
    seed: int = 0
    """Seed of the sampler."""
    screen: Screen | None = None
    """A faster precision for the trials; the leaders' repeats, by which the verdict is made, have the base's own."""
    objective: Objective = "loss"
    """What trials are ranked by: their lowest validation loss, or CIDEr-D of the captions that the checkpoint of that
    loss gives all validation images. Rules that stop a trial early see its losses either way."""

    def __post_init__(self) -> None:
        problems = []
        if not any(_form_problems(self)):
            try:
                object.__setattr__(self, "space", plain(self.space))
            except ValueError as error:
                problems.append(str(error))
        problems += _problems(self)
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise StudyError(f"the study {shown(self.name)} is wrong:\n{lines}")
        # Plain values from here on: they go to other processes and into a database.
        object.__setattr__(self, "base", _plain(self.base, self.base))
        enqueue = (replace(f, config=_plain(f.config, {**self.base, **f.config})) for f in self.enqueue)
        object.__setattr__(self, "enqueue", tuple(enqueue))

    def models(self) -> tuple[str, ...]:
        """The models that trials may have: the base's, those of trials given by hand, those of the space."""
        base = self.base_config().model
        param = self.space.get("model")
        chosen = param.values if isinstance(param, Choice) else ()
        named = [*(fixed.config["model"] for fixed in self.enqueue if "model" in fixed.config), *chosen]
        return tuple(dict.fromkeys([base, *map(str, named)]))

    def base_config(self) -> TrainConfig:
        """The configuration of a trial before anything is sampled."""
        return TrainConfig.parse({**self.base, **SCREENS.get(self.screen or "", {})})

    def most_epochs(self) -> int:
        """Epochs of the longest trial that it samples: the base's, or the most that its space has."""
        param = self.space.get("num_epochs")
        edges = () if param is None or isinstance(param, Multiple) else param.edges()
        lengths = [TrainConfig.parse({**self.base, "num_epochs": edge}).num_epochs for edge in edges]
        return max(lengths, default=self.base_config().num_epochs)

    def unscreened(self) -> dict[str, Any]:
        """The fields that `screen` changes, with the base's own values."""
        own = TrainConfig.parse(self.base).model_dump()
        return {name: own[name] for name in SCREENS.get(self.screen or "", {})}

    def config(self, params: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """The resolved configuration of a trial with these params.

        Args:
            params: By Optuna's names.
            overrides: A fixed trial's fields outside the space; a repeat's may be searched, and count.
        """
        # Overrides are stored with a trial, so those of an older version may name retired fields.
        base = {**self.base_config().model_dump(), **without_retired(overrides or {})}
        return TrainConfig.parse({**to_config(self.space, base, params), **without_retired(overrides or {})})

    def with_settings(self, settings: Iterable[str], seed: int | None = None) -> Study:
        """The study with `key=value` settings over its base, or of its `patience` and `min_delta`.

        A setting of a searched field fixes that field.

        Raises:
            ConfigError: everything wrong with the settings, in one message.
        """
        values = read_settings(settings)
        checked = _Settings.parse({**self.base, **values})  # before they become the study's, in whose name errors are
        rule = {name: getattr(checked, name) for name in (*self.stop_rule(), "screen", "objective") if name in values}
        values = {name: value for name, value in values.items() if name not in rule}
        if rule.get("screen") == "none":
            rule["screen"] = None
        space = {name: param for name, param in self.space.items() if name not in values}
        for name, param in self.space.items():
            if isinstance(param, Multiple) and name in values:
                space.pop(name, None)
        # What a given trial does not name it has from the base: with data of its own it could not be compared.
        enqueue = tuple(replace(fixed, config=self._with(fixed.config, values, checked)) for fixed in self.enqueue)
        return replace(
            self,
            base={**self.base, **values},
            space=space,
            enqueue=enqueue,
            seed=self.seed if seed is None else seed,
            **rule,
        )

    def _with(self, config: Mapping[str, Any], values: Mapping[str, Any], read: TrainConfig) -> dict[str, Any]:
        """A given trial's fields with these values over them. One that is searched as a multiple of one of these keeps
        its ratio: an alpha of 16 for a rank of 8 is 64 for a rank of 32, and lies in its range as before."""
        found = {name: values.get(name, value) for name, value in config.items()}
        before = {**TrainConfig().model_dump(), **self.base, **config}
        for name, param in self.space.items():
            if isinstance(param, Multiple) and name in config and name not in values and param.of in values:
                of, now, own = before[param.of], getattr(read, param.of), config[name]
                if all(isinstance(n, int | float) and n for n in (of, now, own)):
                    ratio = own / of * now
                    found[name] = int(ratio) if isinstance(own, int) and ratio == int(ratio) else ratio
        return found

    def located(self) -> Study:
        """The study with the data folder that the environment names, if it does."""
        root = os.environ.get(self.data_env) if self.data_env else None
        if root:
            return replace(self, base={**self.base, "data": root})
        return self

    def definition(self) -> dict[str, Any]:
        """Everything that decides what its trials compute, as plain data; it may not change while a study goes on."""
        base = self.base_config().model_dump(mode="json")
        for name in (*MACHINE_FIELDS, *LOCATION_FIELDS):
            base.pop(name)
        found = {"space": to_dict(self.space), "base": without_later(base), "sampler": self.sampler, "seed": self.seed}
        # Left out where it is what earlier versions did, whose studies go on.
        return found if self.objective == "loss" else {**found, "objective": self.objective}

    def check_way(self, strategy: str | None, pruner: str | None, *, repeats: bool) -> None:
        """Make sure that what the study samples and is ranked by goes with how it is searched.

        Args:
            strategy: `--strategy`; None for the default.
            pruner: `--pruner`; None likewise.
            repeats: Whether repeats of the leaders are asked for.

        Raises:
            StudyError: it does not.
        """
        if self.sampler == "grid" and strategy not in (None, "joint"):
            raise StudyError(
                f"the study {shown(self.name)} is a grid, whose points are given: leave out --strategy {strategy}"
            )
        if self.objective != "cider":
            return
        wrong = [f"--strategy {strategy}"] if strategy in BY_LOSS else []
        wrong += [f"--pruner {pruner}"] if pruner in BY_LOSS else []
        wrong += ["repeats of the leaders (search.confirm, --top, --seeds)"] if repeats else []
        if wrong:
            raise StudyError(
                f"the study {shown(self.name)} ranks trials by CIDEr-D (objective='cider'), but these compare them by "
                f"their losses: {', '.join(wrong)}; leave them out, or take objective='loss'"
            )

    def stop_rule(self) -> dict[str, float]:
        """When its trials stop early, as plain data; it may change, since it does not alter what a trial computes."""
        return {"patience": self.patience, "min_delta": self.min_delta}


class _Settings(TrainConfig):
    """What `--set` of a search can name: a training run's fields, a study's rule for stopping early and its screen."""

    patience: Annotated[int, Field(ge=LIMITS["patience"][0], le=LIMITS["patience"][1])] = Study.patience
    min_delta: Annotated[float, Field(ge=0)] = Study.min_delta
    screen: Screen | Literal["none"] | None = None
    objective: Objective = Study.objective


def _problems(study: Study) -> Iterator[str]:
    """Everything wrong with a definition, one message each."""
    form = list(_form_problems(study))
    yield from form
    if isinstance(study.name, str):
        yield from _name_problems(study.name)
    if form:
        return
    yield from _limit_problems(study)
    valid = list(TrainConfig.model_fields)
    if not study.space and not study.enqueue:
        yield "the search space is empty and no trial is given by hand: there is nothing to run"
    if (
        study.base.get("full_data")
        or any(f.config.get("full_data") for f in study.enqueue)
        or "full_data" in study.space
    ):
        yield "full_data trains on the rows that trials are judged by; it is for trainer.run --from-study --full-data"
    yield from _screen_problems(study)
    for name in study.space:
        if name in SAMPLE_FIELDS or name == "data":
            yield (
                f"search space of {name}: trials would be validated on different samples, and the easiest would win; "
                "set it in base, or give trials by hand, which are compared with those on the same samples alone"
            )
    unknown = [name for name in study.space if name not in valid]
    for name in unknown:
        if name in RETIRED:
            yield f"{name} cannot be searched, since it does not change training: write Study({name}=...)"
        else:
            yield f"search space names {shown(name)}, which TrainConfig does not have{field_hint(name, valid)}"
    try:
        base = study.base_config()
    except ConfigError as error:
        yield f"base: {error}"
        return
    if unknown:
        return
    values = base.model_dump()
    ranges = list(range_problems(study.space, values))
    yield from ranges
    if ranges:
        return
    yield from pair_problems(study.space, values)
    for fixed in study.enqueue:
        try:
            config = TrainConfig.parse({**study.base, **fixed.config})
            searched = {k: v for k, v in config.model_dump().items() if k in fixed.config or _partner(study, k, fixed)}
            to_params(study.space, searched)
        except ValueError as error:
            yield f"the trial given by hand {shown(fixed.label)}: {error}"


def _screen_problems(study: Study) -> Iterator[str]:
    """What is wrong with the precision in which trials are screened."""
    if study.screen is None:
        return
    if study.objective == "cider":
        yield "screen is decided by repeats, which are compared by loss; it does not go with objective='cider'"
        return
    if study.screen not in SCREENS:
        hint = nearest(study.screen, SCREENS) if isinstance(study.screen, str) else ""
        yield f"screen must be one of {', '.join(SCREENS)}, but got {shown(study.screen)}{hint}"
        return
    named = [study.base, study.space, *(fixed.config for fixed in study.enqueue)]
    for name in ("torch_dtype", *SCREENS[study.screen]):
        if any(name in each and (each is study.space or each[name] != _OWN[name]) for each in named):
            yield f"screen={study.screen} trains trials in another precision than float32, but {name} is set already"


_OWN = {name: default(name) for name in ("torch_dtype", "base_dtype", "matmul_precision")}


def _form_problems(study: Study) -> Iterator[str]:
    """Fields of the wrong kind; nothing else can be judged while there are any."""
    if not isinstance(study.name, str):
        yield f"name must be a text, but got {shown(study.name)}"
    for name in ("description", "get_data", "get_model"):
        if not _is_text(getattr(study, name)):
            yield f"{name} must be a text, but got {shown(getattr(study, name))}"
    if study.data_env is not None and not (_is_text(study.data_env) and re.fullmatch(r"\w+", study.data_env)):
        yield f"data_env must name an environment variable, but got {shown(study.data_env)}"
    for name in LIMITS:
        value = getattr(study, name)
        if isinstance(value, bool) or not isinstance(value, int):
            yield f"{name} must be a whole number, but got {shown(value)}"
    if isinstance(study.min_delta, bool) or not isinstance(study.min_delta, int | float):
        yield f"min_delta must be a number, but got {shown(study.min_delta)}"
    samplers = get_args(Sampler)
    if study.sampler not in samplers:
        hint = nearest(study.sampler, samplers) if isinstance(study.sampler, str) else ""
        yield f"sampler must be one of {', '.join(samplers)}, but got {shown(study.sampler)}{hint}"
    objectives = get_args(Objective)
    if study.objective not in objectives:
        hint = nearest(study.objective, objectives) if isinstance(study.objective, str) else ""
        yield f"objective must be one of {', '.join(objectives)}, but got {shown(study.objective)}{hint}"
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
    for fixed in study.enqueue:
        if not isinstance(fixed, Fixed):
            yield f"enqueue must be a tuple of Fixed(...), but has {shown(fixed)}"
            continue
        for name in ("label", "note"):
            if not _is_text(getattr(fixed, name)):
                yield f"the {name} of a trial given by hand must be a text, but got {shown(getattr(fixed, name))}"
        yield from _mapping_problems(f"config of the trial given by hand {shown(fixed.label)}", fixed.config)


def _mapping_problems(what: str, value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"{what} must be a dict of fields, but got {shown(value)}"
        return
    for name in value:
        if not isinstance(name, str):
            yield f"{what} must name fields of TrainConfig, but has {shown(name)}"


def _is_text(value: object) -> bool:
    """Whether the value is a text that can be printed and stored: half a surrogate pair cannot."""
    return isinstance(value, str) and not any("\ud800" <= character <= "\udfff" for character in value)


def _limit_problems(study: Study) -> Iterator[str]:
    """Numbers that are too small or too large."""
    for name, (low, high) in LIMITS.items():
        value = getattr(study, name)
        if value < low:
            yield f"{name} must be at least {low}, but got {shown(value)}"
        if value > high:
            yield f"{name} must be at most {high}, but got {shown(value)}"
    if not 0 <= study.min_delta <= sys.float_info.max:  # NaN is not in any range
        yield f"min_delta must be finite and not negative, but got {shown(study.min_delta)}"


def _name_problems(name: str) -> Iterator[str]:
    """What is wrong with a study's name, which is also that of its folder and its experiment."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        yield f"the name must be letters, digits, '_', '-' and '.', but got {shown(name)}"
    elif len(name) > MOST_CHARACTERS:
        yield f"the name must have at most {MOST_CHARACTERS} characters, but {shown(name, 40)} has {len(name)}"
    elif RESERVED.fullmatch(name):
        yield f"the name {name!r} is that of a file or folder beside the studies; take another"


def _plain(fields: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of some fields as TrainConfig reads them: `b"mini"` as `"mini"`, `Decimal("0.1")` as 0.1."""
    config = TrainConfig.parse(values).model_dump()
    return {name: config[name] for name in fields}


def _partner(study: Study, name: str, fixed: Fixed) -> bool:
    """Whether the field is needed to express one of the trial's multiples, or one that such a field is itself."""
    return any(
        isinstance(p, Multiple) and p.of == name and (f in fixed.config or _partner(study, f, fixed))
        for f, p in study.space.items()
    )


def fixed_trial(study: Study, fixed: Fixed) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, overrides) of a trial given by hand: what Optuna holds, and the fields outside the space."""
    config = TrainConfig.parse({**study.base, **fixed.config}).model_dump()
    searched = {
        k: config[k] for k in config if k in study.space or k in {getattr(p, "of", None) for p in study.space.values()}
    }
    wanted = {k: v for k, v in searched.items() if k in fixed.config or _partner(study, k, fixed)}
    params = to_params(study.space, wanted)
    covered = {f for f, p in study.space.items() if param_name(f, p) in params}
    overrides = {k: config[k] for k in fixed.config if k not in covered}
    return params, overrides
