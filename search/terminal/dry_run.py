"""`--dry-run`: everything is checked, what would run is shown, nothing is written into the runs folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from search.options import SearchOptions
    from search.planning.prior import Prior
    from search.preflight import Checked
    from search.study import Study


def show(study: Study, options: SearchOptions, n_trials: int, checked: Checked, prior: Prior | None) -> None:
    """Print what would run, and the configuration of the first sampled trial.

    Args:
        study: The definition.
        options: How it would be run.
        n_trials: Configurations in total.
        checked: The model and the data.
        prior: Of a new study, by `--warm-start`.
    """
    import optuna

    from search import leaderboard
    from search.pruning import default_pruner
    from search.sampling import params, staged
    from search.sampling.make import default_strategy, make_sampler
    from search.terminal import costs
    from trainer.model import memory

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(f"study {study.name}: {study.description}")
    strategy = options.strategy or default_strategy(study)
    pruner = options.pruner or default_pruner(strategy)
    print(f"{n_trials} trials, strategy {strategy}, sampler {study.sampler}, pruner {pruner}, seed {study.seed}")
    examined = checked.examined
    skipped = f", {len(examined.bad)} bad ones skipped" if examined.bad else ""
    print(f"data {examined.folder}: {len(examined.rows)} rows{skipped}, fingerprint {examined.fingerprint}")
    print(f"layout: {examined.layout}")
    for line in checked.lines()[1:]:
        print(f"  {line}")
    base = study.base_config()
    need = memory.needed(base.model, base.dtype_of_base)
    if need is not None:
        print(f"base {base.model}: {need} in {base.dtype_of_base}")
    for line in costs.lines(study, checked):
        print(line)
    print("search space:")
    for name, param in study.space.items():
        print(f"  {name}: {param}")
    for fixed in study.enqueue:
        print(f"given by hand: {fixed.label}: {dict(fixed.config)}")

    # A study in memory samples what the first trial would be.
    dry = optuna.create_study(sampler=make_sampler(study, strategy, n_trials, prior))
    trial = dry.ask()
    params.suggest(trial, study)
    config = study.config(trial.params, staged.stage_overrides(trial))
    print("the first sampled trial would be")
    print(leaderboard.training_config(config.model_dump(mode="json")))
    _ask_mlflow(options)
    print("nothing was run (--dry-run)")


def _ask_mlflow(options: SearchOptions) -> None:
    """Say whether an MLflow server answers, to the client that the search would use. A file would be created."""
    from search.errors import Unavailable
    from search.tracking.client import open_tracking
    from search.urls import shown

    uri = options.places.tracking_uri
    if not uri.startswith("http"):
        return
    try:
        open_tracking(uri, options.places.artifacts)
    except Unavailable as error:
        print(f"MLflow: {error} A search would keep its records until it answers.")
    else:
        print(f"MLflow: {shown(uri)} answers")
