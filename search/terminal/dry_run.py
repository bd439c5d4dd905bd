"""`--dry-run`: everything is checked, what would run is shown, nothing is written into the runs folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import optuna

from search import records
from search.planning.rungs import RungPlan
from search.pruning import default_pruner, plan_of, pruner_for
from search.sampling import params
from search.sampling.make import default_strategy, make_sampler
from search.storage import studies
from search.storage.database import close_storage, open_existing
from search.terminal import listing
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from search.options import SearchOptions
    from search.planning.budget import Budget
    from search.planning.prior import Prior
    from search.preflight import Checked
    from search.study import Study
    from search.terminal.price import Price, Untrained


def show(
    study: Study,
    options: SearchOptions,
    budget: Budget,
    checked: Checked,
    prior: Prior | None,
    *,
    price: Price | Untrained | None = None,
    as_json: bool = False,
) -> None:
    """Print what would run, what has run already, and the configuration of the next sampled trial.

    Args:
        study: The definition.
        options: How it would be run.
        budget: Of the whole study.
        checked: The model and the data.
        prior: Of a new study, by `--warm-start`.
        price: What it would take, if that was measured.
        as_json: Print one JSON object instead of text.

    Raises:
        UserError: a search would refuse the database, or the definition for the study that is there.
    """
    from search import leaderboard
    from search.terminal import costs
    from trainer.model import memory

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with _existing(study, options, checked) as (found, strategy):
        held = None if found is None else found.user_attrs.get(records.PRUNER)
        pruner = options.pruner or held or default_pruner(strategy)
        config = _first(study, strategy, prior)
        base, examined = study.base_config(), checked.examined
        need = memory.needed(base.model, base.dtype_of_base)
        state = None if found is None else listing.state_of_study(found)
        spent = found is not None and budget.is_spent(found.get_trials(deepcopy=False))
    facts: dict[str, Any] = {
        "study": study.name,
        "description": study.description,
        "trials": budget.trials,
        "epochs": budget.epochs,
        "strategy": strategy,
        "sampler": study.sampler,
        "pruner": pruner,
        "objective": study.objective,
        "seed": study.seed,
        "data": {
            "folder": str(examined.folder),
            "layout": str(examined.layout),
            "rows": len(examined.rows),
            "bad_rows": len(examined.bad),
            "fingerprint": examined.fingerprint,
            "notes": checked.lines()[1:],
            "warnings": checked.warnings(),
        },
        "model": {"name": base.model, "dtype": base.dtype_of_base, "size": None if need is None else str(need)},
        "space": {name: str(param) for name, param in study.space.items()},
        "given_by_hand": [{"label": fixed.label, "config": dict(fixed.config)} for fixed in study.enqueue],
        "first_sampled": config.model_dump(mode="json"),
        "costs": list(costs.lines(study, checked)),
        "expected_epochs": _expected(study, pruner, budget),
        "price": None if price is None else price.facts(),
        "continues": state,
        "mlflow": _ask_mlflow(options),
    }
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=2, default=str))
        return
    data = facts["data"]
    print(f"study {study.name}: {study.description}")
    print(f"{budget.line()}, strategy {strategy}, sampler {study.sampler}, pruner {pruner}, seed {study.seed}")
    if study.objective == "cider":
        print("ranked by CIDEr-D of the validation captions of each complete trial; its leaders are not repeated")
    skipped = f", {len(examined.bad)} bad ones skipped" if examined.bad else ""
    print(f"data {examined.folder}: {len(examined.rows)} rows{skipped}, fingerprint {examined.fingerprint}")
    print(f"layout: {examined.layout}")
    for line in data["notes"]:
        print(f"  {line}")
    if need is not None:
        print(f"base {base.model}: {need} in {base.dtype_of_base}")
    for line in facts["costs"]:
        print(line)
    if price is not None:
        print(price.line())
    if facts["expected_epochs"] is not None:
        full = budget.trials * study.most_epochs()
        print(f"pausing at rungs, {budget.trials} trials come to some {facts['expected_epochs']} epochs of {full}")
    print("search space:")
    for name, param in study.space.items():
        print(f"  {name}: {param}")
    for fixed in study.enqueue:
        print(f"given by hand: {fixed.label}: {dict(fixed.config)}")
    print("the first trial of a new study, sampled, would be" if state else "the first sampled trial would be")
    print(leaderboard.training_config(facts["first_sampled"]))
    if state is not None:
        print(f"it would go on with the study {listing.as_line(state)}")
        left = max(0, budget.trials - state["counted"])
        if spent:
            print(f"no more trials would be sampled: all {budget.epochs} epochs are trained; more with --epochs")
        else:
            none = "no more trials would be sampled; more with --trials"
            print(f"{left} more trials would be sampled" if left else none)
    if facts["mlflow"]:
        print(facts["mlflow"])
    print("nothing was run (--dry-run)")


@contextmanager
def _existing(study: Study, options: SearchOptions, checked: Checked) -> Iterator[tuple[optuna.Study | None, str]]:
    """The study that is there, if it would be continued, and the strategy that would be used."""
    places = options.places
    storage = open_existing(places.storage_url, to_come=places.runs_dir)
    try:
        found, held = None, None
        if storage is not None and not options.fresh:
            held = studies.held_strategy(storage, study.name)
            found = studies.existing(storage, study, options.strategy, checked.examined.fingerprint)
        yield found, options.strategy or held or default_strategy(study)
    finally:
        if storage is not None:
            close_storage(storage)


def _expected(study: Study, pruner: str, budget: Budget) -> int | None:
    """Epochs that the trials are to come to; None where a rule says nothing of that, or the budget is in epochs."""
    if budget.epochs is not None:
        return None
    plan = plan_of(pruner_for(pruner, study, budget))
    return plan.expected(budget.trials) if isinstance(plan, RungPlan) else None


def _first(study: Study, strategy: str, prior: Prior | None) -> TrainConfig:
    """The first trial that would be sampled, by a study in memory."""
    dry = optuna.create_study(sampler=make_sampler(study, strategy, prior))
    trial = dry.ask()
    params.suggest(trial, study)
    return study.config(trial.params)


def _ask_mlflow(options: SearchOptions) -> str | None:
    """Whether an MLflow server answers, to the client that the search would use. A file would be created."""
    from search.errors import Unavailable
    from search.tracking.client import open_tracking
    from search.urls import shown

    uri = options.places.tracking_uri
    if not uri.startswith("http"):
        return None
    try:
        open_tracking(uri, options.places.artifacts)
    except Unavailable as error:
        return f"MLflow: {error} A search would keep its records until it answers."
    return f"MLflow: {shown(uri)} answers"
