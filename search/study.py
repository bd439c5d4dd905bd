"""`Study`: the definition of a search, and how a study file is found and checked."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from search.errors import StudyError
from search.space import Multiple, Space, param_name, to_config, to_params
from trainer.config import MACHINE_FIELDS, TrainConfig, nearest, read_settings
from trainer.errors import ConfigError

STUDIES = Path(__file__).resolve().parent.parent / "studies"

LOCATION_FIELDS = ("model", "data")
"""Where the same model and data lie may differ between machines; their fingerprints may not."""


@dataclass(frozen=True, kw_only=True)
class Fixed:
    """A trial given by hand, run before anything is sampled."""

    label: str
    config: Mapping[str, Any]
    """Values over the study's base; fields outside the search space are allowed."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is searched: the space, what stays fixed, and the budget.

    Raises:
        StudyError: everything wrong with the definition, in one message.
    """

    name: str
    description: str
    """One line, shown by `--list`."""
    space: Space
    base: Mapping[str, Any] = field(default_factory=dict)
    """Values over TrainConfig's defaults, the same for every trial."""
    n_trials: int
    """Trials in total; `--trials` overrides it."""
    sampler: Literal["tpe", "random", "grid"] = "tpe"
    enqueue: tuple[Fixed, ...] = ()
    data_env: str | None = None
    """Environment variable that names the data folder."""
    get_data: str = ""
    """How to get the data, said when it is missing."""
    get_model: str = ""
    """How to get the model, said when it is missing."""
    seed: int = 0
    """Seed of the sampler."""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            lines = "\n".join(f"  - {problem}" for problem in problems)
            raise StudyError(f"the study {self.name!r} is wrong:\n{lines}")

    def base_config(self) -> TrainConfig:
        """The configuration of a trial before anything is sampled."""
        return TrainConfig.parse(self.base)

    def config(self, params: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """The resolved configuration of a trial with these params; `overrides` are a fixed trial's other fields."""
        base = {**self.base_config().model_dump(), **(overrides or {})}
        return TrainConfig.parse(to_config(self.space, base, params))

    def with_settings(self, settings: Iterable[str], seed: int | None = None) -> Study:
        """The study with `key=value` settings over its base. A setting of a searched field fixes that field."""
        values = read_settings(settings)
        TrainConfig.parse({**self.base, **values})  # the user's values, before they are called the study's
        space = {name: param for name, param in self.space.items() if name not in values}
        for name, param in self.space.items():
            if isinstance(param, Multiple) and name in values:
                space.pop(name, None)
        enqueue = tuple(replace(f, config={**f.config, **values}) for f in self.enqueue)
        return replace(
            self,
            base={**self.base, **values},
            space=space,
            enqueue=enqueue,
            seed=self.seed if seed is None else seed,
        )

    def located(self) -> Study:
        """The study with its data folder as the environment names it."""
        root = os.environ.get(self.data_env) if self.data_env else None
        if root:
            return replace(self, base={**self.base, "data": root})
        return self

    def definition(self) -> dict[str, Any]:
        """All that decides what its trials compute, as plain data: what may not change while a study goes on."""
        base = self.base_config().model_dump(mode="json")
        for name in (*MACHINE_FIELDS, *LOCATION_FIELDS):
            base.pop(name)
        space = {}
        for name, param in self.space.items():
            values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(param).items()}
            space[name] = {"type": type(param).__name__, **values}
        return {"space": space, "base": base, "sampler": self.sampler, "seed": self.seed}


def _problems(study: Study) -> Iterable[str]:
    """Everything wrong with a definition, one message each."""
    valid = list(TrainConfig.model_fields)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", study.name):
        yield f"the name must be letters, digits, '_', '-' and '.', but got {study.name!r}"
    if study.n_trials < 1:
        yield f"n_trials must be at least 1, but got {study.n_trials}"
    if not study.space and not study.enqueue:
        yield "the search space is empty and no trial is given by hand: there is nothing to run"
    unknown = [name for name in study.space if name not in valid]
    for name in unknown:
        yield f"search space names {name!r}, which TrainConfig does not have{nearest(name, valid)}"
    try:
        base = study.base_config()
    except ConfigError as error:
        yield f"base: {error}"
        return
    if unknown:
        return
    values = base.model_dump()
    yield from _range_problems(study, values)
    for fixed in study.enqueue:
        try:
            config = TrainConfig.parse({**study.base, **fixed.config})
            searched = {k: v for k, v in config.model_dump().items() if k in fixed.config or _partner(study, k, fixed)}
            to_params(study.space, searched)
        except ValueError as error:
            yield f"the trial given by hand {fixed.label!r}: {error}"


def _partner(study: Study, name: str, fixed: Fixed) -> bool:
    """Whether the field is needed to express one of the trial's multiples."""
    return any(isinstance(p, Multiple) and f in fixed.config and p.of == name for f, p in study.space.items())


def _range_problems(study: Study, values: dict[str, Any]) -> Iterable[str]:
    for name, param in study.space.items():
        if isinstance(param, Multiple):
            if param.of not in values:
                yield f"{name} is a multiple of {param.of!r}, which TrainConfig does not have"
            elif not isinstance(values[param.of], int | float):
                yield f"{name} is a multiple of {param.of!r}, which is no number"
            continue
        for edge in param.edges():
            try:
                TrainConfig.parse({**values, "micro_batch_size": None, name: edge})
            except ConfigError as error:
                rule = str(error).splitlines()[-1].strip(" -")
                yield f"search space of {name}: {rule}"


def fixed_trial(study: Study, fixed: Fixed) -> tuple[dict[str, Any], dict[str, Any]]:
    """(params, overrides) of a trial given by hand: what Optuna holds, and the fields outside the space."""
    config = TrainConfig.parse({**study.base, **fixed.config}).model_dump()
    searched = {
        k: config[k] for k in config if k in study.space or k in {getattr(p, "of", None) for p in study.space.values()}
    }
    wanted = {k: v for k, v in searched.items() if k in fixed.config or _partner(study, k, fixed)}
    params = to_params(study.space, wanted)
    covered = {f for f, p in study.space.items() if param_name(f, p) in params}
    overrides = {k: v for k, v in fixed.config.items() if k not in covered}
    return params, overrides


def available() -> dict[str, Path]:
    """Study files of this project by name."""
    return {p.stem: p for p in sorted(STUDIES.glob("*.py")) if not p.stem.startswith("_")}


def load(name_or_path: str) -> Study:
    """The `STUDY` of a file in `studies/` (hyphen or underscore) or of a path to a study file.

    Raises:
        StudyError: no such study, a file that does not run, or one without a `STUDY`.
    """
    names = available()
    stem = name_or_path.replace("-", "_")
    path = names.get(stem)
    if path is None:
        path = Path(name_or_path)
        if path.suffix != ".py":
            raise StudyError(
                f"there is no study {name_or_path!r}{nearest(stem, names)}; "
                f"known studies: {', '.join(names)}; or give the path of a study file"
            )
        if not path.is_file():
            raise StudyError(f"there is no study file {name_or_path!r}")
    module = _execute(path)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise StudyError(f"{path}: a study file sets STUDY = Study(...), but STUDY is {study!r}")
    return study.located()


def _execute(path: Path) -> ModuleType:
    """Run a study file as a module. A study file is Python, and trusted as such."""
    name = f"studies.{path.stem}" if path.parent == STUDIES else f"study_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except StudyError:
        raise
    except Exception as error:
        line = getattr(error, "lineno", None)
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(path):
                line = trace.tb_lineno
            trace = trace.tb_next
        raise StudyError(f"{path}, line {line}: {type(error).__name__}: {error}") from error
    return module
