"""Optuna's private names: all there, and none used outside of the one module for them."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage

import search
from search.storage import optuna_private
from search.storage.database import close_storage, open_storage

ROOT = Path(search.__file__).resolve().parents[1]
MODULE = Path(optuna_private.__file__).resolve()

USED = (
    ("a study", "_storage"),
    ("a study", "_study_id"),
    ("a study", "_pop_waiting_trial_id"),
    ("a trial", "_trial_id"),
    ("a trial", "_get_latest_trial"),
    ("a frozen trial", "_trial_id"),
    ("a study's storage", "_backend"),
    ("RDBStorage", "_create_new_trial"),
    ("RDBStorage", "_get_prepared_new_trial"),
    ("RDBStorage", "_build_frozen_trial_from_trial_model"),
    ("RDBStorage", "_get_trials"),
    ("RDBStorage", "_get_best_trial_id"),
    ("RDBStorage", "_set_trial_param"),
    ("RDBStorage", "_set_trial_param_without_commit"),
    ("a grid sampler", "_all_grids"),
    ("a grid sampler", "_search_space"),
    ("optuna.storages", "_rdb"),
)
"""(whose, the name) of every private name that `optuna_private` uses."""


@pytest.fixture
def owners(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """Optuna's own objects, by what `USED` calls them."""
    storage = open_storage(f"sqlite:///{tmp_path}/optuna.db")
    study = optuna.create_study(storage=storage)
    trial = study.ask()
    yield {
        "a study": study,
        "a trial": trial,
        "a frozen trial": study.get_trials(deepcopy=False)[0],
        "a study's storage": trial.storage,
        "RDBStorage": RDBStorage,
        "a grid sampler": optuna.samplers.GridSampler({"x": [1, 2]}),
        "optuna.storages": optuna.storages,
    }
    close_storage(storage)


@pytest.mark.parametrize(("owner", "name"), USED)
def test_a_private_name_is_there(owners: dict[str, Any], owner: str, name: str) -> None:
    assert hasattr(owners[owner], name), f"Optuna {optuna.__version__}: {owner} has no {name} any more"


COLUMNS = (
    *("TrialModel.number", "TrialModel.trial_id", "TrialModel.study_id", "TrialModel.state"),
    "TrialHeartbeatModel.heartbeat",
)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_is_there(column: str) -> None:
    model, _, attribute = column.partition(".")
    found = getattr(optuna_private.models, model, None)
    assert hasattr(found, attribute), f"Optuna {optuna.__version__}: its models have no {column} any more"


def test_the_table_is_complete() -> None:
    """Every private name that the module mentions is in `USED`: a new one cannot be forgotten there."""
    mentioned = {name for _, name in private_names(ast.parse(MODULE.read_text(encoding="utf-8")))}
    assert mentioned == {name for _, name in USED}


def test_the_cache_calls_what_is_retried_in_its_place() -> None:
    source = inspect.getsource(optuna.storages._CachedStorage)
    for name in optuna_private.CALLED_BY_THE_CACHE:
        assert f"self._backend.{name}(" in source, f"Optuna {optuna.__version__} no longer calls {name}"


# Nothing private elsewhere


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all private names in attributes, methods, strings of their own, and imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(attr=name) | ast.FunctionDef(name=name) | ast.Constant(value=str(name)):
                names = [name]
            case ast.ImportFrom(module=str(module), names=aliases):
                names = [*module.split("."), *(alias.name for alias in aliases)]
            case ast.Import(names=aliases):
                names = [part for alias in aliases for part in alias.name.split(".")]
            case _:
                continue
        for found in names:
            if re.fullmatch(r"_[a-z]\w*", found):
                yield node.lineno, found


def names_in(source: str) -> set[str]:
    """Private names that classes and modules of a source give to themselves."""
    tree = ast.parse(source)
    given = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    given |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return {name for name in given if re.fullmatch(r"_[a-z]\w*", name)}


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def optuna_names() -> set[str]:
    """All private names of Optuna's."""
    folder = Path(optuna.__file__).parent
    files = list(folder.rglob("*.py"))
    modules = {path.stem for path in files} | {path.parent.name for path in files}
    found = set().union(*(names_in(path.read_text(encoding="utf-8")) for path in files))
    return found | {name for name in modules if re.fullmatch(r"_[a-z]\w*", name)}


OPTUNAS = optuna_names()


def of_bases(cls: type) -> set[str]:
    """Private names that a class of ours has from its bases in Optuna."""
    bases = [base for base in cls.__mro__ if base.__module__.split(".")[0] == "optuna"]
    return set().union(*(names_in(textwrap.dedent(inspect.getsource(base))) for base in bases))


def uses(source: str, namespace: dict[str, Any]) -> list[str]:
    """Uses of Optuna's private names in a module: `line: name`.

    The source does not say what type an object has: on anything but `self`, a name that Optuna uses anywhere counts as
    Optuna's. On `self` it does in classes that inherit it from one of Optuna's.
    """
    tree = ast.parse(source)
    own = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=value, attr=name) if not is_self(value) and name in OPTUNAS:
                found.append((node.lineno, name))
            case ast.Constant(value=str(name)) if name in OPTUNAS and name not in own:
                found.append((node.lineno, name))
            case ast.Import() | ast.ImportFrom():
                text = ast.unparse(node)
                if re.search(r"\boptuna\w*(\.\w+)*\._|\boptuna\b.* import .*\b_[a-z]", text):
                    found.append((node.lineno, text))
            case ast.ClassDef(name=name) if isinstance(cls := namespace.get(name), type):
                inherited = of_bases(cls)
                found += [(line, used) for line, used in private_names(node) if used in inherited]
    return [f"{line}: {name}" for line, name in sorted(set(found))]


@pytest.mark.parametrize(
    "source",
    [
        "import optuna\ndef f(trial: optuna.Trial): return trial._trial_id",
        "def f(study): return study._storage.get_all_trials(study._study_id)",
        "def f(study): return getattr(study, '_thread_local')",
        "from optuna.storages._rdb import models",
        "import optuna.storages._rdb.models",
        "from optuna.storages import _CachedStorage, RDBStorage, _rdb",
        "import optuna\nclass Mine(optuna.Study):\n    def _pop_waiting_trial_id(self): return None",
        "from optuna.samplers import GridSampler\nclass Mine(GridSampler):\n    def f(self): return self._all_grids",
    ],
)
def test_a_use_is_found(source: str) -> None:
    namespace: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, "a module", "exec"), namespace)
    assert uses(source, namespace)


def test_what_is_our_own_is_not_one() -> None:
    source = (
        "class Mine:\n    def __init__(self): self._storage = 1\n    def f(self): return getattr(self, '_storage')"
    )
    assert uses(source, {}) == []


def test_no_module_of_the_search_uses_a_private_name() -> None:
    found = {}
    for path in sorted((ROOT / "search").rglob("*.py")):
        name = str(path.relative_to(ROOT).with_suffix(""))
        source = path.read_text(encoding="utf-8")
        namespace = {}
        if re.search("^class ", source, re.MULTILINE):  # whose bases only the module itself knows
            namespace = vars(importlib.import_module(name.removesuffix("/__init__").replace("/", ".")))
        if path != MODULE:
            found[name] = uses(source, namespace)
    assert {name: lines for name, lines in found.items() if lines} == {}


def test_no_benchmark_uses_a_private_name() -> None:
    files = (ROOT / "tests/benchmarks").glob("*.py")
    found = {path.name: uses(path.read_text(encoding="utf-8"), {}) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
