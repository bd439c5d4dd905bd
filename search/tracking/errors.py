"""MLflow's errors as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import requests

from search.errors import StorageError, Unavailable
from search.tracking.library import MlflowException
from search.tracking.mlflow_private import TRANSIENT
from search.urls import first_line, masked_in

_TRANSIENT_HTTP = (401, 403, 404, 408, 409, 429)
"""Statuses below 500 after which the same call may succeed, as in `TRANSIENT`."""


@contextlib.contextmanager
def translated(doing: str) -> Iterator[None]:
    """Raise MLflow's errors as `Unavailable` where trying again may help, else as StorageError.

    Args:
        doing: What was tried, the beginning of the message.
    """
    try:
        yield
    except MlflowException as error:
        kind = Unavailable if error.error_code in TRANSIENT else StorageError
        raise kind(f"{doing}: {first_line(error)}") from error
    except requests.HTTPError as error:  # files on a server, which MLflow passes on as they are
        status = error.response.status_code if error.response is not None else 500
        kind = Unavailable if status >= 500 or status in _TRANSIENT_HTTP else StorageError
        raise kind(f"{doing}: {first_line(error)}") from error
    except OSError as error:  # those of requests too: no connection, no answer, no room, no rights
        raise Unavailable(f"{doing}: {masked_in(str(error))}") from error
