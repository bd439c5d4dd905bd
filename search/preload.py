"""The imports of a worker, made by importing this: `multiprocessing`'s fork server does it by name."""

from contextlib import suppress

from search.worker import import_early
from trainer.startup import without_collection

import_early()
with without_collection(), suppress(ImportError):
    # What Optuna and MLflow import when they open a database.
    import alembic.command  # noqa: F401
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
