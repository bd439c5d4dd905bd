"""A study's experiment in MLflow, found by the study's own id: two people's studies may have one name in one store.

The first has the experiment of its name, a later one `<name>-<beginning of its id>`. An experiment without an id is of
an earlier version, and is taken for that of a study of an earlier version.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from search.errors import StorageError
from search.records import STUDY_ID
from search.storage.identity import EARLIER
from search.tracking.errors import translated
from search.tracking.library import Experiment, MlflowClient, MlflowException
from search.tracking.mlflow_private import ALREADY_EXISTS
from search.urls import has_secret


def find(client: MlflowClient, uri: str, study_name: str, study_id: str | None) -> Experiment | None:
    """The study's experiment, None if there is none.

    Args:
        client: Of the store.
        uri: The store's address, for the message.
        study_name: Optuna's name of the study.
        study_id: Its id; None if it is not known: then the name decides.

    Raises:
        StorageError: it was deleted; the message has the command that brings it back.
    """
    for name in names(study_name, study_id):
        with translated(f"looking for experiment {name!r}"):
            found: Experiment | None = client.get_experiment_by_name(name)
        if found is None or not _is_of(found, study_id):
            continue
        if found.lifecycle_stage != "active":
            raise StorageError(
                f"the MLflow experiment {name!r} was deleted; bring it back with\n"
                f"  {_restore(uri, found.experiment_id)}\nor start a new study with --fresh"
            )
        return found
    return None


def create(client: MlflowClient, study_name: str, study_id: str | None, location: str | None) -> None:
    """Create the study's experiment; any number of processes may at once, and `find` finds what came of it."""
    for name in names(study_name, study_id):
        with translated(f"creating experiment {name!r}"):
            try:
                tags = {STUDY_ID: study_id} if study_id is not None else {}
                client.create_experiment(name, artifact_location=location, tags=tags)
            except MlflowException as error:
                if error.error_code != ALREADY_EXISTS:
                    raise
                found = client.get_experiment_by_name(name)
                if found is not None and not _is_of(found, study_id):
                    continue  # another's: the next name
        return
    raise StorageError(
        f"the MLflow experiments {' and '.join(names(study_name, study_id))} belong to other studies: begin a new "
        "study with --fresh, or rename theirs"
    )


def names(study_name: str, study_id: str | None) -> Iterator[str]:
    """The names that an experiment or a registered model of the study may have, in this order."""
    yield study_name
    if study_id is not None:
        yield f"{study_name}-{study_id.removeprefix(EARLIER)[:8]}"


def _is_of(experiment: Experiment, study_id: str | None) -> bool:
    owner = experiment.tags.get(STUDY_ID)
    return study_id is None or owner == study_id or (owner is None and study_id.startswith(EARLIER))


def _restore(uri: str, experiment_id: str) -> str:
    """A command that can be pasted; an address with a secret has to come out of the environment."""
    address = "" if has_secret(uri) else f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "
    hint = "   # with this store's address in MLFLOW_TRACKING_URI" if has_secret(uri) else ""
    return f"{address}mlflow experiments restore -x {experiment_id}{hint}"
