"""`Study`: the definition of a search, and how a study file is found and checked."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from search import study_check
from search.errors import StudyError
from search.space import Multiple, Space, param_name, to_config, to_params
from trainer.common.errors import ConfigError, nearest, shown
from trainer.config import MACHINE_FIELDS, TrainConfig, read_settings

STUDIES = Path(__file__).resolve().parent.parent / "studies"

MOST_SAID = 1000
"""Characters of the message of a study file's exception that are shown."""

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
            raise StudyError(f"the study {shown(self.name)} is wrong:\n{lines}")
        # Plain values from here on: they go to other processes and into a database.
        object.__setattr__(self, "space", dict(self.space))
        object.__setattr__(self, "base", _plain(self.base, self.base))
        enqueue = (replace(f, config=_plain(f.config, {**self.base, **f.config})) for f in self.enqueue)
        object.__setattr__(self, "enqueue", tuple(enqueue))

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
    form = list(study_check.form_problems(study))
    yield from form
    if isinstance(study.name, str):
        yield from study_check.name_problems(study.name)
    if form:
        return
    yield from study_check.limit_problems(study)
    valid = list(TrainConfig.model_fields)
    if not study.space and not study.enqueue:
        yield "the search space is empty and no trial is given by hand: there is nothing to run"
    unknown = [name for name in study.space if name not in valid]
    for name in unknown:
        yield f"search space names {shown(name)}, which TrainConfig does not have{nearest(name, valid)}"
    try:
        base = study.base_config()
    except ConfigError as error:
        yield f"base: {error}"
        return
    if unknown:
        return
    values = base.model_dump()
    ranges = list(study_check.range_problems(study.space, values))
    yield from ranges
    if ranges:
        return
    micro_batch = study_check.micro_batch_problem(study.space, values)
    if micro_batch:
        yield micro_batch
    for fixed in study.enqueue:
        try:
            config = TrainConfig.parse({**study.base, **fixed.config})
            searched = {k: v for k, v in config.model_dump().items() if k in fixed.config or _partner(study, k, fixed)}
            to_params(study.space, searched)
        except ValueError as error:
            yield f"the trial given by hand {shown(fixed.label)}: {error}"


def _plain(fields: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of some fields as TrainConfig reads them: `b"mini"` as `"mini"`, `Decimal("0.1")` as 0.1."""
    config = TrainConfig.parse(values).model_dump()
    return {name: config[name] for name in fields}


def _partner(study: Study, name: str, fixed: Fixed) -> bool:
    """Whether the field is needed to express one of the trial's multiples."""
    return any(isinstance(p, Multiple) and f in fixed.config and p.of == name for f, p in study.space.items())


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
                f"there is no study {shown(name_or_path)}{nearest(stem, names)}; "
                f"known studies: {', '.join(names)}; or give the path of a study file"
            )
        try:
            found = path.is_file()
        except OSError as error:  # a name too long
            raise StudyError(f"the study file {shown(name_or_path)} cannot be read: {error.strerror}") from None
        if not found:
            raise StudyError(f"there is no study file {shown(name_or_path)}; known studies: {', '.join(names)}")
    module = _execute(path)
    study = getattr(module, "STUDY", None)
    if not isinstance(study, Study):
        raise StudyError(f"{path}: a study file sets STUDY = Study(...), but STUDY is {shown(study)}")
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
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a study file that ends the program is wrong
        line = getattr(error, "lineno", None)
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == str(path):
                line = trace.tb_lineno
            trace = trace.tb_next
        raise StudyError(f"{path}, line {line}: {type(error).__name__}: {_said(error)}") from error
    return module


def _said(error: BaseException) -> str:
    """What a study file's exception says, long texts shortened."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - whatever an exception's own __str__ raises
        return "(no message)"
    return text if len(text) <= MOST_SAID else f"{text[:MOST_SAID]}..."
