"""A run's data and its model in MLflow: a dataset input, a LoggedModel with its metrics, a version in the registry.

The registered model is found by the study's own id, as its experiment is (`search.tracking.experiments`): the first of
a name has it, a later study's is `<name>-<beginning of its id>`.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Any

from search.errors import StorageError
from search.records import STUDY_ID
from search.tracking import experiments
from search.tracking.errors import translated
from search.tracking.library import (
    Dataset,
    DatasetInput,
    InputTag,
    LoggedModelOutput,
    Metric,
    MlflowClient,
    MlflowException,
    Run,
)
from search.tracking.mlflow_private import ALREADY_EXISTS, MISSING
from search.tracking.outbox import DataUsed, Model

log = logging.getLogger("search.tracking.models")

CONTEXT = "mlflow.data.context"
"""Tag of a dataset input that MLflow's pages show beside it."""
TRIES = 5
RACE = "IntegrityError"
"""In MLflow's message where another process has added the same row meanwhile."""
DIGEST = 36
"""Most characters of a dataset's digest."""


def log_data(client: MlflowClient, run_id: str, data: DataUsed) -> None:
    """Name the data that a run trains on; MLflow keeps equal inputs once."""
    dataset = Dataset(
        name=data.name,
        digest=data.digest[:DIGEST],
        source_type="local",
        source=json.dumps({"uri": data.source}),
        profile=json.dumps(data.profile),
    )
    with translated(f"naming the data of run {run_id}"):
        for left in reversed(range(TRIES)):
            try:
                client.log_inputs(run_id, datasets=[DatasetInput(dataset, [InputTag(CONTEXT, "training")])])
                return
            except MlflowException as error:
                # MLflow looks whether it knows the data, and adds them if not: trials that begin at once all add them.
                if not left or RACE not in str(error):
                    raise


def keep(client: MlflowClient, run_id: str, model: Model, study_id: str | None = None) -> None:
    """Keep an adapter as the run's LoggedModel, and its version in the registry under the alias.

    Args:
        client: Of the store, which has the registry too.
        run_id: The run of the trial.
        model: The adapter.
        study_id: The study's own id; None if it is not known: then the name decides.
    """
    with translated(f"keeping the model of run {run_id}"):
        run: Run = client.get_run(run_id)
        model_id = _logged(client, run, model)
        name = _registered(client, run, model.name, study_id)
        found = [v for v in client.search_model_versions(f"name = '{name}'") if v.run_id == run_id]
        version = found[0] if found else _version(client, run_id, name, model_id)
        client.set_registered_model_alias(name, model.alias, version.version)
        log.info("the adapter of run %s is models:/%s@%s, version %s", run_id, name, model.alias, version.version)


def _registered(client: MlflowClient, run: Run, study_name: str, study_id: str | None) -> str:
    """Name of the study's registered model, made unless it is there."""
    for name in experiments.names(study_name, study_id):
        try:
            client.create_registered_model(name, tags={STUDY_ID: study_id} if study_id is not None else {})
            return name
        except MlflowException as error:
            if error.error_code != ALREADY_EXISTS:
                raise
        owner = client.get_registered_model(name).tags.get(STUDY_ID)
        if study_id is None or owner == study_id:
            return name
        if owner is None and _made_by(client, name, run.info.experiment_id):
            client.set_registered_model_tag(name, STUDY_ID, study_id)
            return name
    raise StorageError(f"the registered models {study_name!r} and {name!r} are other studies'; rename one of them")


def _made_by(client: MlflowClient, name: str, experiment_id: str) -> bool:
    """Whether the runs of this experiment made a registered model that an earlier version left without a tag.

    Who made its first version made it: a namesake may have added to it, when the name alone counted.
    """
    versions = client.search_model_versions(f"name = '{name}'")
    first = min(versions, key=lambda version: int(version.version), default=None)
    if first is None:
        return True
    if not first.run_id:  # of someone's own making
        return False
    try:
        return bool(client.get_run(first.run_id).info.experiment_id == experiment_id)
    except MlflowException as error:
        if error.error_code != MISSING:
            raise
        return False


def _logged(client: MlflowClient, run: Run, model: Model) -> str:
    """Id of the run's LoggedModel, made unless it is there; one that was left unfinished is not used."""
    run_id, experiment_id = run.info.run_id, run.info.experiment_id
    found = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    for each in found:
        if each.status == "READY" and each.tags.get("step") == str(model.step):
            return str(each.model_id)
    made = client.create_logged_model(
        experiment_id,
        name=model.name.replace(".", "_"),  # which MLflow does not take here, though it does in the registry
        source_run_id=run_id,
        tags={"step": str(model.step), "library": "peft"},
        params=model.params,
        model_type="lora",
    )
    client.log_model_artifacts(made.model_id, model.path)
    client.log_outputs(run_id, [LoggedModelOutput(made.model_id, model.step)])
    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    data = inputs[0].dataset if inputs else None
    about = {"dataset_name": data.name, "dataset_digest": data.digest} if data is not None else {}
    metrics = [
        Metric(key, *_recorded(client, run_id, key, value, model.step), model_id=made.model_id, run_id=run_id, **about)
        for key, value in model.metrics.items()
    ]
    client.log_batch(run_id, metrics=metrics)
    client.finalize_logged_model(made.model_id, "READY")
    return str(made.model_id)


def _recorded(client: MlflowClient, run_id: str, key: str, value: float, step: int) -> tuple[float, int, int]:
    """(value, time in ms, step) of a metric as the run has it, the value given, now, if it has none.

    A metric of a model is written into its run's curve too, unless it is there to the digit and millisecond
    (mlflow/store/tracking/sqlalchemy_store.py, `_log_metrics`): charts would show the epoch twice.
    """
    for point in client.get_metric_history(run_id, key):
        if point.step == step:
            return point.value, point.timestamp, step
    return value, int(time.time() * 1000), step


def _version(client: MlflowClient, run_id: str, name: str, model_id: str) -> Any:
    # By its place: a database's registry looks a `models:/` address up in MLflow's global tracking store, which is
    # never set here (mlflow/store/model_registry/sqlalchemy_store.py, `create_model_version`).
    source = client.get_logged_model(model_id).artifact_location
    return client.create_model_version(name, source, run_id=run_id, model_id=model_id, await_creation_for=0)
