"""MLflow as this program imports it: it reports nothing home, does not retry by itself, and does without pandas.

The only module that imports mlflow; the others of this room take its names from here.
"""

from __future__ import annotations

import importlib
import logging
import os

# All are read when mlflow is imported. Nothing we run calls home.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("DO_NOT_TRACK", "true")
# MLflow's own 7 retries last minutes inside one call. A call that fails goes to the outbox, which tries again.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")

from search.tracking import mlflow_private
from trainer.common.imports import without_module

with without_module("pandas"):  # for datasets that runs could name: 0.2 s
    from mlflow import __version__ as VERSION
    from mlflow.entities import (
        Dataset,
        DatasetInput,
        Experiment,
        InputTag,
        LoggedModelOutput,
        Metric,
        Param,
        Run,
        RunTag,
    )
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

__all__ = [
    "VERSION",
    "Dataset",
    "DatasetInput",
    "Experiment",
    "InputTag",
    "LoggedModelOutput",
    "Metric",
    "MlflowClient",
    "MlflowException",
    "Param",
    "Run",
    "RunTag",
    "preload",
]

logging.getLogger(mlflow_private.DATABASE_LOGGER).setLevel(logging.CRITICAL)


def preload() -> None:
    """Import what MLflow imports when it opens a database: a process that others are forked from saves it them."""
    importlib.import_module(mlflow_private.SQL_STORE)
