"""Studies in Optuna's storage: created, continued, and refused when their definition has changed."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState

from search import records
from search.errors import DefinitionChanged, StorageError, StudyError
from search.planning.plan import is_repeat
from search.planning.prior import Prior
from search.storage.database import exclusive
from search.storage.identity import EARLIER, new_id
from search.storage.retry import RetryingStorage
from search.study import SCREENS, Study, fixed_trial
from trainer.common.errors import nearest
from trainer.config import without_retired

DEFINITION = "definition"
"""Study attribute: `Study.definition()` of the study its trials were made for."""
NAME = "study"
"""Study attribute: `Study.name`, the same for all generations."""
GENERATION = "generation"
"""Study attribute: 1, and one more for each `--fresh`."""
FINGERPRINTS = "fingerprints"
"""Study attribute: fingerprints of the data and the model its trials used."""
PRIOR = "prior"
"""Study attribute: what earlier runs say of good effective rates; None without any."""
STRATEGY = "strategy"
"""Study attribute: the value of `--strategy` its trials were sampled with."""


METRICS = {"loss": "lowest val_loss", "cider": "minus CIDEr-D of the validation captions"}
"""What a trial's value is, for the axes of plots."""


def open_study(
    storage: RetryingStorage,
    study: Study,
    *,
    fresh: bool = False,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
) -> optuna.Study:
    """Open the Optuna study of a definition: continue it if it exists, else create it.

    `fresh` starts a new generation: `<name>`, then `<name>-2`, `<name>-3`, ... Without it the latest generation is
    continued. One without a trial takes the new definition, so a typo that no trial was made with does no harm. Trials
    given by hand that the study lacks (new in the study file, or left out by a process that died while it created the
    study) are queued, each once.

    Raises:
        DefinitionChanged: the latest generation has trials of another definition; every difference is named.
        StorageError: a study of that name was made by another program.
    """
    with exclusive(storage):
        generations = _generations(storage, study.name)
        if fresh or not generations:
            opened = _create(storage, study, 1 + max(generations, default=0), sampler, pruner)
        else:
            name = generations[max(generations)]
            opened = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
            if opened.get_trials(deepcopy=False):
                _refuse_changed(opened, study, 1 + max(generations))
            elif list(_changes(opened, study)):
                for held in (FINGERPRINTS, STRATEGY):
                    opened.set_user_attr(held, None)
                opened.set_user_attr(DEFINITION, study.definition())
        if records.STUDY_ID not in opened.user_attrs:
            opened.set_user_attr(records.STUDY_ID, EARLIER + new_id())
        opened.set_user_attr(records.STOP_RULE, study.stop_rule())
        _name_metric(opened, METRICS[study.objective])
        _enqueue_missing(opened, study)
    return opened


def existing(storage: RetryingStorage, study: Study, strategy: str | None, data: str) -> optuna.Study | None:
    """The study that a search would continue, for reading; None if it would create one.

    Args:
        storage: Optuna's.
        study: The definition.
        strategy: `--strategy`; None for what the study was begun with.
        data: Fingerprint of the base configuration's data.

    Raises:
        DefinitionChanged: the search would refuse it.
    """
    generations = _generations(storage, study.name)
    if not generations:
        return None
    opened = optuna.load_study(study_name=generations[max(generations)], storage=storage)
    if opened.get_trials(deepcopy=False):
        _refuse_changed(opened, study, 1 + max(generations))
        for key, name, value in ((FINGERPRINTS, "data", data), (STRATEGY, "strategy", strategy)):
            held = opened.user_attrs.get(key)
            if held is not None and value is not None:
                _hold(opened, key, {**held, name: value})
    return opened


def find_study(storage: RetryingStorage, name: str) -> optuna.Study:
    """The latest generation of the study of this name, or the very generation named, e.g. `rsicap-2`.

    The first generation, whose own name stands for the latest, is `rsicap-1`.

    Raises:
        StudyError: the database has no such study.
    """
    generations = _generations(storage, name)
    names = sorted(found.study_name for found in storage.get_all_studies())
    exact = generations[max(generations)] if generations else name
    if exact not in names and name.endswith("-1"):
        exact = _generations(storage, name.removesuffix("-1")).get(1, exact)
    if exact not in names:
        known = f"; it has {', '.join(names)}" if names else "; it has none yet"
        raise StudyError(f"the database has no study {name!r}{nearest(name, names)}{known}")
    return optuna.load_study(study_name=exact, storage=storage)


def exact_name(study: optuna.Study) -> str:
    """A name by which `find_study` finds this very generation, whatever generations come after it."""
    first = study.user_attrs.get(GENERATION) == 1
    return f"{study.study_name}-1" if first else study.study_name


def generations(study: optuna.Study, storage: RetryingStorage) -> list[str]:
    """Optuna's names of all generations of this one's study, in order."""
    found = _generations(storage, study.user_attrs.get(NAME, study.study_name))
    return [found[number] for number in sorted(found)] or [study.study_name]


def check_definition(opened: optuna.Study, study: Study) -> None:
    """Check, with the database's lock held, that the study's first trial will be one of this definition.

    Raises:
        DefinitionChanged: while it had no trial, another search replaced the definition.
    """
    _refuse_changed(opened, study, 1 + opened.user_attrs[GENERATION])


def check_fingerprints(study: optuna.Study, *, data: str, model: str, others: Sequence[str] = ()) -> None:
    """Hold a study to its data and its models: stored at the first call, compared at each later one.

    Args:
        study: in Optuna's database.
        data: fingerprint of the base configuration's data.
        model: of its model.
        others: of the other models that the study's trials may have, in the order of its definition.

    Raises:
        DefinitionChanged: the data or the model are not those the study's trials used.
    """
    # By number, since a model's path may differ between machines.
    more = {f"model {number}": each for number, each in enumerate(others, start=2)}
    _hold(study, FINGERPRINTS, {"data": data, "model": model, **more})


def check_strategy(study: optuna.Study, strategy: str) -> None:
    """Hold a study to one `--strategy`.

    Raises:
        DefinitionChanged: its trials were sampled with another.
    """
    _hold(study, STRATEGY, {"strategy": strategy})


def beside_the_space(study: optuna.Study) -> int:
    """How many trials were given by hand with fields that the space does not have, lost ones counted once.

    Repeats have such fields too, their seeds, but are no configurations of their own.
    """
    trials = (t.user_attrs for t in study.get_trials(deepcopy=False) if not is_repeat(t))
    return sum(bool(attrs.get(records.OVERRIDES)) and records.RESUMES not in attrs for attrs in trials)


def held_strategy(storage: RetryingStorage, name: str) -> str | None:
    """The strategy that the latest generation of a study was begun with; None if there is none, or it is older.

    Raises:
        StudyError: there is no such strategy any more, so the study cannot go on.
    """
    found = _latest(storage, name)
    held = found.user_attrs.get(STRATEGY) if found is not None else None
    if found is not None and held and held["strategy"] in records.RETIRED_STRATEGIES:
        raise StudyError(
            f"the study {found.study_name!r} was begun with --strategy {held['strategy']}, which there is no "
            "longer: its trials can be looked at, but not gone on with; start a new study with --fresh"
        )
    return held["strategy"] if held else None


def held_pruner(storage: RetryingStorage, name: str) -> str | None:
    """The pruner that the latest generation of a study was begun with, where it is not its strategy's own."""
    found = _latest(storage, name)
    return found.user_attrs.get(records.PRUNER) if found is not None else None


def _latest(storage: RetryingStorage, name: str) -> Any:
    """The latest generation of a study, as Optuna's FrozenStudy; None if there is no such study."""
    generations = _generations(storage, name)
    latest = generations[max(generations)] if generations else None
    return next((found for found in storage.get_all_studies() if found.study_name == latest), None)


def hold_prior(study: optuna.Study, prior: Prior | None) -> Prior | None:
    """Hold a study to the prior that it was begun with: until its first trial has begun, one that is given counts."""
    begun = any(trial.state != TrialState.WAITING for trial in study.get_trials(deepcopy=False))
    if PRIOR not in study.user_attrs or (prior is not None and not begun):
        study.set_user_attr(PRIOR, None if prior is None else {"centre": prior.centre, "width": prior.width})
    held = study.user_attrs[PRIOR]
    return None if held is None else Prior(**held)


def _generations(storage: RetryingStorage, name: str) -> dict[int, str]:
    """Optuna's names of a study's generations, by number."""
    attrs = {found.study_name: found.user_attrs for found in storage.get_all_studies()}
    return {a[GENERATION]: optuna_name for optuna_name, a in attrs.items() if a.get(NAME) == name}


def _generation_name(name: str, generation: int) -> str:
    return name if generation == 1 else f"{name}-{generation}"


def _create(
    storage: RetryingStorage, study: Study, generation: int, sampler: BaseSampler | None, pruner: BasePruner | None
) -> optuna.Study:
    """Create the study. Its NAME is set last: without it the study is not yet one of ours."""
    name = _generation_name(study.name, generation)
    # A duplicate comes from a process that died right here, or from another program: distinguished below.
    with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
        storage.create_new_study([StudyDirection.MINIMIZE], name)
    created = optuna.load_study(study_name=name, storage=storage, sampler=sampler, pruner=pruner)
    if NAME in created.user_attrs and created.user_attrs[NAME] != study.name:
        return _create(storage, study, generation + 1, sampler, pruner)
    if created.get_trials(deepcopy=False) or created.directions != [StudyDirection.MINIMIZE]:
        raise StorageError(
            f"the database has a study {name!r} that another program made; give yours another name or --storage"
        )
    created.set_user_attr(DEFINITION, study.definition())
    created.set_user_attr(GENERATION, generation)
    created.set_user_attr(records.STUDY_ID, new_id())
    created.set_user_attr(NAME, study.name)
    return created


def _name_metric(opened: optuna.Study, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # of both, that they may change
        if opened.metric_names != [name]:
            opened.set_metric_names([name])


def _enqueue_missing(opened: optuna.Study, study: Study) -> None:
    """Queue the trials given by hand that the study does not have, in their order."""
    present = Counter(
        t.user_attrs.get(records.LABEL)
        for t in opened.get_trials(deepcopy=False)
        if records.RESUMES not in t.user_attrs
    )
    for fixed in study.enqueue:
        if present[fixed.label]:
            present[fixed.label] -= 1
            continue
        params, overrides = fixed_trial(study, fixed)
        attrs = {records.LABEL: fixed.label, records.OVERRIDES: overrides}
        if fixed.note:
            attrs[records.NOTE] = fixed.note
        opened.enqueue_trial(params, user_attrs=attrs)


def _refuse_changed(opened: optuna.Study, study: Study, next_generation: int) -> None:
    changes = list(_changes(opened, study))
    if changes:
        given = map(str, opened.user_attrs.get(records.SETTINGS, ()))
        screen = [text.partition("=")[2] for text in given if text.startswith("screen=")][-1:]
        lines = [_difference(path, a, b, *screen) for path, a, b in changes]
        count = len(opened.get_trials(deepcopy=False))
        listed = "\n".join(f"  - {line}" for line in lines)
        raise DefinitionChanged(
            f"the study {opened.study_name!r} exists with another definition, so its {count} trials cannot be "
            f"compared with new ones:\n{listed}\n"
            "undo the change, or start a new study with --fresh "
            f"(as {_generation_name(study.name, next_generation)!r})"
        )


def _changes(opened: optuna.Study, study: Study) -> Iterator[tuple[str, Any, Any]]:
    stored = opened.user_attrs[DEFINITION]
    stored = {**stored, "base": without_retired(stored["base"])}
    return _differences(stored, json.loads(json.dumps(study.definition())))


_MISSING = object()


def _differences(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(path, old, new) of every value that differs; `_MISSING` where one side has none."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        if old != new:
            yield path, old, new
        return
    for key in [*old, *(key for key in new if key not in old)]:
        below = f"{path}.{key}" if path else key
        yield from _differences(old.get(key, _MISSING), new.get(key, _MISSING), below)


def _difference(path: str, old: Any, new: Any, screen: str = "") -> str:
    line = f"{path}: {_value(old)} -> {_value(new)}"
    section, _, name = path.partition(".")
    if path == "objective":  # left out where it is the loss
        return f"{line} (as before with --set objective={'loss' if old is _MISSING else old})"
    if section == "base" and name in SCREENS.get(screen, {}):
        return f"{line} (as before with --set screen={screen})"  # the field itself would take the repeats along
    if section == "base" and old is not _MISSING:
        text = ",".join(map(str, old)) if isinstance(old, list) else str(old).lower() if old is None else str(old)
        return f"{line} (as before with --set {name}={text})"
    return f"{line} (as before with --seed {old})" if path == "seed" else line


def _value(value: Any) -> str:
    if value is _MISSING:
        return "not there"
    return value if isinstance(value, str) else json.dumps(value)


def _hold(study: optuna.Study, key: str, values: dict[str, str]) -> None:
    stored = study.user_attrs.get(key)
    if stored is None:
        study.set_user_attr(key, values)
        return
    lines = [f"  - {path}: {_value(old)} -> {_value(new)}" for path, old, new in _differences(stored, values)]
    if lines:
        what = "fingerprints of its data or model" if key == FINGERPRINTS else key
        raise DefinitionChanged(
            f"the study {study.study_name!r} was started with another {what}, so its trials cannot be compared with "
            "new ones:\n" + "\n".join(lines) + "\nuse the same again, or start a new study with --fresh"
        )
