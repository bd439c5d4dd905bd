"""How a search opens its study: continued or created, and what it is run with from then on."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import optuna

from search import pruning, records
from search.sampling.make import FREEZE_THAW, RUNGS, default_strategy, make_sampler
from search.sampling.samplers import GridInOrder
from search.space import size
from search.storage import studies
from search.verdict.leaders import Rules

if TYPE_CHECKING:
    from search.options import SearchOptions
    from search.planning.budget import Budget
    from search.planning.prior import Prior
    from search.storage.retry import RetryingStorage
    from search.study import Study


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A study in its database, and what a search runs it with."""

    study: optuna.Study
    strategy: str
    pruner: str
    budget: Budget
    """Asks for no more trials than a grid or a finite space has points."""
    prior: Prior | None
    """The runs that the study was begun with."""
    rules: Rules | None
    """How the leaders are repeated at the end; None if they are not."""
    notes: tuple[str, ...]
    """What the user is to know, once there is where to say it."""


def open_study(
    storage: RetryingStorage,
    definition: Study,
    options: SearchOptions,
    budget: Budget,
    given: Prior | None,
    file: str | None = None,
) -> Opened:
    """Continue the study of this definition, or create it.

    Args:
        storage: Optuna's database, open.
        definition: The study, with the settings of this search.
        options: How the search is run. What is left out there is as the study was begun.
        budget: What was asked for.
        given: The runs of `--warm-start`. They are left out if the study has begun without them.
        file: What `--study` was given, where that is not the study's own name.

    Raises:
        UserError: the definition, the strategy or the pruner is another than the study was begun with.
    """
    begun_with = None if options.fresh else studies.held_strategy(storage, definition.name)
    strategy = options.strategy or begun_with or default_strategy(definition)
    held = None if options.fresh else studies.held_pruner(storage, definition.name)
    pruner = options.pruner or held or pruning.default_pruner(strategy)
    study = studies.open_study(
        storage,
        definition,
        fresh=options.fresh,
        sampler=make_sampler(definition, strategy),
        pruner=pruning.pruner_for(pruner, definition, budget),
    )
    studies.check_strategy(study, strategy)
    notes = []
    what, most = _points(study, definition)
    if most is not None and budget.trials > most:
        if budget.epochs is None or budget.epochs > most * budget.each:
            notes.append(f"the {what} has {most} trials, and {budget.asked()} were asked for: it ends once it is done")
        budget = replace(budget, trials=most)
    by_hand = len(definition.enqueue)
    if budget.trials < by_hand:
        notes.append(
            f"{by_hand} trials are given by hand and all of them run, more than the {budget.asked()} asked for"
        )
    prior = studies.hold_prior(study, given)
    if given is not None and given != prior:
        notes.append(
            f"--warm-start is left out: the study {study.study_name!r} has begun without these runs; a new one, "
            "with --fresh, begins with them"
        )
    elif given is not None and not {strategy, pruner} & {FREEZE_THAW, RUNGS}:
        notes.append(f"--warm-start is of no use here: it is for --strategy {FREEZE_THAW} or {RUNGS}")
    # For the commands that the tuning log proposes, and for searches that go on.
    study.set_user_attr(records.SETTINGS, list(options.settings))
    other = None if pruner == pruning.default_pruner(strategy) else pruner
    if other != study.user_attrs.get(records.PRUNER):
        study.set_user_attr(records.PRUNER, other)
    if file != study.user_attrs.get(records.GIVEN_STUDY):
        study.set_user_attr(records.GIVEN_STUDY, file)
    if budget.epochs != study.user_attrs.get(records.EPOCHS):
        study.set_user_attr(records.EPOCHS, budget.epochs)
    rules = None
    if definition.objective == "cider":
        notes.append(
            "trials are ranked by CIDEr-D of their captions of all validation images; the leaders are not repeated"
        )
    elif options.confirm:
        held = study.user_attrs.get(records.CONFIRM)
        asked = options.top is not None or options.seeds is not None
        rules = Rules(**held) if held and not asked else Rules(top=options.top, seeds=options.seeds)
        study.set_user_attr(records.CONFIRM, asdict(rules))
    return Opened(
        study=study, strategy=strategy, pruner=pruner, budget=budget, prior=prior, rules=rules, notes=tuple(notes)
    )


def _points(study: optuna.Study, definition: Study) -> tuple[str, int | None]:
    """What is finite, and how many trials it has: None if neither the grid nor the space is."""
    if isinstance(study.sampler, GridInOrder):
        return "grid", study.sampler.total(study)
    most = size(definition.space)  # of an empty one 1: the base, over and over to the last bit
    return "space", None if most is None else most + studies.beside_the_space(study)
